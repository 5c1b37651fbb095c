"""Rows into the paged cache, normalised and rotated on the way where a prologue asks for it.

The row formats are those of `glm5_port.operators.cache_layouts`, byte by byte; all arithmetic on them is float32.

Shape legend: T tokens; C latent; R rope; X index key. CHANNELS and ROPE are rounded up to powers of two.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import narrow, power_of_two_scale, to_e4m3
from glm5_port.backends.cuda.kernels.rope import rotated_row

GROUP = tl.constexpr(128)
SMALLEST_AMAX = tl.constexpr(1e-4)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 that this is added to and taken from is rounded to an integer, ties to even."""


@triton.jit
def group_amax(x):
    """Largest magnitude along the last dimension (kept), at least 1e-4; NaN stays NaN."""
    axis: tl.constexpr = len(x.shape) - 1
    largest = tl.maximum(tl.max(tl.abs(x), axis, keep_dims=True), SMALLEST_AMAX)
    return tl.where(tl.max((x != x).to(tl.int32), axis, keep_dims=True) > 0, float("nan"), largest)


@triton.jit
def to_int8(x):
    """float32 to int8, to nearest, ties to even, saturating at 127; NaN becomes 0."""
    limited = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
    return ((limited + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def place_of(slots, token, pages, PAGE: tl.constexpr, SLOTTED: tl.constexpr):
    """(page, row, written) of a token: its slot, or its own number where rows are not scattered."""
    slot = tl.load(slots + token).to(tl.int64) if SLOTTED else token.to(tl.int64)
    return slot // PAGE, slot % PAGE, (slot >= 0) & (slot < pages * PAGE)


@triton.jit
def store_latent(
    rows, rope_rows, weight, cos, sin, slots, values, scales, rope_keys,
    stride_row, stride_rope, eps, pages,
    stride_value_page, stride_value_row, stride_scale_page, stride_scale_row, stride_key_page, stride_key_row,
    LATENT: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, PROLOGUE: tl.constexpr,
    INTERLEAVED: tl.constexpr, SLOTTED: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program: one token. PROLOGUE: rms_norm of the latent and rotation of the rope key, each rounded to the rows' dtype.

    The latent is held as [GROUPS, WIDTH]: the groups of 128 of the quantised formats, or one group as wide as the row.
    """
    token = tl.program_id(0).to(tl.int64)
    page, row, written = place_of(slots, token, pages, PAGE, SLOTTED)
    group, turned = tl.arange(0, GROUPS)[:, None], tl.arange(0, ROPE)
    channel = group * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = channel < LATENT
    latent = tl.load(rows + token * stride_row + channel, mask=inside, other=0.0).to(tl.float32)
    rope = rope_rows + token * stride_rope + turned
    if PROLOGUE:
        mean_square = tl.sum(tl.sum(latent * latent, 1), 0) / LATENT
        scaled = latent * tl.rsqrt(mean_square + eps) * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        latent = narrow(scaled, rows.dtype.element_ty).to(tl.float32)
        angles = token * (ROPE_DIM // 2)
        key = rotated_row(rope, cos + angles, sin + angles, turned, 0, ROPE_DIM // 2, INTERLEAVED, turned < ROPE_DIM)
        key = narrow(key, rope_rows.dtype.element_ty).to(tl.float32)
    else:
        key = tl.load(rope, mask=turned < ROPE_DIM, other=0.0).to(tl.float32)
    key_places = rope_keys + page * stride_key_page + row * stride_key_row + turned
    tl.store(key_places, narrow(key, rope_keys.dtype.element_ty), mask=written & (turned < ROPE_DIM))
    places = values + page * stride_value_page + row * stride_value_row + channel
    if FORMAT == "plain":
        tl.store(places, narrow(latent, values.dtype.element_ty), mask=written & inside)
    else:
        scale = tl.div_rn(group_amax(latent), 448.0 if FORMAT == "fp8" else 127.0)
        quotient = tl.div_rn(latent, tl.broadcast_to(scale, [GROUPS, WIDTH]))
        tl.store(places, to_e4m3(quotient) if FORMAT == "fp8" else to_int8(quotient), mask=written & inside)
        tl.store(scales + page * stride_scale_page + row * stride_scale_row + group, scale, mask=written & (group < GROUPS))


@triton.jit
def store_index(
    rows, weight, bias, cos, sin, slots, values, scales, stride_row, eps, pages,
    stride_value_page, stride_value_row, stride_scale_page, stride_scale_row,
    DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, PROLOGUE: tl.constexpr,
    INTERLEAVED: tl.constexpr, SLOTTED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one token's index key. PROLOGUE: LayerNorm, rounded, then rotation of the first ROPE_DIM channels, rounded."""
    token = tl.program_id(0).to(tl.int64)
    page, row, written = place_of(slots, token, pages, PAGE, SLOTTED)
    channel = tl.arange(0, CHANNELS)
    inside = channel < DIM
    dtype: tl.constexpr = rows.dtype.element_ty
    source = rows + token * stride_row
    key = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    if PROLOGUE:
        pairs: tl.constexpr = ROPE_DIM // 2
        mean = tl.sum(key, 0) / DIM
        centred = tl.where(inside, key - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
        turns = channel < ROPE_DIM
        if INTERLEAVED:
            pair, is_second = channel // 2, channel % 2 == 1
            partner = channel + tl.where(is_second, -1, 1)
        else:
            pair, is_second = channel % pairs, channel >= pairs
            partner = channel + tl.where(is_second, -pairs, pairs)
        own = normed(key, mean, scale, weight, bias, channel, inside, dtype)
        paired = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
        other = normed(paired, mean, scale, weight, bias, partner, turns, dtype)
        angle_cos = tl.load(cos + token * pairs + pair, mask=turns, other=1.0).to(tl.float32)
        angle_sin = tl.load(sin + token * pairs + pair, mask=turns, other=0.0).to(tl.float32)
        rotated = own * angle_cos + other * tl.where(is_second, angle_sin, -angle_sin)
        key = narrow(tl.where(turns, rotated, own), dtype).to(tl.float32)
    places = values + page * stride_value_page + row * stride_value_row + channel
    if FORMAT == "plain":
        tl.store(places, narrow(key, values.dtype.element_ty), mask=written & inside)
    else:
        amax = group_amax(key)
        stored = power_of_two_scale(amax) if FORMAT == "fp8" else tl.div_rn(amax, 127.0).to(tl.float16).to(tl.float32)
        quotient = tl.div_rn(key, tl.broadcast_to(stored, [CHANNELS]))
        tl.store(places, to_e4m3(quotient) if FORMAT == "fp8" else to_int8(quotient), mask=written & inside)
        first = tl.arange(0, 1)
        place = scales + page * stride_scale_page + row * stride_scale_row + first
        tl.store(place, stored.to(scales.dtype.element_ty), mask=written & (first == 0))


@triton.jit
def normed(x, mean, scale, weight, bias, channel, mask, dtype: tl.constexpr):
    """LayerNorm of single numbers of a row, rounded to `dtype` and read back as float32."""
    factor = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    return narrow((x - mean) * scale * factor + shift, dtype).to(tl.float32)
