"""Weak links for real: ranks in network namespaces whose links traffic control limits, against the cost model and the probe.

Slow, and skipped with the reason where namespaces or limits are not permitted. Times are those of links, not of the processor: a
busy machine moves them by a few per cent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.parallel import collectives
from benchmarks.parallel.links import Cluster, RankFailed, Wires, why_not
from glm5_port.parallel.topology import ONE_RING, find_hardware

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

FOUR = Wires(machines=2, ranks=2, between="200 Mb/s", inside="400 Mb/s")
EIGHT = Wires(machines=4, ranks=2, between="200 Mb/s", inside="400 Mb/s")


@pytest.mark.parametrize("wires", [FOUR, EIGHT], ids=str)
def test_collectives_take_what_the_cost_model_says(wires: Wires) -> None:
    """Within 10 %; exchanges of whole messages between half and all of the rate, of which the model charges 70 %."""
    rows = collectives.measure(wires, budget=0.8)
    assert {row.group for row in rows} == {"inside", "across", "all"}
    wrong = []
    for row in rows:
        if row.exchanges:
            charged = collectives.EXACT if (row.group, row.collective) == ("across", "all_gather") else collectives.EXCHANGE
            reached = charged * row.predicted / row.measured
            wrong += [] if 0.45 <= reached <= 1.05 else [(row, f"{reached:.0%} of the rate")]
        else:
            wrong += [] if abs(row.error) <= 0.10 else [(row, f"{row.error:+.0%}")]
    assert not wrong


def test_a_probe_finds_the_links_that_were_set(tmp_path: Path) -> None:
    """Rates within 10 % of the limits, one ring, and a file that the planner reads: sixteen times between inside and between."""
    wires = Wires(machines=2, ranks=2, between="100 Mb/s", inside="800 Mb/s")
    own = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "glm5_port", "probe", "--output", str(own), "--backend", "cpu", "--seconds", "0.4", "--json"]
    with Cluster(wires) as cluster:
        report = json.loads(cluster.run([*command, "--small", "256 KiB"])[0])
    node, trunk = (links["bandwidth"] for links in report["links"])
    assert trunk["send"] == pytest.approx(wires.payload("between") / 2, rel=0.10)
    assert trunk["all_reduce"] == pytest.approx(wires.payload("between") / 2, rel=0.10)
    assert node["send"] == pytest.approx(wires.payload("inside"), rel=0.15)
    topology = find_hardware(str(own))
    assert (topology.node_devices, topology.collectives) == (2, ONE_RING)
    assert topology.levels[0].rate(2, "send") / topology.levels[1].rate(2, "send") == pytest.approx(16, rel=0.2)


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    failing = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('rank 1 has had enough')\ntime.sleep(60)"
    with Cluster(FOUR) as cluster, pytest.raises(RankFailed, match="rank 1 ended with 1:\nrank 1 has had enough"):
        cluster.run([sys.executable, "-c", failing])
