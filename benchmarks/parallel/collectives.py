"""Collectives over emulated links, timed, beside what the cost model says.

    python -m benchmarks.parallel.collectives [--machines 2] [--ranks 2] [--between "200 Mb/s"] [--inside "400 Mb/s"] [--json]

The topology is the one that was asked for, nothing is fitted: links carry the payload of their frames, and gloo's collectives
make one ring through all ranks at the full rate. Only where two ranks exchange messages of one piece (all-to-all, reduce-scatter,
which is one here, and the ring of two) gloo uses both directions of a link now at the same time, now one after the other,
whatever the queue and the congestion control: 50 to 100 % of the rate, for which 70 % is charged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from typing import NamedTuple

from benchmarks.parallel.links import Cluster, Wires
from glm5_port.parallel.cost.collectives import all_gather, all_reduce, send
from glm5_port.parallel.hardware import MEASURED
from glm5_port.parallel.probe import Group, collective_call, neighbours
from glm5_port.parallel.topology import COLLECTIVES, ONE_RING, SWITCH, Level, Topology, find_hardware

SIZE = 4 * 2**20
EXACT, EXCHANGE = 1.0, 0.7
EFFICIENCY = {"all_reduce": EXACT, "all_gather": EXACT, "send": EXACT, "all_to_all": EXCHANGE, "reduce_scatter": EXCHANGE}
"""Of gloo over TCP."""
LATENCY = 200e-6
"""Of a round: TCP and a wake-up."""
INSIDE, ACROSS, ALL = "inside", "across", "all"


class Row(NamedTuple):
    """One collective of one kind of group: seconds."""

    group: str
    collective: str
    predicted: float
    measured: float

    @property
    def exchanges(self) -> bool:
        """Whether pairs exchange whole messages, so that the factor of all-to-all counts."""
        return self.collective in ("all_to_all", "reduce_scatter") or (self.collective == "all_gather" and self.group != ALL)

    @property
    def error(self) -> float:
        """Measured over predicted, less 1."""
        return self.measured / self.predicted - 1


def topology_of(wires: Wires) -> Topology:
    """What was asked for, as the planner describes it."""
    inside = EFFICIENCY | ({"all_gather": EXCHANGE} if wires.ranks == 2 else {})
    node = Level("node", wires.ranks, SWITCH, LATENCY, wires.payload("inside"), "emulated", MEASURED, inside)
    trunk = wires.payload("between") / wires.ranks
    cluster = Level("cluster", 0, SWITCH, LATENCY, trunk, "emulated", MEASURED, EFFICIENCY, nic_shared_by=wires.ranks)
    return Topology("emulated", str(wires), find_hardware("xeon-4-2s").chip, (node, cluster), collectives=ONE_RING)


def cases(wires: Wires) -> list[tuple[str, str]]:
    """(kind of group, collective)."""
    kinds = [INSIDE] * (wires.ranks > 1) + [ACROSS] * (wires.machines > 1) + [ALL] * (wires.ranks > 1 < wires.machines)
    return [(kind, each) for kind in kinds for each in COLLECTIVES if (kind, each) != (ALL, "send")]


def predict(wires: Wires, kind: str, collective: str) -> float:
    """Seconds of a collective by the cost model; an all-to-all sends to every rank alike."""
    topology, ranks, machines = topology_of(wires), wires.ranks, wires.machines
    factors = {INSIDE: (ranks, 1), ACROSS: (1, machines), ALL: (ranks, machines)}[kind]
    if collective == "send":
        return send(topology, 1 if kind == INSIDE else ranks, SIZE).seconds
    if collective == "all_reduce":
        return all_reduce(topology, factors, SIZE).seconds
    if collective == "all_gather":
        return all_gather(topology, factors, SIZE).seconds
    world, slowest, unit = factors[0] * factors[1], 0.0, 1
    for level, group in zip(topology.levels, factors, strict=True):
        if group > 1:
            part = (unit * group - unit) / world * SIZE
            slowest = max(slowest, level.latency + part / level.rate(group, "all_to_all"))
        unit *= group
    return slowest


def work(wires: Wires, budget: float) -> list[float]:
    """Seconds of each case, on every rank alike; what a rank runs."""
    from glm5_port.registry import BACKENDS

    group = Group(BACKENDS["cpu"], {"wires": str(wires)})
    members = {
        INSIDE: partial(neighbours, wires.ranks),
        ACROSS: lambda rank: tuple(range(rank % wires.ranks, wires.world, wires.ranks)),
        ALL: partial(neighbours, wires.world),
    }
    groups = {kind: group.subgroup(members[kind]) for kind in dict.fromkeys(kind for kind, _ in cases(wires))}
    return [group.time(collective_call(name, groups[kind], SIZE, group.device), budget) for kind, name in cases(wires)]


def measure(wires: Wires, budget: float = 1.0) -> list[Row]:
    """Runs every case on emulated links.

    Args:
        wires: the links.
        budget: seconds of one case.

    Raises:
        NotPermitted: no links can be emulated here.
    """
    command = [sys.executable, "-m", "benchmarks.parallel.collectives", "--worker", str(budget)]
    command += [
        "--machines",
        str(wires.machines),
        "--ranks",
        str(wires.ranks),
        "--between",
        wires.between,
        "--inside",
        wires.inside,
    ]
    with Cluster(wires) as cluster:
        seconds = json.loads(cluster.run(command)[0])
    return [Row(kind, name, predict(wires, kind, name), found) for (kind, name), found in zip(cases(wires), seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--between", default="200 Mb/s")
    parser.add_argument("--inside", default="400 Mb/s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wires = Wires(arguments.machines, arguments.ranks, arguments.between, arguments.inside)
    if arguments.worker is not None:
        seconds = work(wires, arguments.worker)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds))
        return
    rows = measure(wires)
    if arguments.json:
        print(json.dumps([row._asdict() | {"error": row.error} for row in rows], indent=2))
        return
    print(f"{wires}; {SIZE:,} bytes; seconds")
    for row in rows:
        times = f"predicted {row.predicted:>7.4f}   measured {row.measured:>7.4f}   {row.error:+.0%}"
        print(f"  {row.group:<8} {row.collective:<16} {times}")


if __name__ == "__main__":
    main()
