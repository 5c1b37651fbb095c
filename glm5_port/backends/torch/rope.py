"""Portable rotate. Shape legend: T tokens; H heads; D channels of a head; P rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.operators.norm import accumulation_dtype
from glm5_port.operators.rope import check_rotation, rotate
from glm5_port.registry import PORTABLE


@rotate.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic", "batch_invariant"))
def rotate_eager(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
    check_rotation(x, cos, sin, start)
    pairs = cos.shape[-1]
    wide = accumulation_dtype(x)
    shape, pair_dim = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    first, second = x[..., start : start + 2 * pairs].to(wide).unflatten(-1, shape).unbind(pair_dim)  # each [T, H, P]
    cos, sin = cos.to(wide)[:, None, :], sin.to(wide)[:, None, :]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=pair_dim)
    turned = turned.flatten(-2).to(x.dtype)
    return torch.cat((x[..., :start], turned, x[..., start + 2 * pairs :]), dim=-1)
