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
def quantized(loaded_NP, inside_NP, SIGNED8: tl.constexpr):
    """(bfloat16 weights as float32 [N, P], bits of the largest one [N], bits of the scale [N], codes [N, P]) of groups, whose
    weights are zero where not inside."""
    bits_NP = round_to_bfloat16(loaded_NP.to(tl.float32)).to(tl.int16, bitcast=True).to(tl.int32)
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
    code_NP = tl.where(holds_N[:, None] & inside_NP, quotient_NP, 0.0).to(tl.int32)
    if SIGNED8:
        code_NP = tl.minimum(tl.maximum(code_NP, -8), 7)
    return w_NP, amax_N, scale_bits_N, code_NP


@triton.jit
def store_groups(
    packed, scales, group, there, code_NP, scale_bits_N, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Words and scales (bit patterns, int16) of the groups that are there."""
    nibbles = tl.reshape(code_NP + 8, (BLOCK_N, BLOCK_P // 8, 8)) << (4 * tl.arange(0, 8))[None, None, :]
    word = tl.arange(0, BLOCK_P // 8)
    places = packed + group[:, None] * (SIZE // 8) + word[None, :]
    tl.store(places, tl.sum(nibbles, axis=2), mask=there[:, None] & (word < SIZE // 8)[None, :])
    tl.store(scales + group, scale_bits_N.to(tl.int16), mask=there)


@triton.jit
def quantize_groups(
    weight, packed, scales, groups, weight_stride,
    GROUPS_OF_ROW: tl.constexpr, SIZE: tl.constexpr, SIGNED8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of groups."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_P)
    inside = (group < groups)[:, None] & (place < SIZE)[None, :]
    starts = (group // GROUPS_OF_ROW) * weight_stride + (group % GROUPS_OF_ROW) * SIZE
    loaded = tl.load(weight + starts[:, None] + place[None, :], mask=inside, other=0.0)
    _, _, scale_bits_N, code_NP = quantized(loaded, inside, SIGNED8)
    store_groups(packed, scales, group, group < groups, code_NP, scale_bits_N, SIZE, BLOCK_N, BLOCK_P)


@triton.jit
def quantize_and_measure_rows(
    weight, packed, scales, statistics, weight_stride,
    GROUPS_OF_ROW: tl.constexpr, SIZE: tl.constexpr, SIGNED8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs: rows. statistics: [rows, 7], in the order of `glm5_port.operators.int4_measured.STATISTICS`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_P)
    at_limit = tl.zeros((BLOCK_N,), tl.int32)
    zero = tl.zeros((BLOCK_N,), tl.int32)
    tiny = tl.zeros((BLOCK_N,), tl.int32)
    unsafe = tl.zeros((BLOCK_N,), tl.int32)
    bad = tl.zeros((BLOCK_N,), tl.int32)
    error_sum = tl.zeros((BLOCK_N,), tl.float32)
    magnitude_sum = tl.zeros((BLOCK_N,), tl.float32)
    largest_error = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, GROUPS_OF_ROW, BLOCK_N):
        number = first + tl.arange(0, BLOCK_N)
        there = number < GROUPS_OF_ROW
        inside = there[:, None] & (place < SIZE)[None, :]
        source = weight + row * weight_stride + number[:, None] * SIZE + place[None, :]
        w_NP, amax_N, scale_bits_N, code_NP = quantized(tl.load(source, mask=inside, other=0.0), inside, SIGNED8)
        store_groups(packed, scales, row * GROUPS_OF_ROW + number, there, code_NP, scale_bits_N, SIZE, BLOCK_N, BLOCK_P)

        scale_N = (scale_bits_N << 16).to(tl.float32, bitcast=True)
        value_NP = round_to_bfloat16(code_NP.to(tl.float32) * scale_N[:, None]).to(tl.float32)
        error_NP = tl.abs(w_NP - value_NP)
        amax_value_N = (amax_N << 16).to(tl.float32, bitcast=True)
        relative_N = tl.div_rn(tl.max(error_NP, axis=1), amax_value_N)
        ordinary_N = (amax_N >= SMALLEST_AMAX) & (amax_N <= LARGEST_AMAX)
        at_limit += tl.sum((tl.abs(code_NP) >= 7).to(tl.int32), axis=1)
        zero += (there & (amax_N == 0)).to(tl.int32)
        tiny += ((amax_N > 0) & (amax_N < SMALLEST_AMAX)).to(tl.int32)
        unsafe += (scale_N.to(tl.float16).to(tl.float32) != scale_N).to(tl.int32)
        bad += (amax_N > LARGEST_AMAX).to(tl.int32)
        error_sum += tl.sum(error_NP, axis=1)
        magnitude_sum += tl.sum(tl.abs(w_NP), axis=1)
        largest_error = tl.maximum(largest_error, tl.where(ordinary_N, relative_N, 0.0))
    means_nothing = tl.sum(bad, axis=0) > 0
    mine = statistics + row * 7
    tl.store(mine, tl.where(means_nothing, 0.0, tl.sum(at_limit, axis=0).to(tl.float32)))
    tl.store(mine + 1, tl.where(means_nothing, 0.0, tl.sum(zero, axis=0).to(tl.float32)))
    tl.store(mine + 2, tl.where(means_nothing, 0.0, tl.sum(tiny, axis=0).to(tl.float32)))
    tl.store(mine + 3, tl.where(means_nothing, 0.0, tl.sum(unsafe, axis=0).to(tl.float32)))
    tl.store(mine + 4, tl.where(means_nothing, 0.0, tl.sum(error_sum, axis=0)))
    tl.store(mine + 5, tl.where(means_nothing, 0.0, tl.sum(magnitude_sum, axis=0)))
    tl.store(mine + 6, tl.where(means_nothing, 0.0, tl.max(largest_error, axis=0)))


@triton.jit
def dequantize_words(packed, scales, values, words, WORDS_OF_GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Programs: blocks of words."""
    word = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = word < words
    codes = ((tl.load(packed + word, mask=inside, other=0)[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15) - 8
    scale = tl.load(scales + word // WORDS_OF_GROUP, mask=inside, other=0.0).to(tl.float32)
    products = codes.to(tl.float32) * scale[:, None]
    tl.store(values + word[:, None] * 8 + tl.arange(0, 8)[None, :], round_to_bfloat16(products), mask=inside[:, None])
