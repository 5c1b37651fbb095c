"""Set-up for all tests: the parity plugin also where the package is not installed, one thread, and clean flags."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata

import pytest
import torch

from glm5_port import flags

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
