"""Scores of the lightning indexer, and the selection of the best positions.

Shape legend: T tokens; J index heads; X index head size; S positions considered. HEADS and CHANNELS are J and X rounded up to
powers of two; KEYS are the positions of one tile.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import dot, from_e4m3, narrow
from glm5_port.backends.cuda.kernels.paging import locate, slots_of

# -- scores ------------------------------------------------------------------------------------------------------------


@triton.jit
def key_tile(rows, visible, DIM: tl.constexpr, CHANNELS: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """[KEYS, CHANNELS] index keys in `dtype`, without scales: e4m3 and int8 are exact in 16 bits. Zeros where not visible."""
    channel = tl.arange(0, CHANNELS)[None, :]
    stored = tl.load(rows[:, None] + channel, mask=visible[:, None] & (channel < DIM), other=0)
    if FORMAT == "plain":
        return stored if stored.dtype == dtype else narrow(stored.to(tl.float32), dtype)
    return narrow(from_e4m3(stored) if FORMAT == "fp8" else stored.to(tl.float32), dtype)


@triton.jit(do_not_specialize=["first_token", "tokens", "batch", "pages", "table_width", "stride_table"])
def scores_of_tokens(
    query, head_weights, keys, scales, table, query_starts, lengths, scores,
    first_token, tokens, heads, batch, pages, table_width,
    stride_query_token, stride_query_head, stride_weights, stride_table,
    stride_key_page, stride_key_row, stride_scale_page, stride_scale_row,
    DIM: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: KEYS positions for TOKENS packed tokens, whose keys are read once for each run of tokens of one sequence.

    Scores `tokens` tokens from `first_token` on into scores [tokens, S]; -inf beyond a token's own position. The keys are the
    rows of the product and the heads its columns, so that the sum over heads stays within a few threads.
    """
    positions = table_width * PAGE
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    head, channel = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    query_mask = (channel < DIM)[:, None] & (head < heads)[None, :]
    dtype: tl.constexpr = query.dtype.element_ty
    token = first_token + tl.program_id(0) * TOKENS
    end = tl.minimum(token + TOKENS, first_token + tokens)
    while token < end:
        sequence, position, sequence_end = locate(token, query_starts, lengths, batch)
        run_end = tl.minimum(end, sequence_end)
        reach = tl.where(position < 0, 0, position + run_end - token)  # positions that the last token of the run sees
        page, row, visible = slots_of(place, (place < reach) & (place < positions), table, stride_table, sequence, pages, PAGE)
        key_SX = key_tile(keys + page * stride_key_page + row * stride_key_row, visible, DIM, CHANNELS, FORMAT, dtype)
        if FORMAT != "plain":
            scale = tl.load(scales + page * stride_scale_page + row * stride_scale_row, mask=visible, other=1.0).to(tl.float32)
        for each in range(token, run_end):
            wide = tl.cast(each, tl.int64)
            query_rows = query + wide * stride_query_token + head[None, :] * stride_query_head + channel[:, None]
            query_XJ = tl.load(query_rows, mask=query_mask, other=0.0)
            weight = tl.load(head_weights + wide * stride_weights + head, mask=head < heads, other=0.0).to(tl.float32)
            product = tl.maximum(dot(key_SX, query_XJ), 0.0, propagate_nan=tl.PropagateNan.ALL)
            score = tl.sum(product * weight[None, :], 1)
            if FORMAT != "plain":  # a scale is positive, so that it may wait until after the relu; one that is not finite is NaN
                score = tl.where(scale < float("inf"), score * scale, float("nan"))
            seen = place <= tl.where(position < 0, -1, position + each - token)
            score = tl.where(seen, score, float("-inf"))
            tl.store(scores + (wide - first_token) * positions + place, score, mask=place < positions)
        token = run_end


# -- selection ---------------------------------------------------------------------------------------------------------

BINS = tl.constexpr(256)
PASSES = tl.constexpr(4)
LOWEST = tl.constexpr(0x007FFFFF)
"""Rank of -infinity."""


@triton.jit
def ranks_of(scores):
    """uint32 that order as the scores do: -0.0 as 0.0, and every NaN above infinity, as torch sorts them."""
    x = scores.to(tl.float32) + 0.0
    bits = x.to(tl.uint32, bitcast=True)
    ranks = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, ranks, 0xFFFFFFFF)


@triton.jit
def digit_of(counts, wanted):
    """(digit, above): the highest digit from which on at least `wanted` are counted, and how many are above it."""
    number = tl.arange(0, BINS)
    from_here = tl.cumsum(counts, 0, reverse=True)
    digit = tl.maximum(tl.sum((from_here >= wanted).to(tl.int32), 0) - 1, 0)
    return digit, tl.sum(tl.where(number > digit, counts, 0), 0)


@triton.jit
def counts_of_row(counts, row, tiles, PASS: tl.constexpr):
    """[BINS] counts of a row, all tiles added, of one pass; counts is [rows, PASSES, tiles, BINS]."""
    number = tl.arange(0, BINS)
    start = counts + (row * PASSES + PASS) * tiles * BINS
    total = tl.zeros([BINS], tl.int32)
    for tile in range(tiles):
        total += tl.load(start + tile * BINS + number)
    return total


