"""Collectives of plans for up to 1,024 ranks, counted on torch's fake process group: as many, and as many bytes, as the cost
model charged. The fake group answers with copies of what it is given: one process walks through the step of any rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm5_port.parallel.plan import DECODE, PREFILL, Layout
from tests.distributed.counting import LAYOUTS, charged, expected_counts

ROWS = list(LAYOUTS)


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What one rank of each layout does in a step, from one process: a process group of a size is for ever."""
    where = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.counting"], capture_output=True, text=True, env=os.environ | where, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("name", "phase"), [(name, phase) for name in ROWS for phase in (PREFILL, DECODE) if phase == PREFILL or "CP" not in name]
)
def test_bytes_are_those_that_the_cost_model_charged(counted: dict[str, Any], name: str, phase: str) -> None:
    layout: Layout = LAYOUTS[name]
    found = counted[name][phase]["bytes"]
    terms = charged(layout, phase)
    assert set(found) - {"vocabulary", "bookkeeping"} == {purpose for purpose, size in terms.items() if size}
    for purpose, size in terms.items():
        routed = purpose == "experts" and layout.exchange != "all_gather"  # by random routes, whose expectation is charged
        assert found.get(purpose, 0) == pytest.approx(size, rel=0.05 if routed else 1e-6), purpose


@pytest.mark.parametrize("name", ROWS)
def test_as_many_collectives_as_the_terms_say(counted: dict[str, Any], name: str) -> None:
    """By torch's CommDebugMode, which sees what reaches the process group."""
    assert counted[name][PREFILL]["seen"] == expected_counts(LAYOUTS[name])


def test_a_thousand_ranks_take_seconds(counted: dict[str, Any]) -> None:
    assert max(LAYOUTS[name].ranks for name in ROWS) == 1024
    assert set(counted) == set(ROWS)
