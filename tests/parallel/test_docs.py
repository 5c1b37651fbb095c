"""What docs/parallel.md shows is true: its topology reads, its constants are the code's."""

from __future__ import annotations

import re
from pathlib import Path

from glm5_port.parallel.cost.service import ACCEPTANCE, SHARED_UNITS
from glm5_port.parallel.cost.step import DEFAULT_EFFICIENCY
from glm5_port.parallel.hardware import chip_names, find_chip
from glm5_port.parallel.topology import read_topology
from tests.parallel.questions import best, question

TEXT = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")


def test_the_topology_in_the_docs_reads(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    (tmp_path / "my-servers.yaml").write_text(found[1])
    topology = read_topology(tmp_path / "my-servers.yaml")
    assert topology.levels[1].bandwidth == 25e9  # 400 Gb/s, shared by two
    assert best(question("hgx-h200", topology=topology, devices=16)).served.output_rate > 0


def test_constants_in_the_docs_are_those_of_the_code() -> None:
    shares = ", ".join(f"{DEFAULT_EFFICIENCY[name]:.2f}" for name in ("dense", "grouped", "attention", "memory"))
    assert f"| {shares} of the peak |" in TEXT
    assert f"| {DEFAULT_EFFICIENCY['indexer']} of the peak, 4 passes over scores |" in TEXT
    assert f"| {ACCEPTANCE[False]:.2f} each (GLM-5), {ACCEPTANCE[True]:.2f} (GLM-5.2) |" in TEXT
    assert f"communication takes {SHARED_UNITS:.0%} of the units".replace("%", " %") in TEXT


def test_chips_without_figures_are_the_ones_that_the_docs_name() -> None:
    missing = [find_chip(name).title for name in chip_names() if find_chip(name).missing()]
    assert missing == ["Enflame S60", "Hygon DCU BW1000"]
    assert "the Hygon\nBW1000 and the Enflame S60 so far" in TEXT
