"""Kernels of linear, linear_per_head, gated_mlp and attention_output, and the product that experts in floating point share.

Floor of a product: the larger of heads * outputs * inputs * bytes of a weight / memory bandwidth, and 2 * rows * heads * outputs
* inputs / rate of products. Few rows leave few programs, so the inputs are cut into segments, as in `kernels/matmul.py`: sums,
and so the bits, are the same whether one program computes all segments of its tile or one of them.

Shape legend: N outputs of a program; R rows of x of a program; K inputs at a time; H heads; S segments.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import dot_add, narrow


@triton.jit
def dense_sums(
    weight_rows, weight_step, x_rows, inside, used, first, end,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight rows by rows of x over the inputs first .. end - 1 that are below WIDTH, [N, R] float32.

    `weight_rows` [N] and `x_rows` [R] point to where rows begin; `inside` and `used` say which of them there are. The inputs of a
    weight lie `weight_step` apart, those of x side by side."""
    sums = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    step = tl.arange(0, BLOCK_K)
    steps = step.to(tl.int64) * weight_step
    for start in range(first, end, BLOCK_K):
        there = start + step < WIDTH
        begin = tl.cast(start, tl.int64)
        held_rows = weight_rows[:, None] + begin * weight_step
        held = tl.load(held_rows + steps[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        inputs = tl.load(x_rows[None, :] + begin + step[:, None], mask=used[None, :] & there[:, None], other=0.0)
        sums = dot_add(held, inputs, sums)
    return sums


@triton.jit(do_not_specialize=["rows"])
def dense_products(
    x, weight, y, rows, heads, x_stride, x_head_stride, weight_stride, weight_head_stride, weight_step,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows, runs of SEGMENTS segments by heads). y: [runs, rows, H, OUTPUTS].

    SEGMENT: steps of BLOCK_K inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head, run = (tl.program_id(2) % heads).to(tl.int64), tl.program_id(2) // heads
    inside, used = n < OUTPUTS, r < rows
    weight_rows = weight + head * weight_head_stride + n.to(tl.int64) * weight_stride
    x_rows = x + r * x_stride + head * x_head_stride
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for segment in range(SEGMENTS):
        first = (run * SEGMENTS + segment) * (SEGMENT * BLOCK_K)
        total += dense_sums(
            weight_rows, weight_step, x_rows, inside, used, first, first + SEGMENT * BLOCK_K, WIDTH, BLOCK_N, BLOCK_R, BLOCK_K
        )
    places = ((run.to(tl.int64) * rows + r[None, :]) * heads + head) * OUTPUTS + n[:, None]
    tl.store(y + places, narrow(total, y.dtype.element_ty), mask=used[None, :] & inside[:, None])


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gate_rows(gate_up, between, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """between [R, WIDTH] = silu(gate) * up of rows [R, 2 WIDTH] that hold gate, then up. Programs: (rows, blocks of channels)."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + channel, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(between + row * WIDTH + channel, narrow(silu_times(gate, up), between.dtype.element_ty), mask=inside)
