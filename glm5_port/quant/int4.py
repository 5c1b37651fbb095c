"""The INT4 quantiser: one definition for training, export and every backend.

Rule `amax7` (the default). For each group of consecutive weights of one output row:

    w     = bf16(master)              rounded half to even
    amax  = the largest |w| of the group
    s     = bf16(amax / 7)
    q     = w / s, the exact quotient rounded half to even; -7..7, and nothing is ever clipped
    value = bf16(q * s)               what training computes with and every engine that rounds its weights sees

Groups outside the ordinary range, decided on the bit pattern of amax:

    amax < 2^-110 (zeros, subnormals)         s = 1, all q = 0
    amax > 2^127, infinity or NaN             s = NaN, all q = 0: refused by `quantize` with the tensor's name and the index

Why the bits are the same everywhere. The scale is a function of fifteen bits, computed with integers. A quotient of two
bfloat16 numbers that is not exactly k + 1/2 is at least 2^-11 away from it (8-bit mantissas); so w * (1 / s), rounded to
the grid 2^-12, falls on the right side of every boundary, and onto it when it must, as long as its error is below 2^-14. No
rounding of the reciprocal, fused multiply-add or flush to zero comes near that. q * s has at most 11 bits, so bf16(q * s) is
one rounding of an exact product. No scale is subnormal.

Other rules:

    signed8   s = the extreme / -8 (exact), the extreme being the weight of largest magnitude, positive if both signs reach
              it; q in -8..7, clipped. Scales are negative where the extreme is positive. As llama.cpp's Q4_0 anchors it.
    mse       s = the one of 24 scales, from bf16(amax / 7) down in steps of two bfloat16 values, that has the least sum of
              squared errors in the group (the largest of equals); q in -7..7, clipped. Errors are summed as integers, so the
              choice does not depend on the order.

Only `amax7` is stable under export of what was imported: quantising bf16(q * s) again gives the same s and q.

Shape legend: ... any leading dimensions; I inputs of a row; g weights of a group; N groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.config_quantization import PER_CHANNEL as PER_CHANNEL
from glm5_port.errors import InputError, did_you_mean
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4

RULES = {"amax7": 1, "signed8": 1, "mse": 1}
"""Rule name -> its current version. A version changes whenever any bit of any result does."""
LEARNED = "learned"
"""The rule of scales that were trained: codes follow from weights and scales (`quantize_with_scales`), scales from no weight."""

SMALLEST_AMAX = (127 - 110) << 7
"""Bit pattern of 2^-110: groups below are all zeros."""
LARGEST_AMAX = (127 + 127) << 7
"""Bit pattern of 2^127: groups above cannot be held, because 7 * s may be infinite."""
_ONE, _NAN = 127 << 7, 0x7FC0
_SNAP = 1.5 * 2.0**11
"""Adding and subtracting this in float32 rounds to multiples of 2^-12."""
_BLOCK = 2**19
"""Weights handled at once on the CPU, where temporaries should stay in the cache. Devices take 16 times as many."""
_CANDIDATES, _CANDIDATE_STEP = 24, 2


@dataclass(frozen=True, slots=True)
class Int4Rule:
    """How weights become codes and scales; recorded with whatever was quantised.

    Attributes:
        name: "amax7", "signed8" or "mse"; "learned" is recorded with trained scales and quantises nothing.
        group_size: weights that share a scale, consecutive along the input dimension; `PER_CHANNEL` for a whole row.
        version: of the rule; this library computes the current ones.

    Raises:
        InputError: an unknown rule, another version, or a group size that is neither a positive multiple of 8 nor `PER_CHANNEL`.
    """

    name: str = "amax7"
    group_size: int = 32
    version: int = 1

    def __post_init__(self) -> None:
        versions = RULES | {LEARNED: 1}
        if self.name not in versions:
            raise InputError(f"INT4 rule {self.name!r} is unknown{did_you_mean(self.name, RULES)} (known: {', '.join(RULES)})")
        if self.version != versions[self.name]:
            raise InputError(
                f"INT4 rule {self.name} version {self.version} was asked for; this library computes version "
                f"{versions[self.name]}.\n"
                "  Codes and scales of another version can be read and carried, but not made again."
            )
        if self.group_size != PER_CHANNEL and (self.group_size < 1 or self.group_size % CODES_PER_WORD):
            raise InputError(
                f"INT4 group size {self.group_size}: a positive multiple of 8, or {PER_CHANNEL} for one scale per row"
            )

    def __str__(self) -> str:
        return f"{self.name} v{self.version}, " + (
            "per channel" if self.group_size == PER_CHANNEL else f"groups of {self.group_size}"
        )


AMAX7 = Int4Rule()


@dataclass(frozen=True, slots=True)
class Int4Tensor:
    """Quantised weights.

    Attributes:
        codes: [..., I] int8.
        scales: [..., I / g] bfloat16.
        rule: that made them.
    """

    codes: Tensor
    scales: Tensor
    rule: Int4Rule

    def packed(self) -> Tensor:
        """The codes in the canonical layout, [..., I / 8] int32."""
        return pack_int4(self.codes)

    def dequantize(self) -> Tensor:
        """bf16(q * s), [..., I]."""
        return dequantize(self.codes, self.scales)


def groups_of(width: int, group_size: int, *, name: str = "weight") -> tuple[int, int]:
    """(number of groups, weights of a group) of a row of `width` weights.

    Raises:
        InputError: the group size does not divide the width, or the width does not fill whole words of eight codes.
    """
    size = width if group_size == PER_CHANNEL else group_size
    if width < 1 or width % CODES_PER_WORD or size < 1 or width % size:
        raise InputError(
            f"{name}: rows of {width} weights cannot be quantised in groups of {size}.\n"
            f"  The row must be a multiple of the group and of {CODES_PER_WORD}. Choose another group size "
            f"({PER_CHANNEL} is one scale per row) or leave this tensor out."
        )
    return width // size, size


def quantize(weight: Tensor, rule: Int4Rule = AMAX7, *, name: str = "weight") -> Int4Tensor:
    """Quantises a weight.

    Args:
        weight: [..., I], float32, bfloat16 or float16 (float64 is rounded to float32 first). Any device. Gradients do not pass.
        rule: which rule, and its group size.
        name: of the tensor, for errors.

    Raises:
        InputError: a width that does not fit, or a weight that is NaN, infinite or above 2^127 in magnitude (with its index).
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = _empty_scales(weight, rule, name)
    for first, end, rows_codes, rows_scales in _quantize_blocks(weight, rule):
        codes.view(-1, codes.shape[-1])[first:end] = rows_codes
        scales.view(-1, scales.shape[-1])[first:end] = rows_scales
    refuse_bad_scales(scales, weight, rule, name)
    return Int4Tensor(codes, scales, rule)


