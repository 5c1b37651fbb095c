"""Triton rotate. Shape legend: T tokens; H heads; D channels of a head; P rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import dense, kernels, launch, power_of_two, triton
from glm5_port.operators.rope import check_rotation, rotate

HEADS = 16
"""Heads of a token that one program rotates."""


@triton(rotate)
def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
    """One program for 16 heads of a token; every channel is read with its partner."""
    check_rotation(x, cos, sin, start)
    rows, cos_TP, sin_TP = dense(x), cos.detach().contiguous(), sin.detach().contiguous()
    tokens, heads, dim = x.shape
    y_THD = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(HEADS, power_of_two(heads))
    launch(
        kernels("rope").rotate_heads,
        (tokens, -(-heads // block)),
        rows, cos_TP, sin_TP, y_THD, rows.stride(0), rows.stride(1), heads, start,
        DIM=dim, PAIRS=cos.shape[1], INTERLEAVED=interleaved, HEADS=block, CHANNELS=power_of_two(dim),
        num_warps=4,
    )  # fmt: skip
    return y_THD
