"""Rotation of pairs of channels. Shape legend: T tokens; H heads; D channels of a head; P rotated pairs."""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import narrow


@triton.jit
def rotated_row(x, cos, sin, channel, start, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, mask):
    """The rotated numbers of rows in float32: each channel is loaded with its partner; those outside the pairs pass through.

    x and mask span [..., D] with `channel` [D] last; cos and sin point to the angles of the token.
    """
    place = channel - start
    turns = (place >= 0) & (place < 2 * PAIRS)
    if INTERLEAVED:
        pair, is_second = place // 2, place % 2 == 1
        partner = tl.where(is_second, -1, 1)
    else:
        pair, is_second = place % PAIRS, place >= PAIRS
        partner = tl.where(is_second, -PAIRS, PAIRS)
    own = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=mask & turns, other=0.0).to(tl.float32)
    angle_cos = tl.load(cos + pair, mask=turns, other=1.0).to(tl.float32)
    angle_sin = tl.load(sin + pair, mask=turns, other=0.0).to(tl.float32)
    return tl.where(turns, own * angle_cos + other * tl.where(is_second, angle_sin, -angle_sin), own)


@triton.jit
def rotate_heads(
    x, cos, sin, y, stride_token, stride_head, heads, start,
    DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of one token. x is strided by token and head; cos, sin [T, P] and y [T, H, D] are dense."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, CHANNELS)
    mask = (head < heads)[:, None] & (channel < DIM)[None, :]
    rows = x + token * stride_token + head[:, None] * stride_head + channel[None, :]
    turned = rotated_row(rows, cos + token * PAIRS, sin + token * PAIRS, channel[None, :], start, PAIRS, INTERLEAVED, mask)
    places = y + (token * heads + head[:, None]) * DIM + channel[None, :]
    tl.store(places, narrow(turned, y.dtype.element_ty), mask=mask)
