"""Dense attention on keys and values of each head, and the rows of one sequence that these are expanded from.

Shape legend: T tokens; H heads; N nope, R rope and V value part; C latent; L positions of a sequence. NOPE, ROPE and VALUE are N,
R and V rounded up to powers of two.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.attention import LOG2_E, plain_tile, quantised_tile
from glm5_port.backends.cuda.kernels.numbers import dot, dot_add, narrow
from glm5_port.backends.cuda.kernels.paging import slots_of


@triton.jit(do_not_specialize=["sequence", "pages", "table_width", "stride_table"])
def read_sequence(
    values, scales, rope_keys, table, lengths, latent, rope, sequence, count, pages, table_width, stride_table,
    stride_value_page, stride_value_row, stride_scale_page, stride_scale_row, stride_key_page, stride_key_row,
    LATENT: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS positions of a sequence into latent [L, C] and rope [L, R], dense; zeros from the sequence's end on."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    written = place < tl.minimum(tl.load(lengths + sequence), count)
    page, row, visible = slots_of(place, written, table, stride_table, sequence, pages, PAGE)
    dtype: tl.constexpr = latent.dtype.element_ty
    rows = values + page * stride_value_page + row * stride_value_row
    if FORMAT == "plain":
        latent_LC = plain_tile(rows, visible, LATENT, CHANNELS, dtype)
    else:
        row_scales = scales + page * stride_scale_page + row * stride_scale_row
        latent_LC = quantised_tile(rows, row_scales, visible, FORMAT, ROWS, CHANNELS, dtype)
    rope_LR = plain_tile(rope_keys + page * stride_key_page + row * stride_key_row, visible, ROPE_DIM, ROPE, dtype)
    channel, turned = tl.arange(0, CHANNELS)[None, :], tl.arange(0, ROPE)[None, :]
    inside, wide = (place < count)[:, None], place.to(tl.int64)[:, None]
    tl.store(latent + wide * LATENT + channel, latent_LC, mask=inside & (channel < LATENT))
    tl.store(rope + wide * ROPE_DIM + turned, rope_LR, mask=inside & (turned < ROPE_DIM))


@triton.jit(do_not_specialize=["sequence"])
def attend_expanded(
    query, query_rope, keys, rope, values, query_starts, lengths, out, sequence, heads, count,
    stride_query_token, stride_query_head, stride_rope_token, stride_rope_head, scale,
    NOPE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One program: QUERIES tokens of one sequence in one head. keys [L, H, N], rope [L, R], values [L, H, V], out [T, H, V]."""
    start, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    head = tl.program_id(1)
    token = start + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    mine = token < end
    position = tl.load(lengths + sequence) - (end - start) + token - start
    wide = token.to(tl.int64)[:, None]
    nope, turned, channel = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    dtype: tl.constexpr = query.dtype.element_ty
    query_rows = query + wide * stride_query_token + head * stride_query_head + nope
    query_QN = tl.load(query_rows, mask=mine[:, None] & (nope < NOPE_DIM), other=0.0)
    rope_rows = query_rope + wide * stride_rope_token + head * stride_rope_head + turned
    rope_QR = tl.load(rope_rows, mask=mine[:, None] & (turned < ROPE_DIM), other=0.0)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    weight_sum = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, VALUE], tl.float32)
    reach = tl.minimum(tl.max(tl.where(mine, position, -1), 0) + 1, count)
    for first in range(0, reach, KEYS):
        place = first + tl.arange(0, KEYS)
        inside = (place < count)[:, None]
        row = place.to(tl.int64)[:, None]
        key_KN = tl.load(keys + (row * heads + head) * NOPE_DIM + nope, mask=inside & (nope < NOPE_DIM), other=0.0)
        key_KR = tl.load(rope + row * ROPE_DIM + turned, mask=inside & (turned < ROPE_DIM), other=0.0)
        score_QK = dot_add(query_QN, tl.trans(key_KN), dot(rope_QR, tl.trans(key_KR))) * (scale * LOG2_E)
        seen = (place[None, :] <= position[:, None]) & mine[:, None] & (place < count)[None, :]
        score_QK = tl.where(seen, score_QK, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score_QK, 1), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight_QK = tl.exp2(score_QK - base[:, None])
        decay = tl.exp2(largest - base)
        value_KV = tl.load(values + (row * heads + head) * VALUE_DIM + channel, mask=inside & (channel < VALUE_DIM), other=0.0)
        weight_sum = weight_sum * decay + tl.sum(weight_QK, 1)
        total = dot_add(narrow(weight_QK, dtype), value_KV, total * decay[:, None])
        largest = new_largest
    result = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    places = out + (wide * heads + head) * VALUE_DIM + channel
    tl.store(places, narrow(result, dtype), mask=mine[:, None] & (channel < VALUE_DIM))
