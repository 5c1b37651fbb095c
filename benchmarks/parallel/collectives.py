"""Collectives over emulated links, timed, beside what the cost model says.

    python -m benchmarks.parallel.collectives [--machines 2] [--ranks 2] [--between "200 Mb/s"] [--inside "400 Mb/s"] [--json]

The topology is the one that was asked for, nothing is fitted: links carry the payload of their frames, and every collective
reaches the full rate. Exit code 1 where one is further than 10 % from the cost model; for exchanges of messages among several
machines 20 %, because the shares of streams that meet at a port are uneven.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from benchmarks.parallel.links import Cluster, Wires, bytes_sent
from glm5_port.parallel.cost.collectives import all_gather, all_reduce, all_to_all, send
from glm5_port.parallel.cost.terms import Cost
from glm5_port.parallel.hardware import MEASURED
from glm5_port.parallel.probe import Group, collective_call, neighbours
from glm5_port.parallel.topology import COLLECTIVES, ONE_RING, SWITCH, Level, Topology, find_hardware

SIZE = 4 * 2**20
EFFICIENCY = dict.fromkeys(COLLECTIVES, 1.0)
"""Of gloo over TCP."""
LATENCY = 200e-6
"""Of a round: TCP and a wake-up."""
INSIDE, ACROSS, ALL = "inside", "across", "all"
BOUND, UNEVEN = 0.10, 0.20
"""Largest error of a collective; of exchanges in which streams from several machines meet at a port."""


class Row(NamedTuple):
    """One collective of one kind of group.

    Attributes:
        group, collective: what ran.
        predicted, measured: seconds.
        charged_port, charged_trunk: bytes that the cost model says one rank, and one machine, sends.
        sent_port, sent_trunk: bytes that the kernel counted there, frames with their headers; of those that sent most.
    """

    group: str
    collective: str
    predicted: float
    measured: float
    charged_port: float
    charged_trunk: float
    sent_port: float
    sent_trunk: float

    @property
    def bound(self) -> float:
        """Largest error that passes."""
        return UNEVEN if self.group != INSIDE and self.collective in ("all_to_all", "reduce_scatter") else BOUND

    @property
    def error(self) -> float:
        """Measured over predicted, less 1."""
        return self.measured / self.predicted - 1


def topology_of(wires: Wires) -> Topology:
    """What was asked for, as the planner describes it."""
    node = Level("node", wires.ranks, SWITCH, LATENCY, wires.payload("inside"), "emulated", MEASURED, EFFICIENCY)
    trunk = wires.payload("between") / wires.ranks
    cluster = Level("cluster", 0, SWITCH, LATENCY, trunk, "emulated", MEASURED, EFFICIENCY, nic_shared_by=wires.ranks)
    return Topology("emulated", str(wires), find_hardware("xeon-4-2s").chip, (node, cluster), collectives=ONE_RING)


def cases(wires: Wires) -> list[tuple[str, str]]:
    """(kind of group, collective)."""
    kinds = [INSIDE] * (wires.ranks > 1) + [ACROSS] * (wires.machines > 1) + [ALL] * (wires.ranks > 1 < wires.machines)
    return [(kind, each) for kind in kinds for each in COLLECTIVES if (kind, each) != (ALL, "send")]


def charge(topology: Topology, wires: Wires, kind: str, collective: str) -> Cost:
    """What the cost model says of a collective; an all-to-all sends to every rank alike."""
    factors = {INSIDE: (wires.ranks, 1), ACROSS: (1, wires.machines), ALL: (wires.ranks, wires.machines)}[kind]
    if collective == "send":
        return send(topology, 1 if kind == INSIDE else wires.ranks, SIZE)
    if collective == "all_reduce":
        return all_reduce(topology, factors, SIZE)
    if collective == "all_to_all":
        return all_to_all(topology, factors, SIZE)
    return all_gather(topology, factors, SIZE, collective)


def charged_trunk(wires: Wires, kind: str, collective: str) -> float:
    """Bytes of a machine's trunk that the cost model takes time for: the seconds where it carries a byte a second, and all else
    is free."""
    if kind == INSIDE:
        return 0.0
    topology, whole = topology_of(wires), dict.fromkeys(COLLECTIVES, 1.0)
    node, cluster = (replace(level, latency=0.0, efficiency=whole) for level in topology.levels)
    levels = (replace(node, bandwidth=1e30), replace(cluster, bandwidth=1 / wires.ranks))
    return charge(replace(topology, levels=levels), wires, kind, collective).seconds


def work(wires: Wires, budget: float) -> list[tuple[float, float, float]]:
    """(seconds, bytes of the port, bytes of the trunk) of each case, on every rank alike; what a rank runs."""
    from glm5_port.registry import BACKENDS

    group = Group(BACKENDS["cpu"], {"wires": str(wires)})
    members = {
        INSIDE: partial(neighbours, wires.ranks),
        ACROSS: lambda rank: tuple(range(rank % wires.ranks, wires.world, wires.ranks)),
        ALL: partial(neighbours, wires.world),
    }
    groups = {kind: group.subgroup(members[kind]) for kind in dict.fromkeys(kind for kind, _ in cases(wires))}
    found = []
    for kind, name in cases(wires):
        call = collective_call(name, groups[kind], SIZE, group.device)
        seconds = group.time(call, budget)
        port, trunk = group.slowest(count(call))
        found.append((seconds, port, trunk))
    return found


def count(call: Callable[[], Any]) -> list[float]:
    """Bytes of this rank's port and its machine's trunk during a call; what all ranks received has been sent."""
    dist.barrier()
    before = bytes_sent()
    dist.barrier()
    call()
    dist.barrier()
    return [float(after - first) for after, first in zip(bytes_sent(), before, strict=True)]


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
        found = json.loads(cluster.run(command)[0])
    rows = []
    for (kind, name), (seconds, port, trunk) in zip(cases(wires), found, strict=True):
        charged = charge(topology_of(wires), wires, kind, name)
        rows.append(Row(kind, name, charged.seconds, seconds, charged.link_bytes, charged_trunk(wires, kind, name), port, trunk))
    return rows


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
        found = work(wires, arguments.worker)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    rows = measure(wires)
    wrong = [f"{row.group} {row.collective}" for row in rows if abs(row.error) > row.bound]
    if arguments.json:
        print(json.dumps([row._asdict() | {"error": row.error, "bound": row.bound} for row in rows], indent=2))
    else:
        print(f"{wires}; {SIZE:,} bytes\n\n| group | collective | predicted | measured | error | bytes of a trunk over charged |")
        print("|---|---|---:|---:|---:|---:|")
        print("\n".join(map(line, rows)))
        print(f"\nFURTHER OFF THAN ITS BOUND: {', '.join(wrong)}" if wrong else "\nevery collective is within its bound")
    sys.exit(1 if wrong else 0)


def line(row: Row) -> str:
    """Of the table."""
    over = f"{row.sent_trunk / row.charged_trunk:.3f}" if row.charged_trunk else ""
    times = f"{row.predicted:.4f} s | {row.measured:.4f} s | {row.error:+.1%} (at most {row.bound:.0%})"
    return f"| {row.group} | {row.collective} | {times} | {over} |"


if __name__ == "__main__":
    main()
