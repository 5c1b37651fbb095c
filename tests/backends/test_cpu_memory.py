"""Prepared INT4 experts take the memory of their bits, while they are loaded too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glm5_port.backends.cpu import extension

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(bool(extension.isa_missing("scalar")), reason=f"NOT TESTED: {extension.isa_missing('scalar')}"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="NOT TESTED: sizes are read from /proc of Linux"),
]


def _measured(experts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cpu.loading", "--experts", str(experts), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=REPOSITORY)
    return json.loads(done.stdout)


def test_some_experts_take_their_bits_and_no_second_copy() -> None:
    """Beside twelve experts there may be one on the way, and what malloc holds."""
    report = _measured(12)
    assert report["weight_bytes"] == report["floor_bytes"]
    assert report["floor_bytes"] <= report["loaded_bytes"] <= report["peak_bytes"] <= 1.25 * report["floor_bytes"]


@pytest.mark.slow
def test_all_experts_of_a_layer_take_five_percent_more_than_their_bits_at_most() -> None:
    report = _measured(256)
    assert report["floor_bytes"] == pytest.approx(5.436e9, rel=1e-3)
    assert report["peak_bytes"] <= 1.05 * report["floor_bytes"]
