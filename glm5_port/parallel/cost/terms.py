"""Terms of a step's time. Each is a function of a `Step` whose docstring holds its formula and source, and is in the
breakdown."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm5_port.parallel.cost.step import Step

COMPUTE, COMMUNICATION, FIXED = "compute", "communication", "fixed"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a term takes on one device.

    Attributes:
        seconds: of the whole step, all layers.
        operations: multiplications and additions.
        memory_bytes: read and written in the device's memory.
        link_bytes: sent over links by one device.
    """

    seconds: float
    operations: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, self.operations * times, self.memory_bytes * times, self.link_bytes * times)


NOTHING = Cost(0.0)


@dataclass(frozen=True, slots=True)
class Term:
    """A named part of a step.

    Attributes:
        name: what it is.
        kind: "compute", "communication" or "fixed".
        formula: the docstring of its function, without the source.
        source: where the formula or its constants come from.
        of: the function.
    """

    name: str
    kind: str
    formula: str
    source: str
    of: Callable[[Step], Cost]


TERMS: dict[str, Term] = {}


def term(name: str, kind: str) -> Callable[[Callable[[Step], Cost]], Callable[[Step], Cost]]:
    """Registers a function as a term.

    Args:
        name: what the breakdown calls it.
        kind: "compute", "communication" or "fixed".
    """

    def register(of: Callable[[Step], Cost]) -> Callable[[Step], Cost]:
        formula, _, source = inspect.cleandoc(of.__doc__ or "").partition("\n\nSource: ")
        TERMS[name] = Term(name, kind, formula, source, of)
        return of

    return register


@dataclass(frozen=True)
class Breakdown:
    """A step's time as a sum.

    Attributes:
        parts: (name, kind, cost) in the order of the model; what overlap hides is a part below zero.
    """

    parts: tuple[tuple[str, str, Cost], ...]

    @cached_property
    def seconds(self) -> float:
        """Of the step."""
        return sum(cost.seconds for _, _, cost in self.parts)

    @property
    def together(self) -> Cost:
        """All parts as one."""
        costs = [cost for _, _, cost in self.parts]
        return Cost(
            sum(cost.seconds for cost in costs),
            sum(cost.operations for cost in costs),
            sum(cost.memory_bytes for cost in costs),
            sum(cost.link_bytes for cost in costs),
        )

    def of_kind(self, kind: str) -> float:
        """Seconds of all parts of a kind."""
        return sum(cost.seconds for _, each, cost in self.parts if each == kind)

    def __iter__(self) -> Iterator[tuple[str, str, Cost]]:
        return iter(self.parts)

    def with_part(self, name: str, kind: str, cost: Cost) -> Breakdown:
        """With one more part."""
        return Breakdown((*self.parts, (name, kind, cost)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, formulas and sources included."""
        return {
            "seconds": self.seconds,
            "terms": [
                {
                    "name": name,
                    "kind": kind,
                    "seconds": cost.seconds,
                    "operations": cost.operations,
                    "memory_bytes": cost.memory_bytes,
                    "link_bytes": cost.link_bytes,
                    "formula": TERMS[name].formula,
                    "source": TERMS[name].source,
                }
                for name, kind, cost in self.parts
            ],
        }


def sum_terms(step: Step, names: Iterable[str], known: dict[Hashable, dict[str, Cost]] | None = None) -> Breakdown:
    """The terms of a step that cost anything, in the given order.

    Args:
        step: what is priced.
        names: of its terms.
        known: work of steps that were priced on links of other speeds, and where that of this one is remembered.
    """
    work = {} if known is None else known.setdefault(step.work, {})
    parts = []
    for name in names:
        term, cost = TERMS[name], work.get(name)
        if cost is None:
            cost = term.of(step)
            if term.kind != COMMUNICATION:
                work[name] = cost
        if cost.seconds:
            parts.append((name, term.kind, cost))
    return Breakdown(tuple(parts))
