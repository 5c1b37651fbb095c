"""Products in floating point: torch's own, which torch_npu hands to CANN's matmul, and the vendor's fused ones.

Shape legend: T tokens; H heads; D hidden size; F intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import FLOATING, WIDEST
from glm5_port.backends.npu.contracts.small import SWIGLU, TRANSPOSE_BATCHMATMUL
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.errors import InputError
from glm5_port.operators.linear import gated_mlp, linear, linear_per_head

PRODUCT_DTYPES = dtype_among(*FLOATING)


@aclnn(linear, Needs((), (PRODUCT_DTYPES,)))
def linear_aclnn(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate then up."""
    activated: Tensor = call(SWIGLU, gate_up, dim=-1)
    return activated


@aclnn(gated_mlp, Needs((SWIGLU,), (PRODUCT_DTYPES,)))
def gated_mlp_aclnn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], down.shape[0]))
    return F.linear(swiglu(F.linear(x, gate_up)), down)


# -- a matrix for each head ----------------------------------------------------------------------------------------------


def per_head_rules(width_in: str, width_out: str) -> tuple[Rule, ...]:
    """The rules of npu_transpose_batchmatmul on the facts of those names."""
    return (
        PRODUCT_DTYPES,
        Rule(
            "whole 16s",
            f"npu_transpose_batchmatmul wants widths of a head in whole 16s, not {{{width_in}}} and {{{width_out}}}",
            lambda **facts: facts[width_in] % 16 == 0 and facts[width_out] % 16 == 0,
        ),
        Rule(
            "row of all heads",
            f"npu_transpose_batchmatmul wants fewer than 65536 numbers in a row of all heads, not {{heads}} * {{{width_in}}}",
            lambda **facts: facts["heads"] * facts[width_in] < 65536,
        ),
        Rule(
            "output width",
            f"npu_transpose_batchmatmul wants up to {WIDEST} outputs a head, not {{{width_out}}}",
            lambda **facts: facts[width_out] <= WIDEST,
        ),
    )


def product_per_head(x_THI: Tensor, weight_HIO: Tensor) -> Tensor:
    """[T, H, in] by [H, in, out] to [T, H, out]: no copy of the rows by head."""
    y: Tensor = call(TRANSPOSE_BATCHMATMUL, x_THI, weight_HIO, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    return y.reshape(x_THI.shape[0], weight_HIO.shape[0], weight_HIO.shape[2])


class Transposed:
    """Preparation: one weight [H, out, in] laid out as [H, in, out], which the vendor's product reads without transposing;
    the other weights of the operator stay as they are.

    Args:
        name: of that weight; it becomes `{name}_transposed`.
        others: names of the rest.
    """

    def __init__(self, name: str, *others: str) -> None:
        self._name, self._others = name, others
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is not None:
            raise InputError(f"{self._name} on npu: part {part} arrived, but this operator takes its weights whole")
        self._tensors[f"{self._name}_transposed"] = tensors[self._name].transpose(1, 2).contiguous()
        self._tensors.update({name: tensors[name] for name in self._others})

    def finish(self) -> dict[str, Tensor | int]:
        if not self._tensors:
            raise InputError(f"weights missing: {', '.join((self._name, *self._others))}")
        return dict(self._tensors)


def _per_head_weight(facts: Mapping[str, Any]) -> Transposed:
    return Transposed("weight")


@aclnn(
    linear_per_head,
    Needs((TRANSPOSE_BATCHMATMUL,), per_head_rules("width_in", "width_out")),
    prepare=_per_head_weight,
    fake=lambda x, weight_transposed: x.new_empty((x.shape[0], weight_transposed.shape[0], weight_transposed.shape[2])),
)
def linear_per_head_aclnn(x: Tensor, weight_transposed: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty((0, weight_transposed.shape[0], weight_transposed.shape[2]))
    return product_per_head(x, weight_transposed)
