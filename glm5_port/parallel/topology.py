"""Wires as data: levels of links from the inside out, and what a group of ranks gets out of each.

    levels:
      - {name: node, devices: 8, shape: mesh, latency: 15 us, bandwidth: 196 GB/s, ...}
      - {name: cluster, devices: any, shape: switch, latency: 25 us, bandwidth: 25 GB/s, nic_shared_by: 1, ...}

Bandwidth is one direction of one device (of one NIC, where `nic_shared_by` devices share it). What a group of g of a level's n
devices gets depends on the shape:

    switch   bandwidth                            every pair has the full rate
    mesh     bandwidth * (g - 1) / (n - 1)        one link to each peer: a pair has one of n - 1 links
    ring     bandwidth if g = n, else half of it  a smaller group has one of two directions
    pcie     bandwidth                            one port a device; measured figures go into `by_group`
    socket   bandwidth                            NUMA nodes of a machine

A level may state measured bus bandwidth by group size (`by_group: {2: 20 GB/s, 8: 2 GB/s}`), which then counts instead, with the
nearest smaller size for sizes between, times those efficiencies that are stated; `glm5-port probe` writes such tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from glm5_port.errors import HardwareError, did_you_mean
from glm5_port.operators.exchange import FORMS
from glm5_port.parallel.description import Description
from glm5_port.parallel.hardware import CONFIDENCES, DATA, UNKNOWN, Chip, chip_names, find_chip

SWITCH, MESH, RING, PCIE, SOCKET = "switch", "mesh", "ring", "pcie", "socket"
SHAPES = (SWITCH, MESH, RING, PCIE, SOCKET)
ANY = "any"
"""Devices of the outermost level: as many as there are."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
BY_LEVEL, ONE_RING = "by_level", "one_ring"
"""How a library's collectives go over several levels: level by level where that is faster, as in NCCL and HCCL, or always in one
ring through all ranks, as in gloo."""
DEFAULT_EFFICIENCY = {"all_reduce": 0.8, "all_gather": 0.8, "reduce_scatter": 0.8, "all_to_all": 0.6, "send": 0.9}
"""Share of a link's rate that a collective reaches where the topology does not say. all_reduce: NCCL's 367 of 450 GB/s on H200;
all_to_all: 268 of 450 there, and 0.65-0.75 in gloo; send: 22.5 of 25 GB/s on Ascend's RoCE."""
EXCHANGES = FORMS
"""Forms of the exchange of experts, explained in cost/moe_exchange.py."""


@dataclass(frozen=True, slots=True)
class Level:
    """Links of one kind.

    Attributes:
        name: "node", "superpod", "cluster", ...
        devices: that one unit of this level holds; 0 for any number (the outermost level only).
        shape: one of `SHAPES`.
        latency: seconds that one step of a collective takes for any size.
        bandwidth: bytes a second of one device in one direction, when all devices of the level take part.
        efficiency: collective -> share of the bandwidth that it reaches.
        by_group: group size -> bytes a second that were measured as bus bandwidth; counts instead of bandwidth and shape.
        exchanges: forms of the exchange of experts that libraries offer over these links.
        nic_shared_by: devices that share a NIC; `bandwidth` is what one has when all of them send.
        quantised_exchange: whether tokens can be sent to experts in 8 bits over these links.
        source, confidence: of latency and bandwidth.
    """

    name: str
    devices: int
    shape: str
    latency: float
    bandwidth: float
    source: str
    confidence: str
    efficiency: Mapping[str, float] = field(default_factory=lambda: DEFAULT_EFFICIENCY)
    by_group: Mapping[int, float] = field(default_factory=dict)
    exchanges: tuple[str, ...] = EXCHANGES
    quantised_exchange: bool = True
    nic_shared_by: int = 1

    def rate(self, group: int, collective: str) -> float:
        """Bytes a second of one device in one direction, for a collective among `group` devices (or units of the level below)."""
        if self.by_group:
            measured = self.by_group[max((size for size in self.by_group if size <= group), default=min(self.by_group))]
            return measured * self.efficiency.get(collective, 1.0)
        share = 1.0
        if self.shape == MESH and self.devices > 1:
            share = min(1.0, (group - 1) / (self.devices - 1))
        elif self.shape == RING and 1 < group < self.devices:
            share = 0.5
        return self.bandwidth * share * self.efficiency[collective]


