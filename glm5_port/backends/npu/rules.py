"""Rules of the vendor's operators as data: what they ask of a machine, of a model and of a call.

    Rule             one documented condition, with the sentence that names it when it does not hold
    VendorOperator   one function of torch_npu: chips, CANN, the rules of a call, arguments whose default is wrong for us
    Needs            what an implementation asks for: vendor operators, and rules on static facts
    call             the only way to the vendor: every rule first, because the vendor's own errors are opaque
    aclnn            registers an implementation whose reasons are its needs

A rule is dropped from or added to a table here; the tests drop each in turn and see that somebody notices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.npu import machine as vendor
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.preparation import Preparation

BACKEND = "npu"
ACLNN = "aclnn"
"""Variant of what computes by the vendor's kernels (aclnn is the interface of CANN's operator library)."""

NEEDS: dict[str, Needs] = {}
"""Operator/variant -> what it needs: every implementation of this backend."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One documented condition.

    Attributes:
        name: unique within its table.
        says: what is supported, in words; may name facts or arguments in braces.
        holds: of the facts (in `Needs`) or the arguments by name (in `VendorOperator`).
    """

    name: str
    says: str
    holds: Callable[..., bool]


@dataclass(frozen=True, slots=True)
class VendorOperator:
    """One function of torch_npu as its documents describe it.

    Attributes:
        name: of the function.
        kernels: aclnn names of CANN's kernels that torch_npu chooses from; none where the host computes.
        parameters: names of the arguments that are passed by place.
        chips: families that the documents list.
        explicit: keyword arguments that are always passed, because a default is wrong for this model or has changed.
        rules: of a call.
        cann: the oldest CANN that the documents name, as numbers; empty: none is named.
    """

    name: str
    kernels: tuple[str, ...]
    parameters: tuple[str, ...]
    chips: tuple[str, ...]
    explicit: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    cann: tuple[int, ...] = ()

    def missing(self, machine: vendor.Machine) -> list[str]:
        """Why this machine does not have the operator; empty when it does."""
        found = []
        if machine.chip not in self.chips:
            found.append(f"{self.name} is documented for {', '.join(self.chips)}, this chip is {machine.chip}")
        if self.cann and machine.cann and machine.cann < self.cann:
            oldest, mine = (".".join(map(str, version)) for version in (self.cann, machine.cann))
            found.append(f"{self.name} wants CANN {oldest} or later, this is {mine}")
        if not machine.offers(self.name):
            found.append(f"torch_npu {machine.torch_npu} has no {self.name}: install a newer one")
        if self.kernels and not any(machine.has_kernel(kernel) for kernel in self.kernels):
            found.append(f"this CANN has no kernel {self.kernels[0]} for {self.name}: install a newer CANN and its operators")
        return found

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises InputError when a rule of the call does not hold."""
        if absent := [name for name in self.explicit if name not in arguments]:
            raise InputError(f"{self.name}: called without {', '.join(absent)}, whose default must not be relied on")
        for rule in self.rules:
            if not rule.holds(**arguments):
                shown = ", ".join(f"{name}={_describe(value)}" for name, value in arguments.items())
                raise InputError(
                    f"{self.name}: rule {rule.name!r} of its documents does not hold.\n  supported: {rule.says}\n  got: {shown}"
                )


@dataclass(frozen=True, slots=True)
class Needs:
    """What an implementation needs.

    Attributes:
        uses: vendor operators that it calls.
        rules: on static facts.
    """

    uses: tuple[VendorOperator, ...]
    rules: tuple[Rule, ...] = ()

    def reasons(self, **facts: Any) -> list[str]:
        """Why not, for these facts on this machine."""
        here = vendor.machine()
        found = [reason for operator in self.uses for reason in operator.missing(here)]
        return found + [rule.says.format(**facts) for rule in self.rules if not rule.holds(**facts)]


def call(operator: VendorOperator, *args: Any, **kwargs: Any) -> Any:
    """Checks the rules of a call, then makes it.

    Raises:
        InputError: a rule does not hold; the text names it.
    """
    operator.check(dict(zip(operator.parameters, args, strict=True)) | kwargs)
    return getattr(vendor.torch_npu(), operator.name)(*args, **kwargs)


def aclnn(
    operator: Operator,
    needs: Needs,
    *,
    variant: str = ACLNN,
    rank: int = 100,
    promises: Sequence[str] = (),
    prepare: Callable[[Mapping[str, Any]], Preparation] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`Operator.implement` for this backend: the reasons against it are what it needs and does not find.

    Promises are given only where the vendor's documents, or our own code around the kernel, keep them."""
    NEEDS[f"{operator.name}/{variant}"] = needs

    def not_supported(**facts: Any) -> list[str]:
        return NEEDS[f"{operator.name}/{variant}"].reasons(**facts)

    return operator.implement(
        BACKEND, variant=variant, rank=rank, not_supported=not_supported, promises=promises, prepare=prepare, fake=fake
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {plain(value.dtype)}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return f"[{', '.join(_describe(v) for v in value)}]"
    return repr(value)


def plain(dtype: torch.dtype) -> str:
    """A dtype as people write it."""
    return str(dtype).removeprefix("torch.")


def dtype_among(*dtypes: torch.dtype) -> Rule:
    """The rule on facts that most implementations begin with."""
    words = ", ".join(plain(dtype) for dtype in dtypes)
    return Rule("dtype", f"takes {words}, not {{dtype}}", lambda *, dtype, **_: dtype in dtypes)