@triton.jit
def threshold_before(counts, state, row, tiles, top_k, PASS: tl.constexpr):
    """(prefix, wanted) after the passes before PASS: the upper digits of the lowest selected rank, and how many of those with
    these digits are selected. The pass before is read from `counts`, the others from `state` [rows, PASSES, 2]."""
    if PASS == 0:
        return 0, top_k
    seen = counts_of_row(counts, row, tiles, PASS - 1)
    if PASS == 1:
        prefix, wanted = 0, tl.minimum(top_k, tl.sum(seen, 0))
    else:
        prefix = tl.load(state + (row * PASSES + PASS - 2) * 2)
        wanted = tl.load(state + (row * PASSES + PASS - 2) * 2 + 1)
    digit, above = digit_of(seen, wanted)
    return prefix * BINS + digit, wanted - above


@triton.jit(do_not_specialize=["tiles"])
def count_digits(scores, counts, state, positions, stride_row, top_k, tiles, tile_size, PASS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one tile of one row. Counts digit PASS (of 8 bits, from the top) of the ranks that begin with what the passes
    before found; -infinity is never counted."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    prefix, wanted = threshold_before(counts, state, row, tiles, top_k, PASS)
    if PASS > 0:
        tl.store(state + (row * PASSES + PASS - 1) * 2, prefix, mask=tile == 0)
        tl.store(state + (row * PASSES + PASS - 1) * 2 + 1, wanted, mask=tile == 0)
    total = tl.zeros([BINS], tl.int32)
    for first in range(tile * tile_size, tl.minimum((tile + 1) * tile_size, positions), BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = (place < (tile + 1) * tile_size) & (place < positions)
        ranks = ranks_of(tl.load(scores + row * stride_row + place, mask=inside, other=float("-inf")))
        counted = inside & (ranks > LOWEST)
        if PASS > 0:
            counted = counted & ((ranks >> (32 - 8 * PASS)).to(tl.int32) == prefix)
        digits = ((ranks >> (24 - 8 * PASS)) & 0xFF).to(tl.int32)
        if tl.sum(counted.to(tl.int32), 0) > 0:  # few have the prefix: counting costs more than looking
            total += tl.histogram(digits, BINS, mask=counted)
    tl.store(counts + ((row * PASSES + PASS) * tiles + tile) * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["tiles"])
def count_selected(scores, counts, state, selected, positions, stride_row, top_k, tiles, tile_size, BLOCK: tl.constexpr):
    """One program: one tile of one row. Counts ranks above the lowest selected one, and equal to it, into selected
    [rows, 2, tiles]; tile 0 writes that rank, and how many equals are selected, to the last state."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    threshold, wanted = threshold_before(counts, state, row, tiles, top_k, PASSES)
    if tile == 0:
        tl.store(state + (row * PASSES + PASSES - 1) * 2, threshold)
        tl.store(state + (row * PASSES + PASSES - 1) * 2 + 1, wanted)
    limit = threshold.to(tl.uint32, bitcast=True)
    above, equal = 0, 0
    for first in range(tile * tile_size, tl.minimum((tile + 1) * tile_size, positions), BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = (place < (tile + 1) * tile_size) & (place < positions)
        ranks = ranks_of(tl.load(scores + row * stride_row + place, mask=inside, other=float("-inf")))
        above += tl.sum((inside & (ranks > LOWEST) & (ranks > limit)).to(tl.int32), 0)
        equal += tl.sum((inside & (ranks > LOWEST) & (ranks == limit)).to(tl.int32), 0)
    tl.store(selected + row * 2 * tiles + tile, above)
    tl.store(selected + (row * 2 + 1) * tiles + tile, equal)


@triton.jit(do_not_specialize=["tiles"])
def write_selected(
    scores, state, selected, indices, positions, stride_row, top_k, tiles, tile_size, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """One program: one tile of one row. Writes its selected positions behind those of the tiles before it, ascending; the last
    tile fills the rest of the row with -1."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(state + (row * PASSES + PASSES - 1) * 2).to(tl.uint32, bitcast=True)
    wanted = tl.load(state + (row * PASSES + PASSES - 1) * 2 + 1)
    number = tl.arange(0, TILES)
    aboves = tl.load(selected + row * 2 * tiles + number, mask=number < tile, other=0)
    equals = tl.load(selected + (row * 2 + 1) * tiles + number, mask=number < tile, other=0)
    equal = tl.sum(equals, 0)
    written = tl.sum(aboves, 0) + tl.minimum(equal, wanted)
    for first in range(tile * tile_size, tl.minimum((tile + 1) * tile_size, positions), BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = (place < (tile + 1) * tile_size) & (place < positions)
        ranks = ranks_of(tl.load(scores + row * stride_row + place, mask=inside, other=float("-inf")))
        visible = inside & (ranks > LOWEST)
        is_equal = (visible & (ranks == limit)).to(tl.int32)
        takes_equal = (is_equal != 0) & (equal + tl.cumsum(is_equal, 0) <= wanted)
        takes = ((visible & (ranks > limit)) | takes_equal).to(tl.int32)
        target = written + tl.cumsum(takes, 0) - 1
        tl.store(indices + row * top_k + target, place, mask=(takes != 0) & (target < top_k))
        written += tl.sum(takes, 0)
        equal += tl.sum(is_equal, 0)
    if tile == tiles - 1:
        for first in range(written, top_k, BLOCK):
            rest = first + tl.arange(0, BLOCK)
            tl.store(indices + row * top_k + rest, tl.full([BLOCK], -1, tl.int32), mask=rest < top_k)
