"""Portable int4_quantize_measured, a block of rows at a time.

Shape legend: O rows; I inputs; G groups of a row; g weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.operators.int4_measured import STATISTICS, int4_quantize_measured
from glm5_port.quant.int4 import SMALLEST_AMAX, Int4Rule, quantize_packed
from glm5_port.quant.packing import unpack_int4
from glm5_port.registry import PORTABLE

BLOCK = 2**19
"""Weights measured at once: temporaries stay in the cache."""


def _measure(weight_OI: Tensor, packed: Tensor, scales_OG: Tensor) -> Tensor:
    """Few passes, in place: this runs over every weight of a model, beside the quantiser."""
    w_OGg = weight_OI.to(torch.bfloat16).to(torch.float32).unflatten(-1, (scales_OG.shape[1], -1))
    codes_OGg = unpack_int4(packed).unflatten(-1, (scales_OG.shape[1], -1))
    wide_OG = scales_OG.to(torch.float32)
    errors_OGg = codes_OGg.to(torch.float32).mul_(wide_OG.unsqueeze(-1)).to(torch.bfloat16).to(torch.float32).sub_(w_OGg).abs_()
    sizes_OGg = w_OGg.abs_()
    amax_OG = sizes_OGg.amax(-1)
    zero_OG = amax_OG == 0
    ordinary_OG = amax_OG >= torch.tensor(SMALLEST_AMAX, dtype=torch.int16).view(torch.bfloat16).item()
    columns = (
        torch.count_nonzero(codes_OGg.abs() >= 7, dim=(1, 2)),
        torch.count_nonzero(zero_OG, dim=1),
        torch.count_nonzero(~ordinary_OG & ~zero_OG, dim=1),
        torch.count_nonzero(wide_OG.to(torch.float16).to(torch.float32) != wide_OG, dim=1),
        errors_OGg.sum((1, 2)),
        sizes_OGg.sum((1, 2)),
        torch.where(ordinary_OG, errors_OGg.amax(-1) / amax_OG, 0.0).amax(-1),
    )
    measured = torch.stack([column.to(torch.float32) for column in columns], dim=-1)
    return torch.where(scales_OG.isnan().any(-1, keepdim=True), 0.0, measured)


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
    measured = [_measure(*block) for block in blocks]
    return packed, scales, torch.cat(measured).view(*weight.shape[:-1], len(STATISTICS))
