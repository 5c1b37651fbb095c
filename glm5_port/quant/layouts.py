"""Codes and scales in the layouts of other formats, by moving bits alone: no value is rounded on the way.

    GPTQ    qweight int32 [I/8, O], packed along the inputs; qzeros int32 [G, O/8]; scales float16 [G, O]; g_idx int32 [I]
    AWQ     qweight int32 [I, O/8], packed along the outputs in the order 0 2 4 6 1 3 5 7; qzeros likewise [G, O/8]; scales
            float16 [G, O]
    Q4_0    (GGUF) blocks of 32 inputs, 18 bytes: a float16 scale, then byte j with element j low and element j + 16 high

GPTQ, AWQ and Q4_0 store q + 8. The first two have a zero for each group and output; of symmetric codes it is 8, which version 1
of GPTQ stores as 7.

Shape legend: O outputs; I inputs; g inputs of a group; G = I / g groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.quant.int4 import groups_of
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, out of eight, that each nibble of an AWQ word holds, lowest bits first."""

Q4_0_BLOCK, Q4_0_BYTES = 32, 18

_SEVENS, _EIGHTS = 0x77777777, 0x88888888 - 2**32
"""int32 words of eight codes 7 and of eight codes 8."""


def exact_float16(scales: Tensor, *, name: str) -> Tensor:
    """Scales as float16, when every one of them is a float16 number.

    bfloat16 scales of magnitude 2^-17 to 65504 are; smaller ones lose bits of their mantissa.

    Raises:
        InputError: the tensor's name, how many scales do not fit, and the first of them.
    """
    narrow = scales.to(torch.float16)
    wrong = narrow.to(torch.float32) != scales.to(torch.float32)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise InputError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} scales are no float16 numbers, first {list(place)}: "
            f"{scales[place].item():.6g}.\n"
            "  This format stores float16 scales, and rounding them would change the weights. Keep the tensor in "
            "compressed-tensors, or leave it out."
        )
    return narrow


def to_gptq(codes: Tensor, scales: Tensor, *, name: str, version: int = 1) -> dict[str, Tensor]:
    """The tensors of a symmetric GPTQ weight.

    Args:
        codes: [O, I] int8.
        scales: [O, G].
        name: of the weight, for errors.
        version: 1 stores zeros less one (`gptq`), 2 as they are (`gptq_v2`).

    Raises:
        InputError: O or I is not a multiple of 8, another version, or a scale that float16 cannot hold.
    """
    outputs, inputs, groups = _check(codes, scales, name)
    zero = _gptq_zero(version, name)
    return {
        "qweight": pack_int4(codes).t().contiguous(),
        "qzeros": torch.full((groups, outputs // CODES_PER_WORD), zero, dtype=torch.int32, device=codes.device),
        "scales": exact_float16(scales, name=name).t().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32, device=codes.device) // (inputs // groups),
    }


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, name: str, version: int = 1
) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scales [O, G] as stored) of a symmetric GPTQ weight.

    Raises:
        InputError: zeros that are not 8, or groups that are not of consecutive inputs (activation order).
    """
    groups, inputs = scales.shape[0], qweight.shape[0] * CODES_PER_WORD
    if not (qzeros == _gptq_zero(version, name)).all():
        raise InputError(f"{name}: its zeros are not all 8. Asymmetric weights cannot be carried as symmetric INT4 without loss.")
    if g_idx is not None and not torch.equal(g_idx.long().cpu(), torch.arange(inputs) // (inputs // groups)):
        raise InputError(f"{name}: its groups are in activation order (g_idx), which no canonical layout can say.")
    return unpack_int4(qweight.t().contiguous()), scales.t().contiguous()


def to_awq(codes: Tensor, scales: Tensor, *, name: str) -> dict[str, Tensor]:
    """The tensors of a symmetric AWQ (GEMM) weight. Arguments and errors as `to_gptq`."""
    outputs, _, groups = _check(codes, scales, name)
    ordered = codes.t().unflatten(1, (-1, CODES_PER_WORD))[..., list(AWQ_ORDER)].flatten(1)
    return {
        "qweight": pack_int4(ordered),
        "qzeros": torch.full((groups, outputs // CODES_PER_WORD), _EIGHTS, dtype=torch.int32, device=codes.device),
        "scales": exact_float16(scales, name=name).t().contiguous(),
    }


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """(codes int8 [O, I], scales [O, G] as stored) of a symmetric AWQ weight.

    Raises:
        InputError: zeros that are not 8.
    """
    if not (qzeros == _EIGHTS).all():
        raise InputError(f"{name}: its zeros are not all 8. Asymmetric weights cannot be carried as symmetric INT4 without loss.")
    places = sorted(range(CODES_PER_WORD), key=AWQ_ORDER.__getitem__)
    columns = unpack_int4(qweight).unflatten(1, (-1, CODES_PER_WORD))[..., places].flatten(1)
    return columns.t().contiguous(), scales.t().contiguous()


def to_q4_0(codes: Tensor, scales: Tensor, *, name: str) -> Tensor:
    """GGUF Q4_0 rows, uint8 [..., I / 32 * 18].

    Args:
        codes: [..., I] int8; I is a multiple of 32.
        scales: [..., G] of groups of whole blocks of 32, so that blocks may share a scale.
        name: of the weight, for errors.

    Raises:
        InputError: groups that are not of whole blocks, or a scale that float16 cannot hold.
    """
    _, size = groups_of(codes.shape[-1], codes.shape[-1] // scales.shape[-1], name=name)
    if size % Q4_0_BLOCK:
        raise InputError(f"{name}: Q4_0 has one scale for 32 weights; groups of {size} are not of whole blocks")
    repeated = exact_float16(scales, name=name).repeat_interleave(size // Q4_0_BLOCK, dim=-1)
    low, high = (codes + 8).view(torch.uint8).unflatten(-1, (-1, 2, Q4_0_BLOCK // 2)).unbind(-2)
    return torch.cat((repeated.unsqueeze(-1).view(torch.uint8), low | (high << 4)), dim=-1).flatten(-2)


def from_q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., I], scales float16 [..., I / 32]) of Q4_0 rows."""
    blocks = blocks.unflatten(-1, (-1, Q4_0_BYTES))
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    halves = blocks[..., 2:]
    codes = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(-2)
    return codes.view(torch.int8) - 8, scales


def _gptq_zero(version: int, name: str) -> int:
    """The word of eight zeros 8 as a version of GPTQ stores it."""
    if version not in (1, 2):
        raise InputError(f"{name}: GPTQ version {version} is unknown; 1 and 2 are known")
    return _SEVENS if version == 1 else _EIGHTS


def _check(codes: Tensor, scales: Tensor, name: str) -> tuple[int, int, int]:
    """(O, I, G) of a matrix that fits the formats that pack along either dimension."""
    if codes.dim() != 2 or scales.dim() != 2 or codes.shape[0] != scales.shape[0] or codes.shape[0] % CODES_PER_WORD:
        raise InputError(
            f"{name}: codes {tuple(codes.shape)} with scales {tuple(scales.shape)}; takes one matrix with a multiple of 8 "
            "outputs, and its scales"
        )
    groups_of(codes.shape[1], codes.shape[1] // scales.shape[1], name=name)
    return codes.shape[0], codes.shape[1], scales.shape[1]
