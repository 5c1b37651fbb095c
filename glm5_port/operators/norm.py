"""RMS normalisation, alone and fused with the residual sum.

Shape legend: D hidden size; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.dispatch import operator


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for anything narrower, the tensor's own dtype otherwise: references reduce in this."""
    return torch.promote_types(x.dtype, torch.float32)


@operator(
    facts={"width": lambda x, **_: x.shape[-1]},
    fake=lambda x, weight, eps: torch.empty_like(x),
    weights=("weight",),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales each row to unit root mean square, then by a weight per channel.

    y = weight * x * (mean(x^2) + eps)^(-1/2), computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean square. Always explicit: the two latent norms of GLM-5 use 1e-6 in Hugging Face and
            `rms_norm_eps` (1e-5) in the serving engines.

    Returns:
        [..., D] in the dtype of x.

    Contract:
        Rows are independent. An all-zero row gives zeros. NaN or infinity in a row makes that row NaN. No rows: an empty
        result. Deterministic. Hugging Face rounds a second time, before the weight; the budget covers the difference.

    Raises:
        Nothing of its own; shapes that do not broadcast raise torch's error.

    Source: GLM-5 `GlmMoeDsaRMSNorm`; one rounding as in DeepSeek's reference and the fused engine kernels.
    """
    x_wide = x.to(accumulation_dtype(x))
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * scale * weight.to(x_wide.dtype)).to(x.dtype)


@operator(
    facts={"width": lambda x, **_: x.shape[-1]},
    fake=lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
    weights=("weight",),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds a block's output to the residual stream and normalises the sum.

    s = x + residual, rounded to the working dtype; y = rms_norm(s, weight, eps).

    Args:
        x: [..., D], the block's output.
        residual: [..., D], same dtype.
        weight: [D].
        eps: as in `rms_norm`.

    Returns:
        (y, s), both [..., D] in the dtype of x.

    Contract:
        As `rms_norm`. The reference normalises the rounded sum, as Hugging Face does; an implementation may normalise the
        unrounded one within the budget.

    Raises:
        Nothing of its own.

    Source: GLM-5 decoder block; fused form as in vLLM and `npu_add_rms_norm`.
    """
    total = x + residual
    return rms_norm.reference(total, weight, eps), total
