"""rms_norm on the toychip. Shape legend: D hidden size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.operators import rms_norm
from glm5_port_toychip import NAME

LANES = 8


def not_supported(*, width: int, dtype: torch.dtype, **_: Any) -> list[str]:
    """Pure: needs no toychip, so that `explain --as toychip` and the tests of the reasons run anywhere."""
    reasons = []
    if width % LANES:
        reasons.append(f"width {width} is not a multiple of the {LANES} lanes of the vector unit")
    if dtype == torch.float16:
        reasons.append("no float16 arithmetic (bfloat16 and float32 are there)")
    return reasons


@rms_norm.implement(NAME, variant="lanes", not_supported=not_supported, promises=("deterministic",))
def rms_norm_lanes(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Sums the squares of each lane first, then over the lanes, as the vector unit would."""
    wide = torch.promote_types(x.dtype, torch.float32)
    lanes = x.to(wide).unflatten(-1, (-1, LANES))
    mean_square = lanes.square().sum(-2).sum(-1, keepdim=True) / x.shape[-1]
    return (x.to(wide) * torch.rsqrt(mean_square + eps) * weight.to(wide)).to(x.dtype)
