"""rms_norm and add_rms_norm by npu_rms_norm and npu_add_rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import FLOATING
from glm5_port.backends.npu.contracts.small import ADD_RMS_NORM, RMS_NORM
from glm5_port.backends.npu.rules import Needs, aclnn, call, dtype_among
from glm5_port.operators.norm import add_rms_norm, rms_norm

_NORM_DTYPES = dtype_among(*FLOATING)


@aclnn(rms_norm, Needs((RMS_NORM,), (_NORM_DTYPES,)))
def rms_norm_aclnn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    y, _ = call(RMS_NORM, x.reshape(-1, x.shape[-1]), weight.to(x.dtype), epsilon=eps)
    return y.view(x.shape)


@aclnn(add_rms_norm, Needs((ADD_RMS_NORM,), (_NORM_DTYPES,)))
def add_rms_norm_aclnn(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    y, _, total = call(ADD_RMS_NORM, x.reshape(-1, width), residual.reshape(-1, width), weight.to(x.dtype), epsilon=eps)
    return y.view(x.shape), total.view(x.shape)
