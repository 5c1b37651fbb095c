"""A CPU as a new chip is: with portable implementations only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from glm5_port import registry


@contextlib.contextmanager
def without_native_kernels() -> Iterator[None]:
    """A CPU without kernels of its own."""
    before = {name: dict(operator.implementations) for name, operator in registry.OPERATORS.items()}
    for operator in registry.OPERATORS.values():
        operator.implementations = {key: each for key, each in operator.implementations.items() if each.backend != "cpu"}
        operator._memo.clear()
    try:
        yield
    finally:
        for name, implementations in before.items():
            registry.OPERATORS[name].implementations = implementations
            registry.OPERATORS[name]._memo.clear()
