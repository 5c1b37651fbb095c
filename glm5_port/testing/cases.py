"""Parity cases: named, seeded on the CPU from their own id, rounded to the working dtype.

A suite belongs to one operator and lives in `glm5_port/operators/cases/`. Inputs depend on the operator, the case and the
dtype only, so that any machine makes the same ones. Beside its named cases a suite has sweeps: cases without end that draw their
sizes too, for what nobody thought of.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from glm5_port.dispatch import Operator

WIDTH = frozenset({"glm5-width"})
"""Tag of cases at the released model's widths: slower, left out by `--small`."""
TIES = frozenset({"ties"})
"""Tag of cases with scores that are equal exactly: what an implementation that promises `tie_rule` is held against."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T = TypeVar("T")


class Make:
    """Makes the inputs of one case. Draws are float32 on the CPU, then rounded to `dtype`, so that every dtype sees the
    same numbers up to rounding. `dtype=` overrides the working dtype for tensors whose dtype the contract fixes."""

    def __init__(self, seed_id: str, dtype: torch.dtype) -> None:
        seed = int.from_bytes(hashlib.sha256(seed_id.encode()).digest()[:8], "little") >> 1
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std + mean).to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * (high - low) + low).to(dtype or self.dtype)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype | None = None) -> Tensor:
        """Whole numbers in [low, high), as `dtype` (default: the working dtype; sums of small ones are exact in any order)."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype or self.dtype)

    def permutation(self, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype)

    def size(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, *options: T) -> T:
        """One of some values."""
        return options[self.size(0, len(options) - 1)]

    def with_non_finite(self, rows: int, width: int) -> Tensor:
        """Normal rows, with one NaN in the first row and one infinity in the second."""
        x = self.normal(rows, width)
        x[0, width // 2] = float("nan")
        x[1, 0] = float("inf")
        return x


@dataclass(frozen=True, slots=True)
class Case:
    """One input to an operator.

    Attributes:
        name: unique within the suite; part of the seed.
        build: makes the keyword arguments of one call.
        tags: `WIDTH` for cases at true GLM-5 widths, `TIES` for exact ties; `WIDTH | TIES` for both.
        exact: outputs must equal the gold exactly (inputs are small integers, so every order of summation is exact).
        dtypes: working dtypes to run in.
    """

    name: str
    build: Callable[[Make], dict[str, Any]]
    tags: frozenset[str] = frozenset()
    exact: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def arguments(self, operator: Operator, dtype: torch.dtype) -> dict[str, Any]:
        """The keyword arguments on the CPU, in the working dtype."""
        return self.build(Make(f"{operator.name}/{self.name}", dtype))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Random cases, told apart by a number, from which alone each can be made again.

    Attributes:
        build: makes the keyword arguments of one call; draws the sizes too (`Make.size`).
        exact, dtypes: as in `Case`.
    """

    build: Callable[[Make], dict[str, Any]]
    exact: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def case(self, number: int) -> Case:
        """One of them; the same sizes and numbers in every dtype, up to rounding."""
        return Case(f"random_{number}", self.build, exact=self.exact, dtypes=self.dtypes)


@dataclass(frozen=True, slots=True)
class Suite:
    """All cases of one operator, and how its outputs are compared.

    Attributes:
        compare: None for the default (floating outputs within the budget, other outputs equal), or a function
            `(Outcome) -> list[str]` of `glm5_port.testing.comparison` that returns what is wrong.
        rows: names of the arguments with one row per token (dimension 0). They are also run non-contiguous, and the promise
            `batch_invariant` is checked by calling the operator on one token alone; `query_starts`, `lengths`,
            `block_table` and `slots` are cut to match (`glm5_port.testing.promises.alone`).
        sweep: its random cases.
    """

    operator: Operator
    cases: tuple[Case, ...]
    compare: Callable[..., list[str]] | None = None
    rows: tuple[str, ...] = ()
    sweep: Sweep | None = None


SUITES: dict[str, Suite] = {}


def suite(
    operator: Operator, *, compare: Callable[..., list[str]] | None = None, rows: Sequence[str] = ()
) -> Callable[[Callable[[], Iterator[Case | Sweep]]], None]:
    """Registers the cases that the decorated generator yields, and at most one sweep. See `Suite` for the arguments."""

    def register(cases: Callable[[], Iterator[Case | Sweep]]) -> None:
        yielded = list(cases())
        made = tuple(each for each in yielded if isinstance(each, Case))
        sweep = next((each for each in yielded if isinstance(each, Sweep)), None)
        names = [case.name for case in made]
        if len(yielded) > len(made) + (sweep is not None):
            raise ValueError(f"{operator.name}: more than one sweep")
        if len(set(names)) != len(names):
            raise ValueError(f"{operator.name}: case names are not unique: {names}")
        if unknown := set(rows) - set(operator.parameters):
            raise ValueError(f"{operator.name}: rows name no parameters of it: {sorted(unknown)}")
        SUITES[operator.name] = Suite(operator, made, compare, tuple(rows), sweep)

    return register


@functools.cache
def load_suites() -> dict[str, Suite]:
    """Imports every module of `glm5_port.operators.cases` and returns operator name -> suite."""
    package = importlib.import_module("glm5_port.operators.cases")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return SUITES
