"""Kernels of expert_mlp, expert_mlp_int4 and expert_mlp_int4_w4a8.

    group_rows    lists the routed rows of each expert in blocks of one expert; the host never learns how many went where
    *_gate_up     silu(gate) * up of a block of rows, both products in one pass over the rows
    *_down        the second product, one result for each routed row
    mix_choices   a token's results, weighed and added in routing order

No atomics anywhere: a routed row (token * choices + choice) owns its row of every buffer. Weights are the left operand of the
products, 64 rows or more, and the routed rows the right one, 16 or more: with few rows, nothing of the matrix unit's larger side
idles. Outputs are the first dimension of the grid, so that programs that run at the same time share a block's rows in the L2
cache, and consecutive blocks of one expert its weights.

Floor, for R routed rows that meet U distinct experts of 3 D F weights: the larger of U * 3 D F * bytes of a weight / memory
bandwidth and 6 R D F / rate of products. GLM-5 at one token: 8 experts of 37.7 million weights are 604 MB in bfloat16 and 170 MB
in INT4 (0.5625 bytes), 126 us and 35 us at 4.8 TB/s; at 4096 tokens 2.5e12 operations for a layer, 2.5 ms at 990e12 a second.

Shape legend: N outputs of a program; B rows of a block; S blocks; E experts.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.linear import dense_sums, silu_times
from glm5_port.backends.cuda.kernels.numbers import dot_add, narrow
from glm5_port.backends.cuda.kernels.weights import RUN, RUNS, TILE, WORDS, add_run


@triton.jit(do_not_specialize=["routed", "blocks"])
def group_rows(
    ids, rows_of_block, expert_of_block, routed, blocks,
    EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Programs: experts. Each counts the rows of all, and lists its own, in order; -1 where a block is not full.

    rows_of_block: [S, B]; expert_of_block: [S], -1 for blocks without any row, whose rows are not written."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts_E = tl.zeros((BLOCK_E,), tl.int32)
    for chunk in range(CHUNKS):
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        id = tl.load(ids + place, mask=place < routed, other=-1)
        known = (id >= 0) & (id < EXPERTS)
        counts_E += tl.histogram(tl.where(known, id, 0), BLOCK_E, mask=known)
    blocks_E = (counts_E + BLOCK_B - 1) // BLOCK_B
    first = tl.sum(tl.where(experts < expert, blocks_E, 0), axis=0)
    mine = tl.sum(tl.where(experts == expert, blocks_E, 0), axis=0)

    listed = first * BLOCK_B
    for chunk in range(CHUNKS):
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        chosen = tl.load(ids + place, mask=place < routed, other=-1) == expert
        after = tl.cumsum(chosen.to(tl.int32), axis=0)
        tl.store(rows_of_block + listed + after - 1, place, mask=chosen)
        listed += tl.sum(chosen.to(tl.int32), axis=0)
    rest = listed + tl.arange(0, BLOCK_B)
    tl.store(rows_of_block + rest, -1, mask=rest < (first + mine) * BLOCK_B)

    block = tl.arange(0, BLOCK_S)
    tl.store(expert_of_block + block, expert, mask=(block >= first) & (block < first + mine))
    unused = (block >= tl.sum(blocks_E, axis=0)) & (block < blocks) & (expert == 0)
    tl.store(expert_of_block + block, -1, mask=unused)


# -- weights in floating point -----------------------------------------------------------------------------------------


@triton.jit
def dense_gate_up(
    x, weight, rows_of_block, expert_of_block, between, x_stride, weight_stride, expert_stride,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, BETWEEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows). weight: [E, 2 BETWEEN, WIDTH]; between: [routed rows, BETWEEN]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block)
    if expert < 0:
        return
    row = tl.load(rows_of_block + block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    used = row >= 0
    gate_rows = weight + expert.to(tl.int64) * expert_stride + n[:, None].to(tl.int64) * weight_stride
    up_rows = weight + expert.to(tl.int64) * expert_stride + (BETWEEN + n)[:, None].to(tl.int64) * weight_stride
    gate = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inputs = tl.load(
            x + (row // CHOICES)[None, :] * x_stride + k[:, None], mask=used[None, :] & (k < WIDTH)[:, None], other=0.0
        )
        inside = (n < BETWEEN)[:, None] & (k < WIDTH)[None, :]
        gate = dot_add(tl.load(gate_rows + k[None, :], mask=inside, other=0.0), inputs, gate)
        up = dot_add(tl.load(up_rows + k[None, :], mask=inside, other=0.0), inputs, up)
    places = row[None, :] * BETWEEN + n[:, None]
    tl.store(
        between + places, narrow(silu_times(gate, up), between.dtype.element_ty), mask=used[None, :] & (n < BETWEEN)[:, None]
    )


@triton.jit
def dense_down(
    between, weight, rows_of_block, expert_of_block, results, weight_stride, expert_stride,
    WIDTH: tl.constexpr, BETWEEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows). weight: [E, WIDTH, BETWEEN]; results: [routed rows, WIDTH]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block)
    if expert < 0:
        return
    row = tl.load(rows_of_block + block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    used = row >= 0
    inside = n < WIDTH
    weight_rows = weight + expert.to(tl.int64) * expert_stride + n.to(tl.int64) * weight_stride
    sums = dense_sums(weight_rows, 1, between + row * BETWEEN, inside, used, 0, BETWEEN, BETWEEN, BLOCK_N, BLOCK_B, BLOCK_K)
    places = row[None, :] * WIDTH + n[:, None]
    tl.store(results + places, narrow(sums, results.dtype.element_ty), mask=used[None, :] & inside[:, None])


# -- INT4 weights ------------------------------------------------------------------------------------------------------


@triton.jit
def run_of_inputs(x, x_rows, used, start, WIDTH: tl.constexpr):
    """Inputs start .. start + 31 of rows, [32, B]."""
    k = start + tl.arange(0, RUN)
    return tl.load(x + x_rows[None, :] + k[:, None], mask=used[None, :] & (k < WIDTH)[:, None], other=0)


@triton.jit
def run_of_scales(scales, start, n, OUTPUTS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, inside):
    """The scale of each output for the inputs from `start`."""
    return tl.load(scales + (start // GROUP) * OUTPUTS + n, mask=inside & (start < WIDTH), other=0.0)


@triton.jit
def int4_gate_up(
    x, row_scales, words, scales, rows_of_block, expert_of_block, between, x_stride,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, BETWEEN: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows). words: [E, TILES, 2 BETWEEN, 16]; scales: [E, GROUPS, 2 BETWEEN].

    x: [T, WIDTH], or its int8 codes with `row_scales` [T]: then gate and up are rounded to the dtype of `between`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(rows_of_block + block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    used = row >= 0
    x_rows = (row // CHOICES) * x_stride
    inside = n < BETWEEN
    gate_words = words + expert * (TILES * 2 * BETWEEN * WORDS) + n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales += expert * (GROUPS * 2 * BETWEEN)
    gate = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for tile in range(TILES):
        held_gate = tl.load(gate_words + tile * (2 * BETWEEN * WORDS), mask=inside[:, None], other=0)
        held_up = tl.load(gate_words + (tile * 2 + 1) * (BETWEEN * WORDS), mask=inside[:, None], other=0)
        for j in tl.static_range(RUNS):
            start = tile * TILE + j * RUN
            inputs = run_of_inputs(x, x_rows, used, start, WIDTH)
            gate = add_run(held_gate, run_of_scales(scales, start, n, 2 * BETWEEN, GROUP, WIDTH, inside), inputs, gate, j)
            up = add_run(held_up, run_of_scales(scales, start, BETWEEN + n, 2 * BETWEEN, GROUP, WIDTH, inside), inputs, up, j)
    dtype: tl.constexpr = between.dtype.element_ty
    if x.dtype.element_ty == tl.int8:
        row_scale = tl.load(row_scales + row // CHOICES, mask=used, other=0.0)[None, :]
        gate = narrow(gate * row_scale, dtype).to(tl.float32)
        up = narrow(up * row_scale, dtype).to(tl.float32)
    tl.store(
        between + row[None, :] * BETWEEN + n[:, None], narrow(silu_times(gate, up), dtype), mask=used[None, :] & inside[:, None]
    )


@triton.jit
def int4_down(
    between, row_scales, words, scales, rows_of_block, expert_of_block, results,
    WIDTH: tl.constexpr, BETWEEN: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of outputs, blocks of rows). words: [E, TILES, WIDTH, 16]; scales: [E, GROUPS, WIDTH].

    between: [routed rows, BETWEEN], or its int8 codes with `row_scales`; results: [routed rows, WIDTH]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(rows_of_block + block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    used = row >= 0
    inside = n < WIDTH
    tile_words = words + expert * (TILES * WIDTH * WORDS) + n[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scales += expert * (GROUPS * WIDTH)
    sums = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for tile in range(TILES):
        held = tl.load(tile_words + tile * (WIDTH * WORDS), mask=inside[:, None], other=0)
        for j in tl.static_range(RUNS):
            start = tile * TILE + j * RUN
            inputs = run_of_inputs(between, row * BETWEEN, used, start, BETWEEN)
            sums = add_run(held, run_of_scales(scales, start, n, WIDTH, GROUP, BETWEEN, inside), inputs, sums, j)
    if between.dtype.element_ty == tl.int8:
        sums = sums * tl.load(row_scales + row, mask=used, other=0.0)[None, :]
    places = row[None, :] * WIDTH + n[:, None]
    tl.store(results + places, narrow(sums, results.dtype.element_ty), mask=used[None, :] & inside[:, None])


# -- the end -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def mix_choices(
    results, route_weights, ids, y, tokens,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of channels, blocks of tokens). What belongs to an id out of range is not read."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for choice in range(CHOICES):
        row = token * CHOICES + choice
        id = tl.load(ids + row, mask=token < tokens, other=-1)
        known = (id >= 0) & (id < EXPERTS)
        weight = tl.load(route_weights + row, mask=known, other=0.0)
        total += tl.load(results + row * WIDTH + d, mask=known & (d < WIDTH), other=0.0).to(tl.float32) * weight
    tl.store(y + token * WIDTH + d, narrow(total, y.dtype.element_ty), mask=(token < tokens) & (d < WIDTH))
