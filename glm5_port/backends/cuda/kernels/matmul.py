"""Kernels of int4_matmul and int8_matmul.

Floor of int4_matmul: the larger of outputs * inputs * (0.5 + 2 / g) bytes / memory bandwidth, and 2 * rows * outputs * inputs /
rate of bfloat16 products; on an H200 they meet near 120 rows. Few rows leave few programs, so the inputs are cut into segments,
each summed by itself; the segments are then added in order. One program may compute all segments of its tile or one of them: the
sums, and so the bits, are the same.

Floor of int8_matmul: outputs * inputs bytes / bandwidth, or 2 * rows * outputs * inputs / rate of 8-bit products. Sums are whole
numbers, the same in any order.

Shape legend: N outputs of a program; R rows of x of a program; K inputs at a time; S segments.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import narrow
from glm5_port.backends.cuda.kernels.weights import RUN, RUNS, TILE, WORDS, add_run


@triton.jit(do_not_specialize=["rows"])
def int4_products(
    x, words, scales, y, rows, x_stride,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows, runs of SEGMENTS segments). y: [runs, rows, outputs].

    words: [tiles, outputs, 16]; scales: [groups, outputs]; SEGMENT: tiles of a segment."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_run = tl.arange(0, RUN)
    word_places = n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = tl.program_id(2) * (SEGMENTS * SEGMENT)
    for segment in range(SEGMENTS):
        sums = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for step in range(SEGMENT):
            tile = first + segment * SEGMENT + step
            held = tl.load(words + tile.to(tl.int64) * (OUTPUTS * WORDS) + word_places, mask=(n < OUTPUTS)[:, None], other=0)
            for j in tl.static_range(RUNS):
                start = tile * TILE + j * RUN
                k = start + in_run
                scale = tl.load(scales + (start // GROUP) * OUTPUTS + n, mask=(n < OUTPUTS) & (start < WIDTH), other=0.0)
                inputs = tl.load(
                    x + r[None, :] * x_stride + k[:, None], mask=(r < rows)[None, :] & (k < WIDTH)[:, None], other=0.0
                )
                sums = add_run(held, scale, inputs, sums, j)
        total += sums
    places = (tl.program_id(2).to(tl.int64) * rows + r[None, :]) * OUTPUTS + n[:, None]
    tl.store(y + places, narrow(total, y.dtype.element_ty), mask=(r < rows)[None, :] & (n < OUTPUTS)[:, None])


@triton.jit
def add_segments(partial, y, count, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of `partial` [S, count] in order. Programs: blocks of numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for segment in range(SEGMENTS):
        total += tl.load(partial + segment * count + places, mask=places < count, other=0.0)
    tl.store(y + places, narrow(total, y.dtype.element_ty), mask=places < count)


@triton.jit
def quantize_rows(
    x, codes, scales, x_stride, SMALLEST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """8-bit codes of rows, as `glm5_port.operators.int4.quantize_rows`. Programs: rows."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    finite = tl.full((BLOCK,), 1, tl.int1)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(x + row * x_stride + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        finite = finite & (tl.abs(values) < float("inf"))  # false for NaN too
        largest = tl.maximum(largest, tl.abs(values))
    amax = tl.max(tl.where(finite, largest, float("inf")), axis=0)
    scale = tl.div_rn(amax, 127.0)
    scale = tl.where(amax < SMALLEST, 1.0, tl.where(amax < float("inf"), scale, float("nan")))
    tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK):
        values = tl.load(x + row * x_stride + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        whole = (tl.div_rn(values, scale) + 12582912.0) - 12582912.0  # 1.5 * 2^23: to nearest, ties to even
        code = tl.where(amax < float("inf"), whole, 0.0).to(tl.int8)
        tl.store(codes + row * WIDTH + start + columns, code, mask=start + columns < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def int8_products(
    codes, row_scales, weight, weight_scales, y, rows, weight_stride,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, APART: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows, segments). y: [rows, outputs], or int32 [S, rows, outputs] if APART.

    SEGMENT: steps of BLOCK_K inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (r < rows)[:, None] & (n < OUTPUTS)[None, :]
    sums = tl.zeros((BLOCK_R, BLOCK_N), tl.int32)
    for step in range(SEGMENT):
        k = (tl.program_id(2) * SEGMENT + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        left = tl.load(codes + r[:, None] * WIDTH + k[None, :], mask=(r < rows)[:, None] & (k < WIDTH)[None, :], other=0)
        places = n.to(tl.int64)[None, :] * weight_stride + k[:, None]
        right = tl.load(weight + places, mask=(n < OUTPUTS)[None, :] & (k < WIDTH)[:, None], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    if APART:
        tl.store(y + (tl.program_id(2).to(tl.int64) * rows + r[:, None]) * OUTPUTS + n[None, :], sums, mask=inside)
    else:
        scale = tl.load(row_scales + r, mask=r < rows, other=0.0)[:, None]
        scale = scale * tl.load(weight_scales + n, mask=n < OUTPUTS, other=0.0)[None, :]
        tl.store(y + r[:, None] * OUTPUTS + n[None, :], narrow(sums.to(tl.float32) * scale, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_whole_segments(
    partial, row_scales, weight_scales, y, rows, OUTPUTS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The end of `int8_products` where segments are apart. Programs: (blocks of outputs, rows)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.int32)
    for segment in range(SEGMENTS):
        sums += tl.load(partial + (segment * rows + r) * OUTPUTS + n, mask=n < OUTPUTS, other=0)
    scale = tl.load(row_scales + r) * tl.load(weight_scales + n, mask=n < OUTPUTS, other=0.0)
    tl.store(y + r * OUTPUTS + n, narrow(sums.to(tl.float32) * scale, y.dtype.element_ty), mask=n < OUTPUTS)
