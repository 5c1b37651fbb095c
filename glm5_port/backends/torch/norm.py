"""Portable rms_norm and add_rms_norm: PyTorch's own fused normalisation. Shape legend: D hidden size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glm5_port.operators.norm import accumulation_dtype, add_rms_norm, rms_norm
from glm5_port.registry import PORTABLE


@rms_norm.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = accumulation_dtype(x)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


@add_rms_norm.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def add_rms_norm_eager(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_eager(total, weight, eps), total
