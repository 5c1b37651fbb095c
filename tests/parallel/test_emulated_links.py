"""Weak links for real: ranks in network namespaces whose links traffic control limits, against the cost model and the probe.

Slow, and skipped with the reason where namespaces or limits are not permitted. What is asserted a busy machine cannot move: bytes
that the kernel counted on each link, times that no wire permits, and the order of what is far apart. How near the times come to
the cost model is told by `python -m benchmarks.parallel.collectives`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from benchmarks.parallel import collectives, regret
from benchmarks.parallel.collectives import ACROSS, ALL, INSIDE
from benchmarks.parallel.links import Cluster, RankFailed, Wires, burst, why_not
from glm5_port.parallel.topology import ONE_RING, find_hardware

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

FOUR = Wires(machines=2, ranks=2, between="100 Mb/s", inside="800 Mb/s")
EIGHT = Wires(machines=4, ranks=2, between="200 Mb/s", inside="400 Mb/s")
SLOW_BETWEEN = next(n for n, wires in enumerate(regret.SETTINGS) if wires.between == "10 Mb/s")
HEADERS, RESENT = 1.02, 1.12
"""Bytes of frames over their payload: segments are handed on 64 KiB at a time, with one header; the largest share that loss in a
full queue was seen to add is 8 %."""
FEW = 64 * 2**10
"""Bytes of barriers and acknowledgements."""


@pytest.fixture(scope="module", params=[FOUR, EIGHT], ids=str)
def measured(request: pytest.FixtureRequest) -> tuple[Wires, list[collectives.Row]]:
    wires: Wires = request.param
    return wires, collectives.measure(wires, budget=0.1)


def test_links_carry_the_bytes_that_the_cost_model_charges(measured: tuple[Wires, list[collectives.Row]]) -> None:
    """The port of a rank and the trunk of a machine, by the counters of their devices."""
    _, rows = measured
    assert {row.group for row in rows} == {INSIDE, ACROSS, ALL}
    wrong = []
    for row in rows:
        for link, charged, sent in (
            ("port", row.charged_port, row.sent_port),
            ("trunk", row.charged_trunk, row.sent_trunk),
        ):
            if not charged <= sent <= charged * HEADERS * RESENT + FEW:
                wrong.append(f"{row.group} {row.collective}, {link}: {charged:,.0f} charged, {sent:,.0f} sent")
    assert not wrong


def test_nothing_is_faster_than_its_links(measured: tuple[Wires, list[collectives.Row]]) -> None:
    """Payload over rate, but for the burst that a limit lets pass; neither measured nor predicted."""
    wires, rows = measured
    for row in rows:
        port = (row.charged_port - burst(wires.inside)) / wires.payload("inside")
        trunk = (row.charged_trunk - burst(wires.between)) / wires.payload("between")
        assert row.measured >= 0.98 * max(port, trunk), row
        assert row.predicted >= 0.98 * max(port, trunk), row


def test_links_that_are_far_apart_come_out_in_order(measured: tuple[Wires, list[collectives.Row]]) -> None:
    """A share of a trunk is a quarter, or a sixteenth, of a port: what goes across takes longer than inside, as predicted."""
    wires, rows = measured
    apart = wires.payload("inside") * wires.ranks / wires.payload("between")
    found = {(row.group, row.collective): row for row in rows}
    for name in ("all_reduce", "all_gather", "send"):
        inside, across = found[INSIDE, name], found[ACROSS, name]
        assert across.predicted > 0.6 * apart * inside.predicted, name
        assert across.measured > 0.25 * apart * inside.measured, name


def test_a_probe_finds_the_links_that_were_set(tmp_path: Path) -> None:
    """Large messages are no faster than the limits, rates not much slower; one ring, and a file that the planner reads: inside is
    far faster than between, by sixteen times as they were set."""
    own = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "glm5_port", "probe", "--output", str(own), "--backend", "cpu", "--seconds", "0.4", "--json"]
    with Cluster(FOUR) as cluster:
        report = json.loads(cluster.run([*command, "--small", "256 KiB"])[0])
    node, trunk = report["links"]
    for links, limit, rate in (
        (node, FOUR.payload("inside"), FOUR.inside),
        (trunk, FOUR.payload("between") / FOUR.ranks, FOUR.between),
    ):
        for collective in ("send", "all_reduce"):  # both send the size of the message, of which a burst is let pass
            size = links["sizes"][1]
            assert (size - burst(rate)) / links["seconds"][collective][1] <= 1.02 * limit
            assert links["bandwidth"][collective] >= 0.4 * limit
    topology = find_hardware(str(own))
    assert (topology.node_devices, topology.collectives) == (2, ONE_RING)
    assert topology.levels[0].rate(2, "send") > 5 * topology.levels[1].rate(2, "send")


def test_plans_that_are_far_apart_come_out_in_order() -> None:
    """Of all plans of the small model the fastest and those that take twice as long as the one before, as predicted."""
    report = regret.measure(SLOW_BETWEEN, rounds=2, share=None, far=2.0)
    ordered = sorted(report["plans"].values(), key=lambda plan: plan["predicted"]["seconds"])
    assert len(ordered) >= 3
    for faster, slower in itertools.pairwise(ordered):
        assert slower["predicted"]["seconds"] >= 2 * faster["predicted"]["seconds"]
        assert min(slower["all"]) > min(faster["all"]), report["plans"]


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    failing = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('rank 1 has had enough')\ntime.sleep(60)"
    with Cluster(FOUR) as cluster, pytest.raises(RankFailed, match="rank 1 ended with 1:\nrank 1 has had enough"):
        cluster.run([sys.executable, "-c", failing])
