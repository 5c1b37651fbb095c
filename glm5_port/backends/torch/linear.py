"""Portable linear, linear_per_head and gated_mlp: PyTorch's own products. Shape legend: ... any leading dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.operators.linear import gated_mlp, linear, linear_per_head, silu_and_multiply
from glm5_port.registry import PORTABLE


@linear.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def linear_eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@linear_per_head.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def linear_per_head_eager(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("thi,hoi->tho", x, weight)


@gated_mlp.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def gated_mlp_eager(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return F.linear(silu_and_multiply(F.linear(x, gate_up)), down)
