"""linear on the toychip, which wants its weights transposed.

An implementation with a weight layout of its own gives `prepare`. Its function then takes, in place of the declaration's
weight parameters, what `finish()` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.operators import linear
from glm5_port_toychip import NAME


class TransposedWeight:
    """Turns the canonical weight [out, in] into the toychip's [in, out] when it arrives; the canonical one can go then."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._shape = (facts["width_out"], facts["width_in"])
        self._transposed: Tensor | None = None

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weight. `part` is None: a projection has one part, experts would come one by one."""
        weight = tensors["weight"]
        if tuple(weight.shape) != self._shape:
            raise InputError(f"toychip linear was bound for a weight {self._shape} and got {tuple(weight.shape)}")
        self._transposed = weight.t().contiguous()

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of `linear_transposed`."""
        if self._transposed is None:
            raise InputError("toychip linear: the weight never arrived")
        return {"weight_transposed": self._transposed}


def fake(x: Tensor, weight_transposed: Tensor) -> Tensor:
    """Shape and dtype of the result; needed because the declaration's own fake reads `weight`, which is not here."""
    return x.new_empty((*x.shape[:-1], weight_transposed.shape[1]))


@linear.implement(NAME, variant="transposed", prepare=TransposedWeight, fake=fake, promises=("deterministic",))
def linear_transposed(x: Tensor, weight_transposed: Tensor) -> Tensor:
    """y = x W with W [in, out], accumulated in float64, which costs the toychip nothing."""
    return (x.double() @ weight_transposed.double()).to(x.dtype)
