"""Triton int4_quantize, int4_quantize_measured and int4_dequantize.

Shape legend: R rows; I inputs of a row; ... any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import kernels, launch, power_of_two, rows_of, triton
from glm5_port.operators.int4 import check_int4, int4_dequantize, int4_quantize
from glm5_port.operators.int4_measured import STATISTICS, int4_quantize_measured
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, groups_of
from glm5_port.quant.packing import CODES_PER_WORD

RULES = ("amax7", "signed8")
LARGEST_GROUP = 2**14
"""A group is held in registers."""
WEIGHTS_OF_PROGRAM = 4096
MEASURED_TOGETHER = 2048
"""Weights of a row that are quantised and measured at a time: less than above, for there is more to keep of each."""
WORDS_OF_PROGRAM = 512


def _quantize_not_supported(*, width: int, group_size: int, rule: str, **_: Any) -> list[str]:
    reasons = [] if rule in RULES else [f"computes the rules {' and '.join(RULES)}, not {rule}"]
    size = width if group_size == PER_CHANNEL else group_size
    if size > LARGEST_GROUP:
        reasons.append(f"takes groups of at most {LARGEST_GROUP} weights, not {size}")
    return reasons + _whole_words(size)


def _dequantize_not_supported(*, width: int, group_size: int, **_: Any) -> list[str]:
    return _whole_words(width if group_size == PER_CHANNEL else group_size)


def _whole_words(size: int) -> list[str]:
    return [f"takes groups of whole words ({CODES_PER_WORD} weights), not of {size}"] if size % CODES_PER_WORD else []


def _empty(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Words and scales of a weight, to be written."""
    packed = torch.empty((*weight.shape[:-1], weight.shape[-1] // CODES_PER_WORD), dtype=torch.int32, device=weight.device)
    return packed, torch.empty((*weight.shape[:-1], groups), dtype=torch.bfloat16, device=weight.device)


def _shape(size: int, weights: int) -> dict[str, int]:
    """Groups that are held in registers at a time, and the weights of each, about `weights` together."""
    padded = power_of_two(size, least=CODES_PER_WORD)
    return {
        "BLOCK_N": max(1, weights // padded),
        "BLOCK_P": padded,
        "num_warps": 4 if padded <= WEIGHTS_OF_PROGRAM else 8,
    }


@triton(int4_quantize, not_supported=_quantize_not_supported)
def int4_quantize_triton(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor]:
    """One program for some groups."""
    signed8 = Int4Rule(rule, group_size).name == "signed8"
    groups, size = groups_of(weight.shape[-1], group_size)
    rows_RI = rows_of(weight)
    packed, scales = _empty(weight, groups)
    shape = _shape(size, WEIGHTS_OF_PROGRAM)
    launch(
        kernels("quantize").quantize_groups,
        (-(-scales.numel() // shape["BLOCK_N"]),),
        rows_RI, packed, scales.view(torch.int16), scales.numel(), rows_RI.stride(0),
        GROUPS_OF_ROW=groups, SIZE=size, SIGNED8=signed8, **shape,
    )  # fmt: skip
    return packed, scales


@triton(int4_quantize_measured, not_supported=_quantize_not_supported)
def int4_quantize_measured_triton(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """One program for a row, some of its groups at a time: what is measured is added up in their order."""
    signed8 = Int4Rule(rule, group_size).name == "signed8"
    groups, size = groups_of(weight.shape[-1], group_size)
    rows_RI = rows_of(weight)
    packed, scales = _empty(weight, groups)
    statistics = torch.empty((*weight.shape[:-1], len(STATISTICS)), dtype=torch.float32, device=weight.device)
    launch(
        kernels("quantize").quantize_and_measure_rows,
        (rows_RI.shape[0],),
        rows_RI, packed, scales.view(torch.int16), statistics, rows_RI.stride(0),
        GROUPS_OF_ROW=groups, SIZE=size, SIGNED8=signed8, **_shape(size, min(MEASURED_TOGETHER, power_of_two(weight.shape[-1]))),
    )  # fmt: skip
    return packed, scales, statistics


@triton(int4_dequantize, not_supported=_dequantize_not_supported)
def int4_dequantize_triton(packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    check_int4("int4_dequantize", packed, scales, group_size)
    width = packed.shape[-1] * CODES_PER_WORD
    values = torch.empty((*packed.shape[:-1], width), dtype=torch.bfloat16, device=packed.device)
    launch(
        kernels("quantize").dequantize_words,
        (-(-packed.numel() // WORDS_OF_PROGRAM),),
        packed.contiguous(),
        scales.detach().to(torch.bfloat16).contiguous(),
        values,
        packed.numel(),
        WORDS_OF_GROUP=groups_of(width, group_size)[1] // CODES_PER_WORD,
        BLOCK_M=WORDS_OF_PROGRAM,
        num_warps=4,
    )
    return values
