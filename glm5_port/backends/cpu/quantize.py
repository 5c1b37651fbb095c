"""Native int4_quantize, int4_quantize_measured and int4_dequantize.

Shape legend: R rows; I inputs of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import kernels, native, rows_of, threads
from glm5_port.operators.int4 import check_int4, int4_dequantize, int4_quantize
from glm5_port.operators.int4_measured import STATISTICS, int4_quantize_measured
from glm5_port.quant.int4 import groups_of
from glm5_port.quant.packing import CODES_PER_WORD


def _not_supported(*, rule: str, **_: Any) -> list[str]:
    return [] if rule == "amax7" else [f"computes rule amax7, not {rule}"]


def _quantize(isa: int, weight: Tensor, group_size: int, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, size = groups_of(weight.shape[-1], group_size)
    rows_RI = rows_of(weight.detach())
    packed = torch.empty((*weight.shape[:-1], weight.shape[-1] // CODES_PER_WORD), dtype=torch.int32)
    scales = torch.empty((*weight.shape[:-1], groups), dtype=torch.bfloat16)
    kernels().int4_quantize(
        isa,
        rows_RI.data_ptr(),
        weight.dtype == torch.bfloat16,
        *rows_RI.shape,
        rows_RI.stride(0),
        size,
        packed.data_ptr(),
        scales.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        threads(),
    )
    return packed, scales


@native(int4_quantize, not_supported=_not_supported)
def int4_quantize_native(isa: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor]:
        return _quantize(isa, weight, group_size, None)

    return run


@native(int4_quantize_measured, not_supported=_not_supported)
def int4_quantize_measured_native(isa: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor, Tensor]:
        statistics = torch.empty((*weight.shape[:-1], len(STATISTICS)), dtype=torch.float32)
        return *_quantize(isa, weight, group_size, statistics), statistics

    return run


@native(int4_dequantize)
def int4_dequantize_native(isa: int) -> Callable[..., Tensor]:
    def run(packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
        check_int4("int4_dequantize", packed, scales, group_size)
        width = packed.shape[-1] * CODES_PER_WORD
        values = torch.empty((*packed.shape[:-1], width), dtype=torch.bfloat16)
        rows_RW, scales_RG = rows_of(packed), rows_of(scales.to(torch.bfloat16))
        kernels().int4_dequantize(
            isa,
            rows_RW.data_ptr(),
            rows_RW.stride(0),
            scales_RG.data_ptr(),
            scales_RG.stride(0),
            rows_RW.shape[0],
            width,
            groups_of(width, group_size)[1],
            values.data_ptr(),
            threads(),
        )
        return values

    return run