def quantize_packed(weight: Tensor, rule: Int4Rule = AMAX7, *, name: str = "weight", check: bool = True) -> tuple[Tensor, Tensor]:
    """As `quantize`, with the codes packed as they are made: (packed [..., I / 8] int32, scales [..., I / g] bfloat16).

    With `check=False` nothing waits for the device: a bad group has the scale NaN and codes 0.
    """
    scales = _empty_scales(weight, rule, name)
    packed = torch.empty((*weight.shape[:-1], weight.shape[-1] // CODES_PER_WORD), dtype=torch.int32, device=weight.device)
    for first, end, rows_codes, rows_scales in _quantize_blocks(weight, rule):
        packed.view(-1, packed.shape[-1])[first:end] = pack_int4(rows_codes)
        scales.view(-1, scales.shape[-1])[first:end] = rows_scales
    if check:
        refuse_bad_scales(scales, weight, rule, name)
    return packed, scales


def quantize_with_scales(weight: Tensor, scales: Tensor, *, name: str = "weight") -> Tensor:
    """Codes for scales that are given: half-even(bf16(w) / s) clipped to -7..7, packed.

    Args:
        weight: [..., I], as `quantize` takes it.
        scales: [..., I / g] bfloat16, positive, from 2^-113 to 1.5 * 2^124; g follows from the shapes.
        name: of the tensor, for errors.

    Returns:
        [..., I / 8] int32.

    Raises:
        InputError: as `quantize`.
    """
    width, groups = weight.shape[-1], scales.shape[-1]
    rows, row_scales = weight.detach().reshape(-1, width), scales.reshape(-1, groups)
    packed = torch.empty((*weight.shape[:-1], width // CODES_PER_WORD), dtype=torch.int32, device=weight.device)
    checked = row_scales.clone()
    step = _block_rows(weight, width)
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        w_Ng = rows[part].to(torch.bfloat16).contiguous().view(-1, width // groups)
        codes_Ng = _codes(w_Ng.to(torch.float32), row_scales[part].flatten().to(torch.float32), -7, clip=True)
        packed.view(-1, packed.shape[-1])[part] = pack_int4(codes_Ng.view(-1, width))
        amax_N = w_Ng.view(torch.int16).bitwise_and(0x7FFF).amax(1)
        checked[part].masked_fill_((amax_N > LARGEST_AMAX).view(-1, groups), float("nan"))
    refuse_bad_scales(checked.view(scales.shape), weight, Int4Rule(group_size=width // groups), name)
    return packed


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """bf16(q * s).

    Args:
        codes: [..., I] int8.
        scales: [..., I / g] bfloat16 (anything that bfloat16 holds exactly); g follows from the shapes.
    """
    groups_of(codes.shape[-1], codes.shape[-1] // max(scales.shape[-1], 1), name="codes")
    products = codes.unflatten(-1, (scales.shape[-1], -1)).to(torch.float32) * scales.to(torch.float32).unsqueeze(-1)
    return products.to(torch.bfloat16).flatten(-2)


def dequantize_packed(packed: Tensor, scales: Tensor) -> Tensor:
    """As `dequantize`, from canonical words [..., I / 8] int32, a block of rows at a time: temporaries stay small."""
    width = packed.shape[-1] * CODES_PER_WORD
    values = torch.empty((*packed.shape[:-1], width), dtype=torch.bfloat16, device=packed.device)
    rows, row_scales, rows_packed = (
        values.view(-1, width),
        scales.reshape(-1, scales.shape[-1]),
        packed.reshape(-1, packed.shape[-1]),
    )
    step = _block_rows(packed, width)
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        rows[part] = dequantize(unpack_int4(rows_packed[part]), row_scales[part])
    return values


def refuse_bad_scales(scales: Tensor, weight: Tensor, rule: Int4Rule, name: str) -> None:
    """Raises InputError for the first weight that made its group's scale NaN. One wait for the device, on the scales alone."""
    if not scales.numel() or not math.isnan(scales.amax().item()):  # a largest number is NaN where one of them is
        return
    bad = scales.isnan()
    *row, group = (int(i) for i in bad.nonzero()[0])
    size = groups_of(weight.shape[-1], rule.group_size)[1]
    members = weight[tuple(row)][group * size : (group + 1) * size].to(torch.bfloat16)
    place = int((members.view(torch.int16).bitwise_and(0x7FFF) > LARGEST_AMAX).nonzero()[0])
    raise InputError(
        f"{name}: element {[*row, group * size + place]} is {members[place].item()} in bfloat16; {int(bad.sum())} of "
        f"{bad.numel()} groups hold such a value.\n"
        "  Weights must be finite, and 2^127 at most in magnitude. The checkpoint or the training step that made it is broken."
    )


def refuse_learned(rule: Int4Rule, name: str) -> None:
    """Raises InputError where a rule would have to make scales and cannot."""
    if rule.name == LEARNED:
        raise InputError(
            f"{name}: learned scales cannot be made from weights.\n"
            "  A trained model has them: glm5_port.quant.model_export.export_model writes it. Or choose another rule: "
            f"{', '.join(RULES)}"
        )


def _empty_scales(weight: Tensor, rule: Int4Rule, name: str) -> Tensor:
    if not weight.is_floating_point() or weight.element_size() == 1 or weight.dim() == 0:
        raise InputError(f"{name}: {tuple(weight.shape)} {weight.dtype}; takes rows of float32, bfloat16 or float16")
    refuse_learned(rule, name)
    groups, _ = groups_of(weight.shape[-1], rule.group_size, name=name)
    return torch.empty((*weight.shape[:-1], groups), dtype=torch.bfloat16, device=weight.device)


def _block_rows(tensor: Tensor, width: int) -> int:
    return max(1, (_BLOCK if tensor.is_cpu else 16 * _BLOCK) // width)


def _quantize_blocks(weight: Tensor, rule: Int4Rule) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first row, end, codes int8 [rows, I], scales bfloat16 [rows, I / g]) of consecutive blocks of rows."""
    groups, size = groups_of(weight.shape[-1], rule.group_size)
    rows = weight.detach().reshape(-1, weight.shape[-1])
    step = _block_rows(weight, rows.shape[1])
    for first in range(0, rows.shape[0], step):
        block = rows[first : first + step].to(torch.bfloat16).contiguous()
        codes, scales = _quantize_groups(block.view(-1, size), rule.name)
        yield first, first + block.shape[0], codes.view(block.shape), scales.view(-1, groups)


def _quantize_groups(w_Ng: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, g] and scales bfloat16 [N] of bfloat16 groups."""
    magnitudes_Ng = w_Ng.view(torch.int16).bitwise_and(0x7FFF)
    amax_N = magnitudes_Ng.amax(1).to(torch.int32)
    wide_Ng = w_Ng.to(torch.float32)
    if rule == "amax7":
        bits_N = seventh_bits(amax_N)
        low = -7
    elif rule == "signed8":
        positive_N = (w_Ng.view(torch.int16) == amax_N.to(torch.int16).unsqueeze(1)).any(1)
        bits_N = amax_N - (3 << 7) + torch.where(positive_N, -(1 << 15), 0)
        low = -8
    else:
        bits_N = _least_squares_bits(wide_Ng, amax_N)
        low = -7
    bits_N = torch.where(amax_N < SMALLEST_AMAX, _ONE, torch.where(amax_N <= LARGEST_AMAX, bits_N, _NAN))
    scales_N = bits_N.to(torch.int16).view(torch.bfloat16)
    return _codes(wide_Ng, scales_N.to(torch.float32), low, clip=rule != "amax7"), scales_N


def seventh_bits(amax_bits: Tensor) -> Tensor:
    """Bit pattern of bf16(amax / 7) from that of amax, by integers alone; int32 to int32, for amax from 2^-110 to 2^127.

    The mantissa m (128..255) becomes round(8 m / 7) below 224 and round(4 m / 7) from there, with the exponent three or two
    lower. A seventh is never a tie. The division by 14 is a multiplication: 4682 / 2^16 is exact enough up to 4095.
    """
    mantissa = 128 + (amax_bits & 127)
    lower = mantissa < 224
    doubled = torch.where(lower, 16 * mantissa, 8 * mantissa)
    rounded = ((doubled + 7) * 4682) >> 16
    return amax_bits - mantissa + rounded - torch.where(lower, 3 << 7, 2 << 7)


def _codes(wide_Ng: Tensor, scales_N: Tensor, low: int, *, clip: bool) -> Tensor:
    """half-even(w / s) as int8, 0 where s is NaN. See the module's text for why no rounding on the way can show."""
    quotients_Ng = wide_Ng * scales_N.reciprocal().unsqueeze(1)
    quotients_Ng = quotients_Ng.add_(_SNAP).sub_(_SNAP).round_().nan_to_num_(0.0)
    return (quotients_Ng.clamp_(low, 7) if clip else quotients_Ng).to(torch.int8)


def _least_squares_bits(wide_Ng: Tensor, amax_N: Tensor) -> Tensor:
    """Bit patterns of the scales with the least squared error among the candidates of rule `mse`.

    An error w - q s is one float32 rounding of an exact difference; in units of 2^-12 of the largest scale's power of two it
    becomes an integer, and integers sum alike in any order.
    """
    first_N = seventh_bits(amax_N.clamp(SMALLEST_AMAX, LARGEST_AMAX))
    unit_N = ((254 << 7) - (first_N & 0x7F80) + (12 << 7)).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    best_N, least_N = first_N, torch.full_like(first_N, torch.iinfo(torch.int64).max, dtype=torch.int64)
    for candidate in range(_CANDIDATES):
        bits_N = first_N - candidate * _CANDIDATE_STEP
        scales_N = bits_N.to(torch.int16).view(torch.bfloat16).to(torch.float32)
        codes_Ng = _codes(wide_Ng, scales_N, -7, clip=True).to(torch.float32)
        errors_Ng = (wide_Ng - codes_Ng * scales_N.unsqueeze(1)) * unit_N.unsqueeze(1)
        squares_N = errors_Ng.round_().to(torch.int64).square_().sum(1)
        best_N = torch.where(squares_N < least_N, bits_N, best_N)
        least_N = torch.minimum(squares_N, least_N)
    return best_N
