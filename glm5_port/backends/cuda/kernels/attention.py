"""Attention in the latent space: one key for all heads, whose first part is the value too.

Shape legend: T tokens; H heads; C latent; R rope; K keys a token; S splits. CHANNELS and ROPE are C and R rounded up to powers of
two; HEADS and KEYS are the heads and keys of one tile.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import dot, dot_add, from_e4m3, narrow
from glm5_port.backends.cuda.kernels.paging import locate, slots_of

LOG2_E = tl.constexpr(1.4426950408889634)
GROUP = tl.constexpr(128)
"""Latent channels that share a scale in the 656-byte rows."""


@triton.jit
def plain_tile(rows, visible, LATENT: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr):
    """[keys, CHANNELS] numbers in `dtype` of the rows that `rows` [keys] points to; zeros where not visible."""
    channel = tl.arange(0, CHANNELS)[None, :]
    stored = tl.load(rows[:, None] + channel, mask=visible[:, None] & (channel < LATENT), other=0.0)
    return stored if stored.dtype == dtype else narrow(stored.to(tl.float32), dtype)


@triton.jit
def quantised_tile(rows, scales, visible, FORMAT: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr):
    """As `plain_tile` of 656-byte rows, whose groups of 128 channels have a scale each: decoded in float32, rounded once."""
    group, channel = tl.arange(0, CHANNELS // GROUP)[None, :, None], tl.arange(0, GROUP)[None, None, :]
    seen = visible[:, None, None]
    stored = tl.load(rows[:, None, None] + group * GROUP + channel, mask=seen, other=0)
    scale = tl.load(scales[:, None, None] + group, mask=seen, other=0.0)
    number = from_e4m3(stored) if FORMAT == "fp8" else stored.to(tl.float32)
    return tl.reshape(narrow(number * scale, dtype), [KEYS, CHANNELS])


@triton.jit(do_not_specialize=["split_keys", "splits", "batch", "pages", "table_width", "stride_table"])
def attend(
    query, query_rope, values, scales, rope_keys, indices, table, query_starts, lengths, out, partial, partial_max, partial_sum,
    heads, keys, split_keys, splits, batch, pages, table_width,
    stride_query_token, stride_query_head, stride_rope_token, stride_rope_head, stride_indices, stride_table,
    stride_value_page, stride_value_row, stride_scale_page, stride_scale_row, stride_key_page, stride_key_row,
    scale,
    LATENT: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, SPARSE: tl.constexpr,
    SPLIT: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of one token over its keys, or over `split_keys` of them.

    SPARSE: keys are the positions in `indices` [T, K]; otherwise every position up to the token's own. SPLIT: writes what the
    softmax over this split alone gives: unnormalised sum [T, S, H, C], maximum and sum of weights [T, S, H], all float32.
    """
    head_blocks = tl.cdiv(heads, HEADS)
    token = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * HEADS + tl.arange(0, HEADS)
    channel, turned = tl.arange(0, CHANNELS), tl.arange(0, ROPE)
    sequence, position, _ = locate(token, query_starts, lengths, batch)
    wide_token = token.to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty

    head_mask = (head < heads)[:, None]
    query_rows = query + wide_token * stride_query_token + head[:, None] * stride_query_head
    query_HC = tl.load(query_rows + channel[None, :], mask=head_mask & (channel < LATENT)[None, :], other=0.0)
    rope_rows = query_rope + wide_token * stride_rope_token + head[:, None] * stride_rope_head
    rope_HR = tl.load(rope_rows + turned[None, :], mask=head_mask & (turned < ROPE_DIM)[None, :], other=0.0)

    reach = tl.minimum(position + 1, table_width * PAGE)  # positions below this may be seen
    limit = keys if SPARSE else reach
    begin = tl.program_id(1) * split_keys
    end = tl.minimum(begin + split_keys, limit)
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, CHANNELS], tl.float32)
    for first in range(begin, end, KEYS):
        place = first + tl.arange(0, KEYS)
        if SPARSE:
            index = tl.load(indices + wide_token * stride_indices + place, mask=place < end, other=-1)
        else:
            index = tl.where(place < end, place, -1)
        page, row, visible = slots_of(index, (index >= 0) & (index < reach), table, stride_table, sequence, pages, PAGE)
        rows = values + page * stride_value_page + row * stride_value_row
        if FORMAT == "plain":
            latent_KC = plain_tile(rows, visible, LATENT, CHANNELS, dtype)
        else:
            row_scales = scales + page * stride_scale_page + row * stride_scale_row
            latent_KC = quantised_tile(rows, row_scales, visible, FORMAT, KEYS, CHANNELS, dtype)
        key_rows = rope_keys + (page * stride_key_page + row * stride_key_row)[:, None] + turned[None, :]
        key_KR = tl.load(key_rows, mask=visible[:, None] & (turned < ROPE_DIM)[None, :], other=0.0)
        if key_KR.dtype != dtype:
            key_KR = narrow(key_KR.to(tl.float32), dtype)
        score_HK = dot_add(query_HC, tl.trans(latent_KC), dot(rope_HR, tl.trans(key_KR))) * (scale * LOG2_E)
        score_HK = tl.where(visible[None, :], score_HK, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score_HK, 1), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen yet: no infinity minus infinity
        weight_HK = tl.exp2(score_HK - base[:, None])
        decay = tl.exp2(largest - base)
        weight_sum = weight_sum * decay + tl.sum(weight_HK, 1)
        total = dot_add(narrow(weight_HK, dtype), latent_KC, total * decay[:, None])
        largest = new_largest

    mask = head_mask & (channel < LATENT)[None, :]
    if SPLIT:
        slot = (wide_token * splits + tl.program_id(1)) * heads + head
        tl.store(partial + slot[:, None] * LATENT + channel[None, :], total, mask=mask)
        tl.store(partial_max + slot, largest, mask=head < heads)
        tl.store(partial_sum + slot, weight_sum, mask=head < heads)
    else:
        result = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
        places = out + (wide_token * heads + head[:, None]) * LATENT + channel[None, :]
        tl.store(places, narrow(result, dtype), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def combine(
    partial, partial_max, partial_sum, out, heads, splits, LATENT: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """One program: one head of one token, its splits added in their order."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    channel, number = tl.arange(0, CHANNELS), tl.arange(0, SPLITS)
    slots = (token * splits + number) * heads + head
    maxima = tl.load(partial_max + slots, mask=number < splits, other=float("-inf"))
    largest = tl.max(maxima, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_sum = tl.zeros([], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for split in range(splits):
        slot = (token * splits + split) * heads + head
        decay = tl.exp2(tl.load(partial_max + slot) - base)
        weight_sum += tl.load(partial_sum + slot) * decay
        total += tl.load(partial + slot * LATENT + channel, mask=channel < LATENT, other=0.0) * decay
    result = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(out + row * LATENT + channel, narrow(result, out.dtype.element_ty), mask=channel < LATENT)