@dataclass(frozen=True, slots=True)
class Topology:
    """A machine room: one kind of chip, and levels of links from the inside out.

    Attributes:
        name, title: what it is called.
        chip: the devices.
        levels: from the innermost; the last takes any number of devices.
        collectives: "by_level" or "one_ring": how collectives go over several levels.
        tokens_overlap: whether communication runs beside compute without taking its units (copy engines, RDMA offload).
        calibrated: whether a probe measured this very hardware. Without, absolute times are estimates.
    """

    name: str
    title: str
    chip: Chip
    levels: tuple[Level, ...]
    collectives: str = BY_LEVEL
    tokens_overlap: bool = False
    calibrated: bool = False

    @property
    def node_devices(self) -> int:
        """Devices of one machine."""
        return self.levels[0].devices

    @property
    def scatters_pairwise(self) -> bool:
        """Whether a reduce-scatter is an all-to-all and a sum, as this library does it over gloo (collectives.py)."""
        return self.collectives == ONE_RING and self.chip.backend == "cpu"

    def factors(self, stride: int, size: int) -> tuple[int, ...]:
        """How a group of ranks first, first + stride, ... lies on the levels: how many of its members (then of its parts) meet
        on each level. (8, 2) is 16 ranks as eight in each of two nodes.

        Raises:
            HardwareError: the group would cross a boundary unevenly, like six ranks over nodes of four.
        """
        factors, rest, unit = [], size, stride
        for level in self.levels:
            if level.devices == 0:
                here = rest
            elif unit >= level.devices:
                here = 1
            else:
                here = min(rest, level.devices // unit)
                if level.devices % unit or rest % here:
                    raise HardwareError(
                        f"{size} ranks with stride {stride} do not fill units of {level.devices} ({level.name}) evenly"
                    )
            factors.append(here)
            rest //= here
            unit = max(unit * here, level.devices)
        return tuple(factors)

    def scaled(self, level: int, factor: float) -> Topology:
        """The same with the bandwidth of one level multiplied: how a choice depends on a link."""
        changed = self.levels[level]
        by_group = {size: rate * factor for size, rate in changed.by_group.items()}
        levels = list(self.levels)
        levels[level] = replace(changed, bandwidth=changed.bandwidth * factor, by_group=by_group)
        return replace(self, levels=tuple(levels))


def read_topology(path: str | PathLike[str]) -> Topology:
    """A topology from its file.

    Raises:
        HardwareError: an unknown key, a missing unit, or a contradiction; with file and line.
    """
    file = Description.read(path, "a topology")
    chip_line = file.text("chip")
    levels = [_level(part) for part in file.parts("levels")]
    topology = Topology(
        name=file.text("name"),
        title=file.text("title"),
        chip=find_chip(chip_line, Path(path).parent),
        levels=tuple(level for _, level in levels),
        collectives=file.choice("collectives", (BY_LEVEL, ONE_RING)) if file.has("collectives") else BY_LEVEL,
        tokens_overlap=file.has("tokens_overlap") and file.choice("tokens_overlap", ("yes", "no")) == "yes",
        calibrated=file.has("calibrated") and file.choice("calibrated", ("yes", "no")) == "yes",
    )
    file.finish()
    _check_levels(levels)
    return topology


def _level(part: Description) -> tuple[Description, Level]:
    count = part.integer("devices", or_else=ANY)
    bandwidth = part.quantity("bandwidth", "bandwidth")
    shared = part.integer("nic_shared_by") if part.has("nic_shared_by") else 1
    efficiency = {} if part.has("by_group") else dict(DEFAULT_EFFICIENCY)
    if part.has("efficiency"):
        own = part.part("efficiency")
        efficiency |= {name: own.fraction(name) for name in COLLECTIVES if own.has(name)}
        own.finish()
    by_group: dict[int, float] = {}
    if part.has("by_group"):
        table = part.part("by_group")
        for size in table.left():
            if not size.isdigit() or int(size) < 2 or (count and int(size) > count):
                table.refuse(
                    size, f"by_group has a group of {size}; this level has {count or ANY} devices, and a group at least 2"
                )
            by_group[int(size)] = table.quantity(size, "bandwidth")
    level = Level(
        name=part.text("name"),
        devices=count,
        shape=part.choice("shape", SHAPES),
        latency=part.quantity("latency", "time"),
        bandwidth=bandwidth / shared,
        source=part.text("source"),
        confidence=part.choice("confidence", CONFIDENCES),
        efficiency=efficiency,
        by_group=by_group,
        exchanges=part.choices("exchanges", EXCHANGES) if part.has("exchanges") else EXCHANGES,
        quantised_exchange=not part.has("quantised_exchange") or part.choice("quantised_exchange", ("yes", "no")) == "yes",
        nic_shared_by=shared,
    )
    part.finish()
    return part, level


def _check_levels(levels: Sequence[tuple[Description, Level]]) -> None:
    """Units nest, the last level takes what there is, names differ."""
    names: set[str] = set()
    for place, (part, level) in enumerate(levels):
        last = place == len(levels) - 1
        if level.name in names:
            part.refuse("name", f"two levels are called {level.name!r}")
        names.add(level.name)
        if (level.devices == 0) != last:
            part.refuse("devices", f"level {level.name!r}: the last level, and only it, holds `devices: {ANY}`")
        if level.confidence == UNKNOWN:
            part.refuse(
                "confidence", f"level {level.name!r}: a plan needs its bandwidth; write an estimate as {CONFIDENCES[2]!r}"
            )
        if place and not last and level.devices % levels[place - 1][1].devices:
            inner = levels[place - 1][1]
            part.refuse(
                "devices", f"level {level.name!r} has {level.devices} devices, which units of {inner.devices} do not fill"
            )
        if place and not last and level.devices <= levels[place - 1][1].devices:
            part.refuse("devices", f"level {level.name!r} holds no more than the level inside it")
        below = levels[place - 1][1].devices if place else 1
        if below % level.nic_shared_by:
            part.refuse(
                "nic_shared_by",
                f"level {level.name!r}: {level.nic_shared_by} devices share a NIC, but units of the level inside hold {below}",
            )
        if level.shape == MESH and level.devices == 0:
            part.refuse("shape", f"level {level.name!r}: a mesh has a number of devices")


def topology_names() -> list[str]:
    """Topologies that come with the package."""
    return sorted(path.stem for path in (DATA / "topologies").glob("*.yaml"))


def find_hardware(name: str) -> Topology:
    """A topology by name or file, or the only one of a chip.

    Args:
        name: a packaged topology, a path to a YAML file, or a chip that has exactly one packaged topology.

    Raises:
        HardwareError: nothing of that name, or a chip with several topologies.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_topology(name)
    names = topology_names()
    if name in names:
        return read_topology(DATA / "topologies" / f"{name}.yaml")
    if name in chip_names():
        found = [t for t in (read_topology(DATA / "topologies" / f"{each}.yaml") for each in names) if t.chip.name == name]
        if len(found) == 1:
            return found[0]
        which = ", ".join(t.name for t in found) or "none: write a topology file (docs/parallel.md)"
        raise HardwareError(f"{name!r} is a chip; say how it is wired\n  topologies with it: {which}")
    known = [*names, *chip_names()]
    raise HardwareError(
        f"{name!r} is no topology, chip or YAML file{did_you_mean(name, known)}\n"
        f"  topologies: {', '.join(names)}\n  your own: a YAML file, docs/parallel.md says how"
    )
