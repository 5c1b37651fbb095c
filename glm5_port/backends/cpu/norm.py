"""Native rms_norm and add_rms_norm, and the LayerNorm of the indexer's keys.

Shape legend: D width of a row; n rows; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import kernels, native, threads
from glm5_port.operators.norm import add_rms_norm, rms_norm


def normalise(
    isa: int, x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x), of x + residual where there is one; a LayerNorm where there is a bias.

    Args:
        isa: number of the instruction set.
        x: [..., D] float32 or bfloat16.
        weight: [D].
        eps: added to the mean square.
        residual: [..., D], dtype of x.
        bias: [D]; the mean is subtracted first.

    Returns:
        ([..., D] in the dtype of x, the rounded sum x + residual; x where there is no residual).
    """
    rows_nD, weight = _rows(x), _channels(weight, x)
    y = torch.empty(x.shape, dtype=x.dtype)
    residual_nD = None if residual is None else _rows(residual)
    total = x if residual_nD is None else torch.empty_like(y)
    bias = None if bias is None else _channels(bias, x)
    kernels().norm(
        isa,
        rows_nD.data_ptr(),
        x.dtype == torch.bfloat16,
        *rows_nD.shape,
        rows_nD.stride(0),
        0 if residual_nD is None else residual_nD.data_ptr(),
        0 if residual_nD is None else residual_nD.stride(0),
        total.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        bias is not None,
        eps,
        y.data_ptr(),
        threads(),
    )
    return y, total


def _channels(weight: Tensor, x: Tensor) -> Tensor:
    return weight.detach().to(torch.float32).expand(x.shape[-1]).contiguous()


def _rows(x: Tensor) -> Tensor:
    rows = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach().unsqueeze(0)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@native(rms_norm)
def rms_norm_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return normalise(isa, x, weight, eps)[0]

    return run


@native(add_rms_norm)
def add_rms_norm_native(isa: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return normalise(isa, x, weight, eps, residual=residual.expand_as(x))

    return run
