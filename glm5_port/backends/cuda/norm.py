"""Triton rms_norm and add_rms_norm. Shape legend: D width of a row; R rows; ... any leading dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import check_shapes, kernels, launch, power_of_two, rows_of, triton
from glm5_port.operators.norm import add_rms_norm, rms_norm

WIDEST = 2**15
"""A row is held in registers."""


def _not_supported(*, width: int, **_: Any) -> list[str]:
    return [f"takes rows of at most {WIDEST} numbers, not {width}"] if width > WIDEST else []


def _normalise(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, the sum that was normalised), [..., D]; without a residual the sum is not written."""
    rows_RD = rows_of(x)
    residual_RD = rows_RD if residual is None else rows_of(residual.expand_as(x))
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    width = x.shape[-1]
    check_shapes("rms_norm", weight=(weight, (width,)))
    block = power_of_two(width)
    launch(
        kernels("norm").rms_norm_rows,
        (rows_RD.shape[0],),
        rows_RD,
        residual_RD,
        weight.detach().contiguous(),
        y,
        total,
        rows_RD.stride(0),
        residual_RD.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return y, total


@triton(rms_norm, not_supported=_not_supported)
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalise(x, None, weight, eps)[0]


@triton(add_rms_norm, not_supported=_not_supported)
def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, eps)
