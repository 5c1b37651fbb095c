"""The tables of dispatch: which chips there are, which operators, and who implements them.

    Backend         one kind of chip: name, torch device type, probe
    Implementation  one way to compute an operator: backend/variant, reasons why not, promises, weight preparation
    Budget          how far an implementation may be from the gold

An operator itself, and how a call reaches the chosen implementation, is `glm5_port.dispatch`; what is asked for is
`glm5_port.requests`; how a choice is made is `glm5_port.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glm5_port.errors import InputError
from glm5_port.preparation import Preparation

if TYPE_CHECKING:
    from glm5_port.dispatch import Operator

PORTABLE = "torch"
"""Provider name of the portable PyTorch implementations: the first-day implementation of any chip, on any device."""
REFERENCE = "reference"
"""Provider name of an operator's own reference. Runs only when asked for by name."""

COMMON_FACTS: dict[str, Any] = {
    "device_type": ...,
    "dtype": ...,
    "needs_grad": False,
    "phase": None,
    "max_tokens": None,
    "max_context": None,
}
"""Facts every operator has, with defaults (`...` = required). `phase` is "prefill", "decode" or None (both)."""

PROMISES = {
    "deterministic": "two runs on the same inputs are equal bit for bit",
    "tie_rule": "equal scores are taken lowest position first, and indices ascend by position",
    "batch_invariant": "a row computed alone equals the same row computed in a batch, bit for bit",
    "thread_invariant": "the same bits for any number of threads",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """How far an implementation may be from the float64 gold:
    error <= factor * error(reference in the working dtype) + floor + summation.

    Both as relative root-mean-square and as largest absolute error over the gold's RMS.

    Attributes:
        factor: k, how many times the reference's own rounding error is allowed.
        floor: in units of the working dtype's machine epsilon, for cases where the reference happens to be exact.
        summation: in units of the accumulation dtype's machine epsilon (float32: 1.2e-7), for operators whose long sums may be
            taken in any order. A plain running sum of n random terms errs by about sqrt(n / 6) / 2 of it (16 at GLM-5's hidden
            size, its largest error over many outputs by 72), where the reference's blocked sum happens to be far better.
        why: one sentence when the factor is above 2.
    """

    factor: float = 2.0
    floor: float = 2.0
    summation: float = 0.0
    why: str = ""


LONG_SUMS = Budget(summation=96.0)
"""The budget of operators made of matrix products at GLM-5's widths."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend found on this machine.

    Attributes:
        missing: None when the backend is usable here; else exactly what is missing and what to install or set.
        details: facts worth printing (package versions, chip name, driver), in display order.
    """

    missing: str | None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of chip. `name` is what a user types, `device_type` what torch calls it; several chips share "cuda".

    Attributes:
        name: short lower-case name, unique.
        title: vendor and product family, for people.
        device_type: torch device type ("cuda", "npu", ...).
        package: the Python package that teaches torch this device, or None when torch itself does.
        collective: torch.distributed backend name.
        order: place in the search for `auto`; lower is tried first. Of what `auto` may choose, cpu comes last.
        probe: looks at this machine; imports vendor packages only inside.
        origin: "built in", or the plugin that registered it.
        by_name_only: `auto` never uses its implementations; they run when the backend or one of them is asked for by name.
        unproven: why nobody knows yet whether its own kernels work on the hardware; empty once evidence/ has a record of it.
    """

    name: str
    title: str
    device_type: str
    package: str | None
    collective: str
    order: int
    probe: Callable[[], Probe]
    origin: str = "built in"
    by_name_only: bool = False
    unproven: str = ""


@dataclass(eq=False, slots=True)
class Implementation:
    """One way to compute an operator. Built by `Operator.implement`.

    `yields` says why the portable implementations on the same device go before it; empty where they come after. `torch_op` is its
    opaque torch op, defined the first time it is bound."""

    operator: Operator
    backend: str
    variant: str
    function: Callable[..., Any]
    rank: int
    not_supported: Callable[..., list[str]]
    differentiable: bool
    promises: frozenset[str]
    prepare: Callable[[Mapping[str, Any]], Preparation] | None
    fake: Callable[..., Any]
    yields: str = ""
    torch_op: Any = None

    @property
    def id(self) -> str:
        return REFERENCE if self.backend == REFERENCE else f"{self.backend}/{self.variant}"

    @property
    def portable(self) -> bool:
        return self.backend == PORTABLE


BACKENDS: dict[str, Backend] = {}
OPERATORS: dict[str, Operator] = {}


def register_backend(backend: Backend) -> None:
    """Adds a chip. Raises InputError when the name is taken or reserved."""
    if backend.name in BACKENDS or backend.name in (PORTABLE, REFERENCE, "auto"):
        raise InputError(
            f"backend name {backend.name!r} is taken (known: {', '.join(BACKENDS)}; reserved: auto, torch, reference)"
        )
    BACKENDS[backend.name] = backend
