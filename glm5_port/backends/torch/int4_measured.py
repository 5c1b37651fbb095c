"""Portable int4_quantize_measured, a block of rows at a time.

Shape legend: O rows; I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.operators.int4_measured import STATISTICS, int4_quantize_measured
from glm5_port.quant.int4 import Int4Rule, quantize_packed
from glm5_port.quant.statistics import measure_rows
from glm5_port.registry import PORTABLE

BLOCK = 2**19
"""Weights measured at once: temporaries stay in the cache."""


@int4_quantize_measured.implement(PORTABLE, variant="eager", promises=("deterministic",))
def int4_quantize_measured_eager(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales = quantize_packed(weight, Int4Rule(rule, group_size), check=False)
    rows_OI = weight.detach().reshape(-1, weight.shape[-1])
    step = max(1, BLOCK // rows_OI.shape[1])
    blocks = zip(
        rows_OI.split(step),
        packed.reshape(-1, packed.shape[-1]).split(step),
        scales.reshape(-1, scales.shape[-1]).split(step),
        strict=True,
    )
    measured = [measure_rows(*block) for block in blocks]
    return packed, scales, torch.cat(measured).view(*weight.shape[:-1], len(STATISTICS))
