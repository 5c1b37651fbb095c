"""Set-up for all tests: the parity plugin also where the package is not installed, one thread, and clean flags."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch

from glm5_port import dispatch, flags, registry, requests
from tests.portable import without_native_kernels

_numbers = itertools.count()

if not any(point.name == "glm5_port" for point in metadata.entry_points(group="pytest11")):
    pytest_plugins = ["glm5_port.testing.pytest_plugin"]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores


@pytest.fixture
def set_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`set_flags(GLM5_PORT_STRICT="1")`: exactly these flags hold for the test."""

    def apply(**values: str) -> None:
        for name in [name for name in os.environ if name.startswith(flags.PREFIX)]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        flags.reset()

    apply()
    yield apply
    monkeypatch.undo()
    flags.reset()


@pytest.fixture
def canonical_weights(set_flags: Callable[..., None]) -> None:
    """Operators whose weights are INT4, or go with them, run portable implementations, which take weights as they are stored."""
    operators = ("INT4_MATMUL", "EXPERT_MLP_INT4", "EXPERT_MLP_INT4_W4A8", "LINEAR_PER_HEAD")
    set_flags(**{f"{flags.OPERATOR_PREFIX}{operator}": registry.PORTABLE for operator in operators})


@pytest.fixture
def portable_only() -> Iterator[None]:
    """What is chosen and shown is that of portable implementations."""
    with without_native_kernels():
        yield


@pytest.fixture
def declare() -> Iterator[Callable[..., dispatch.Operator]]:
    """`declare(reference, **options)`: an operator of its own name that is gone after the test."""
    made: list[dispatch.Operator] = []

    def make(reference: Callable[..., Any], **options: Any) -> dispatch.Operator:
        reference.__name__ = f"{reference.__name__}_{next(_numbers)}"  # torch.library keeps names for the whole process
        made.append(dispatch.operator(**options)(reference))
        return made[-1]

    yield make
    for operator in made:
        del registry.OPERATORS[operator.name]


@pytest.fixture
def chip() -> Iterator[Callable[..., registry.Backend]]:
    """`chip("name", missing=None, device_type="cpu", order=60)`: a backend that is gone after the test."""
    made: list[str] = []

    def make(name: str, missing: str | None = None, device_type: str = "cpu", order: int = 60) -> registry.Backend:
        backend = registry.Backend(
            name=name, title=f"test chip {name}", device_type=device_type, package=None, collective="gloo", order=order,
            probe=lambda: registry.Probe(missing),
        )  # fmt: skip
        registry.register_backend(backend)
        made.append(name)
        return backend

    requests.probe.cache_clear()
    yield make
    for name in made:
        del registry.BACKENDS[name]
    requests.probe.cache_clear()
