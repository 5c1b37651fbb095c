"""How weights reach an implementation: canonical, or turned into its own layout while they stream in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.memory import zeros


class Preparation(Protocol):
    """Turns canonical weights into an implementation's own layout while they stream in, part by part.

    A part is one expert (its index) or, for operators without experts, None. `add` consumes the tensors: the caller drops
    its reference, so that at most one part exists twice. `finish` returns the keyword arguments of the implementation."""

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None: ...

    def finish(self) -> dict[str, Tensor | int]: ...


class CanonicalWeights:
    """Preparation of an implementation that takes canonical weights: parts (experts) are stacked along a new first
    dimension, allocated when the first part arrives; a single part (None) is kept as it is.

    Args:
        names: the declaration's weight parameters.
        parts: how many parts will come; None for an operator without experts.
    """

    def __init__(self, names: Sequence[str], parts: int | None) -> None:
        self._names = tuple(names)
        self._parts = parts
        self._tensors: dict[str, Tensor] = {}
        self._seen: dict[str, set[int]] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is None:
            self._tensors.update(tensors)
            return
        if self._parts is None:
            raise InputError(f"part {part} arrived, but this operator takes its weights whole ({', '.join(self._names)})")
        for name, tensor in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = zeros(self._parts, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
            if not 0 <= part < self._parts or tensor.shape != self._tensors[name].shape[1:]:
                expected = f"parts 0 to {self._parts - 1} of shape {tuple(self._tensors[name].shape[1:])}"
                raise InputError(f"{name}: part {part} of shape {tuple(tensor.shape)} arrived; expected {expected}")
            self._tensors[name][part].copy_(tensor)
            self._seen.setdefault(name, set()).add(part)

    def finish(self) -> dict[str, Tensor | int]:
        missing = [name for name in self._names if name not in self._tensors]
        if missing:
            raise InputError(f"weights missing: {', '.join(missing)}")
        for name, seen in self._seen.items():
            if absent := set(range(self._parts or 0)) - seen:
                raise InputError(f"{name}: experts missing: {sorted(absent)}")
        return {name: self._tensors[name] for name in self._names}
