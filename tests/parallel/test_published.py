"""Published measurements that nothing was fitted to are reproduced within the error that docs/parallel.md states."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm5_port.parallel.planner import BAND
from tests.parallel.published import Row, rows, table

ROWS = rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.group.split(',')[0]}: {row.name}")
def test_a_measurement_is_reproduced(row: Row) -> None:
    above = row.within if row.above is None else row.above
    assert -row.within <= row.error <= above, f"{row.name}: predicted {row.predicted:.4g}, measured {row.measured:.4g}"


def test_the_band_that_plans_print_holds_every_measurement() -> None:
    for row in ROWS:
        assert BAND[0] <= row.measured / row.predicted <= BAND[1]


def test_the_docs_show_this_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    assert table() in text, "run python -m tests.parallel.published and copy what it prints into docs/parallel.md"
