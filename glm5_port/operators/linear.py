"""Dense products: one projection, one for each head, and the gated MLP of the dense layers and the shared expert.

Shape legend: T tokens; H heads; D hidden size; F intermediate size; ... any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.registry import LONG_SUMS


@operator(
    facts={"width_in": lambda weight, **_: weight.shape[1], "width_out": lambda weight, **_: weight.shape[0]},
    fake=lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0])),
    weights=("weight",),
    budget=LONG_SUMS,
)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Projects each row.

    y = x weight^T, accumulated in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [..., in], any floating dtype.
        weight: [out, in], same dtype.

    Returns:
        [..., out] in the dtype of x.

    Contract:
        Rows are independent. NaN or infinity in a row reaches every element of that row's result. No rows: an empty
        result. Deterministic.

    Raises:
        Nothing of its own; shapes that do not fit raise torch's error.

    Source: every projection of GLM-5; none has a bias.
    """
    wide = accumulation_dtype(x)
    return F.linear(x.to(wide), weight.to(wide)).to(x.dtype)


@operator(
    facts={
        "heads": lambda weight, **_: weight.shape[0],
        "width_in": lambda weight, **_: weight.shape[2],
        "width_out": lambda weight, **_: weight.shape[1],
    },
    fake=lambda x, weight: x.new_empty((x.shape[0], *weight.shape[:2])),
    weights=("weight",),
    budget=LONG_SUMS,
)
def linear_per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Projects the row of each head by that head's own matrix.

    y[t, h] = weight[h] x[t, h], accumulated in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [T, H, in], any floating dtype.
        weight: [H, out, in], same dtype; any strides.

    Returns:
        [T, H, out] in the dtype of x.

    Contract:
        Rows and heads are independent. NaN or infinity in a row reaches every element of that row's result. No rows: an empty
        result. Deterministic.

    Raises:
        Nothing of its own; shapes that do not fit raise torch's error.

    Source: the two halves of GLM-5's kv_b_proj in the absorbed form of MLA: keys into the queries (in: nope part, out: latent),
    values out of the latent (in: latent, out: value part).
    """
    wide = accumulation_dtype(x)
    return torch.einsum("thi,hoi->tho", x.to(wide), weight.to(wide)).to(x.dtype)


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate then up, in float32 (or wider), rounded once to the dtype of `gate_up`."""
    gate, up = gate_up.to(accumulation_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@operator(
    facts={"width": lambda gate_up, **_: gate_up.shape[1], "width_between": lambda down, **_: down.shape[1]},
    fake=lambda x, gate_up, down: x.new_empty((*x.shape[:-1], down.shape[0])),
    weights=("gate_up", "down"),
    budget=LONG_SUMS,
)
def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Applies a SwiGLU feed-forward network to each row.

    y = (silu(x gate^T) * (x up^T)) down^T. Each product accumulates in float32 (float64 for float64 inputs) and is rounded
    to the working dtype; silu and its product are computed in float32 and rounded once.

    Args:
        x: [..., D], any floating dtype.
        gate_up: [2F, D], rows of the gate projection, then rows of the up projection.
        down: [D, F].

    Returns:
        [..., D] in the dtype of x.

    Contract:
        As `linear`. An implementation may keep the values between the products wider.

    Raises:
        Nothing of its own.

    Source: GLM-5 dense layers and shared expert. Transformers rounds silu(gate) before the product with up, the DeepSeek
    reference does not; the budget covers the difference.
    """
    return linear.reference(silu_and_multiply(linear.reference(x, gate_up)), down)
