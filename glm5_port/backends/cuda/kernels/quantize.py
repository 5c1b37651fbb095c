"""Kernels of int4_quantize and int4_dequantize. Every number that decides a bit is exact (`glm5_port.quant.int4`).

Floor, by memory: a bfloat16 weight is 2 bytes, its code half a byte, the scale of 32 weights 2 bytes. So either direction moves
2.5625 bytes a weight; an expert of GLM-5 (37.7 million weights) is 97 MB, 20 us at 4.8 TB/s.

Shape legend: N groups of a program; P weights of a group, padded to a power of two; M words of a program.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import round_to_bfloat16
from glm5_port.quant import int4

SMALLEST_AMAX = tl.constexpr(int4.SMALLEST_AMAX)
LARGEST_AMAX = tl.constexpr(int4.LARGEST_AMAX)
ONE, NAN = tl.constexpr(127 << 7), tl.constexpr(0x7FC0)
SNAP = tl.constexpr(1.5 * 2.0**11)
"""Adding and subtracting this in float32 rounds to multiples of 2^-12."""
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)
"""Adding and subtracting this rounds to whole numbers, half to even."""


@triton.jit
def seventh_bits(amax):
    """Bit pattern of bf16(amax / 7), as `glm5_port.quant.int4.seventh_bits`."""
    mantissa = 128 + (amax & 127)
    lower = mantissa < 224
    rounded = ((tl.where(lower, 16 * mantissa, 8 * mantissa) + 7) * 4682) >> 16
    return amax - mantissa + rounded - tl.where(lower, 3 << 7, 2 << 7)


@triton.jit
def quantize_groups(
    weight, packed, scales, groups, weight_stride,
    GROUPS_OF_ROW: tl.constexpr, SIZE: tl.constexpr, SIGNED8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of groups. `scales` are bit patterns, int16."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_P)
    inside = (group < groups)[:, None] & (place < SIZE)[None, :]
    starts = (group // GROUPS_OF_ROW) * weight_stride + (group % GROUPS_OF_ROW) * SIZE
    loaded = tl.load(weight + starts[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
    bits_NP = round_to_bfloat16(loaded).to(tl.int16, bitcast=True).to(tl.int32)
    w_NP = (bits_NP << 16).to(tl.float32, bitcast=True)

    amax_N = tl.max(bits_NP & 0x7FFF, axis=1)
    if SIGNED8:
        positive_N = tl.max(bits_NP, axis=1) == amax_N
        ordinary_N = amax_N - (3 << 7) + tl.where(positive_N, -(1 << 15), 0)
    else:
        ordinary_N = seventh_bits(amax_N)
    holds_N = amax_N <= LARGEST_AMAX
    scale_bits_N = tl.where(amax_N < SMALLEST_AMAX, ONE, tl.where(holds_N, ordinary_N, NAN))
    reciprocal_N = tl.div_rn(1.0, (scale_bits_N << 16).to(tl.float32, bitcast=True))

    quotient_NP = (w_NP * reciprocal_N[:, None] + SNAP) - SNAP
    quotient_NP = (quotient_NP + TO_WHOLE) - TO_WHOLE
    code_NP = tl.where(holds_N[:, None] & inside, quotient_NP, 0.0).to(tl.int32)
    if SIGNED8:
        code_NP = tl.minimum(tl.maximum(code_NP, -8), 7)
    nibbles = tl.reshape(code_NP + 8, (BLOCK_N, BLOCK_P // 8, 8)) << (4 * tl.arange(0, 8))[None, None, :]
    word = tl.arange(0, BLOCK_P // 8)
    tl.store(
        packed + group[:, None] * (SIZE // 8) + word[None, :],
        tl.sum(nibbles, axis=2),
        mask=(group < groups)[:, None] & (word < SIZE // 8)[None, :],
    )
    tl.store(scales + group, scale_bits_N.to(tl.int16), mask=group < groups)


@triton.jit
def dequantize_words(packed, scales, values, words, WORDS_OF_GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Programs: blocks of words."""
    word = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = word < words
    codes = ((tl.load(packed + word, mask=inside, other=0)[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15) - 8
    scale = tl.load(scales + word // WORDS_OF_GROUP, mask=inside, other=0.0).to(tl.float32)
    products = codes.to(tl.float32) * scale[:, None]
    tl.store(values + word[:, None] * 8 + tl.arange(0, 8)[None, :], round_to_bfloat16(products), mask=inside[:, None])
