"""A card that is not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from glm5_port import registry, requests
from glm5_port.registry import Probe


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose cuda is usable."""
    usable = dataclasses.replace(registry.BACKENDS["cuda"], probe=lambda: Probe(None))
    monkeypatch.setitem(registry.BACKENDS, "cuda", usable)
    requests.probe.cache_clear()
    yield
    monkeypatch.undo()
    requests.probe.cache_clear()
