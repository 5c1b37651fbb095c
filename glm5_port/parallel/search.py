"""Every layout of a role on given devices, and the best form of each: exchange, micro-batches, drafts.

Meshes are enumerated; within a mesh the form of the exchange is chosen by price, because its cost adds to the rest. Prices of
a prompt and of a decode step are remembered, so that a form costs one addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from glm5_port.config import Glm5Config
from glm5_port.errors import HardwareError
from glm5_port.parallel.cost.memory import DeviceMemory, device_memory
from glm5_port.parallel.cost.service import Prices, Served, Workload, prompt_times, serve_mixed, serve_split
from glm5_port.parallel.engines import Engine
from glm5_port.parallel.plan import ALL_GATHER, ALL_REDUCE, DECODE, MIXED, PREFILL, Layout, Role, problems
from glm5_port.parallel.topology import MESH, Topology

LARGEST_TENSOR, LARGEST_PIPELINE = 64, 16
DRAFTS = 3
"""Tokens that the MTP layer drafts where it is used: the setting of every published GLM-5 recipe."""
LEAST_EXPERTS, LEAST_TOKENS = 8, 128
"""Experts and tokens of a device at and below which copies of experts do not pay (vllm-ascend's advice on its balancer)."""
REFINED = 16
"""Meshes of which variants beyond the exchange are tried."""


class Pins(NamedTuple):
    """Sizes that the user fixed; None is free."""

    tensor: int | None = None
    data: int | None = None
    context: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    replicas: int | None = None
    exchange: str | None = None
    drafts: int | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of the planner.

    Attributes:
        config, topology: the model and the hardware.
        devices: of the whole deployment.
        weights, kv_format: how the model is stored.
        work: the requests.
        concurrency: requests at the same time, or None with targets.
        tpot, ttft: targets in seconds, or None.
        engines: whose rules apply; a layout must suit one of them.
        pins: what the user fixed.
    """

    config: Glm5Config
    topology: Topology
    devices: int
    weights: str
    kv_format: str
    work: Workload
    concurrency: int | None
    tpot: float | None
    ttft: float | None
    engines: tuple[Engine, ...]
    pins: Pins = field(default_factory=Pins)
    known: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    """Answers and prices that links do not change, remembered."""

    @property
    def kinds(self) -> tuple[str, str]:
        """(weights, kv_format)."""
        return self.weights, self.kv_format

    @property
    def context(self) -> int:
        """Tokens of a finished request."""
        return self.work.input_tokens + self.work.output_tokens

    def prices(self, topology: Topology) -> Prices:
        """Of steps on the topology of the question, with links of any speed."""
        continuous = any(engine.continuous for engine in self.engines)
        return Prices(self.config, topology, self.kinds, self.work, self.known.setdefault(("work",), {}), continuous=continuous)

    def memory(self, layout: Layout, role: str) -> DeviceMemory:
        """Memory of the fullest device of a role."""
        key = (
            replace(
                layout, exchange=ALL_REDUCE if layout.exchange == ALL_REDUCE else ALL_GATHER, prefill_exchange="", overlap=False
            ),
            role,
            "memory",
        )
        if key not in self.known:
            self.known[key] = device_memory(self.config, self.topology, key[0], *self.kinds, role, self.work.chunk)
        return self.known[key]

    def meets(self, served: Served) -> bool:
        """Whether the targets are met."""
        return (self.tpot is None or served.tpot <= self.tpot) and (self.ttft is None or served.ttft <= self.ttft)


class Mesh(NamedTuple):
    """A layout before its exchange is chosen."""

    layout: Layout
    replicas: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A deployment that works, and what it delivers.

    Attributes:
        roles: of the plan.
        served: at the concurrency that suits it.
        memory: of each role's fullest device.
    """

    roles: tuple[Role, ...]
    served: Served
    memory: tuple[DeviceMemory, ...]

    @property
    def mesh(self) -> tuple[tuple[int, ...], ...]:
        """What makes two plans different: sizes, not the form of the exchange."""
        return tuple(
            (
                role.replicas,
                role.layout.tensor,
                role.layout.data,
                role.layout.context,
                role.layout.pipeline,
                role.layout.expert,
                role.layout.expert_tensor,
            )
            for role in self.roles
        )


@dataclass
class Dropped:
    """What was not possible, for the user: why, and how close it came."""

    short: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    impossible: dict[str, int] = field(default_factory=dict)
    late: dict[str, tuple[float, float]] = field(default_factory=dict)

    def miss(self, layout: Layout, served: Served) -> None:
        """Remembers a layout that misses a target, at its fastest: (TPOT, TTFT)."""
        self.late.setdefault(str(layout), (served.tpot, served.ttft))

    def count(self, table: dict[str, int], reasons: Iterable[str]) -> None:
        """Counts reasons."""
        for reason in reasons:
            table[reason] = table.get(reason, 0) + 1


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def meshes(question: Question, devices: int, role: str, dropped: Dropped) -> Iterator[Mesh]:
    """Every mesh of a role on `devices` devices that the model and the boundaries of machines allow, without its exchange."""
    pins, config = question.pins, question.config
    for replicas in divisors(devices):
        for pipeline in divisors(devices // replicas):
            stage = devices // replicas // pipeline
            for tensor in divisors(stage):
                for context in divisors(stage // tensor) if role == PREFILL else [1]:
                    for expert in sorted({1, stage}):
                        sizes = (tensor, stage // tensor // context, context, pipeline, expert, replicas)
                        if not _wanted(sizes, pins, role) or pipeline > LARGEST_PIPELINE or tensor > LARGEST_TENSOR:
                            continue
                        layout = Layout(
                            tensor=tensor,
                            data=sizes[1],
                            context=context,
                            pipeline=pipeline,
                            expert=expert,
                            expert_tensor=stage // expert,
                            redundant_experts=-config.n_routed_experts % expert if expert <= config.n_routed_experts else 0,
                            exchange=ALL_REDUCE if tensor == stage else ALL_GATHER,
                            drafts=_drafts(question, role),
                        )
                        reasons = [*problems(layout, config, role), *_boundaries(question.topology, layout)]
                        reasons += [] if any(pins) else mesh_traps(question.topology, layout)
                        dropped.count(dropped.impossible, reasons)
                        if not reasons:
                            yield Mesh(layout, replicas)


def _wanted(sizes: tuple[int, int, int, int, int, int], pins: Pins, role: str) -> bool:
    fixed = (pins.tensor, pins.data, pins.context if role == PREFILL else None, pins.pipeline, pins.expert, pins.replicas)
    return all(pin is None or pin == size for pin, size in zip(fixed, sizes, strict=True))


def _drafts(question: Question, role: str) -> int:
    if question.pins.drafts is not None:
        return question.pins.drafts if role != PREFILL else 0
    return DRAFTS if role != PREFILL and question.config.mtp_layer is not None else 0


def _boundaries(topology: Topology, layout: Layout) -> list[str]:
    """Reasons why groups would cross machines unevenly."""
    node = topology.node_devices
    if layout.ranks % node and node % layout.ranks:
        return [f"replicas of {layout.ranks} ranks fill machines of {node} devices unevenly"]
    try:
        topology.factors(1, layout.tensor)
        topology.factors(layout.tensor, layout.context)
        topology.factors(1, layout.stage_ranks)
    except HardwareError as error:
        return [str(error)]
    return []


def mesh_traps(topology: Topology, layout: Layout) -> list[str]:
    """Groups that use few links of a mesh: on an A2 node TP2 and TP4 have 17-34 % of a switch's bandwidth, TP8 86 %. All or
    none."""
    node = topology.levels[0]
    groups = {"tensor": layout.tensor, "context": layout.tensor * layout.context, "expert": layout.stage_ranks}
    return [
        f"{name} groups of {size} on a mesh of {node.devices} have {size - 1} of {node.devices - 1} links; "
        f"nearest: 1 or {node.devices}"
        for name, size in groups.items()
        if node.shape == MESH and 1 < size < node.devices
    ]


def forms(question: Question, layout: Layout, role: str, dropped: Dropped) -> list[Layout]:
    """The layout with every form of exchange that the links carry and one of the engines can express, in the fewest bits that
    it can."""
    key = ("forms", layout, role)
    if key not in question.known:
        question.known[key] = list(_forms(question, layout, role, dropped))
    return question.known[key]


def _forms(question: Question, layout: Layout, role: str, dropped: Dropped) -> Iterator[Layout]:
    levels = question.topology.levels
    factors = question.topology.factors(1, layout.stage_ranks)
    spanned = [level for level, group in zip(levels, factors, strict=True) if group > 1]
    known = [name for name in spanned[-1].exchanges if question.pins.exchange in (None, name)] if spanned else [layout.exchange]
    quantised = bool(spanned) and all(level.quantised_exchange for level in spanned)
    for name in known:
        for prefill in known if role == MIXED else [name]:
            for bits in (8, 16) if quantised and (name, prefill) != (ALL_REDUCE, ALL_REDUCE) else (16,):
                form = replace(layout, exchange=name, prefill_exchange="" if prefill == name else prefill, exchange_bits=bits)
                if problems(form, question.config, role):
                    break
                reasons = [
                    each.reasons(question.topology, form, role, question.weights, question.config) for each in question.engines
                ]
                if not all(reasons):
                    yield form
                    break
                dropped.count(dropped.refused, (reason for each in reasons for reason in each))


def fits(question: Question, mesh: Mesh, role: str, dropped: Dropped) -> DeviceMemory | None:
    """Memory of the fullest device, or None when not one sequence fits."""
    memory = question.memory(mesh.layout, role)
    context = question.work.input_tokens if role == PREFILL else question.context
    if memory.sequences(context) >= 1:
        return memory
    dropped.short[f"{mesh.replicas} x {mesh.layout}"] = -(memory.pool - memory.cache_per_token * context)
    return None


def best_mixed(question: Question, prices: Prices, mesh: Mesh, dropped: Dropped) -> Candidate | None:
    """The best form of a mesh that does both, at the concurrency that was asked for or that the targets allow."""
    memory = fits(question, mesh, MIXED, dropped)
    if memory is None:
        return None
    room = memory.sequences(question.context) * mesh.layout.data * mesh.replicas
    best: Candidate | None = None
    for form in forms(question, mesh.layout, MIXED, dropped):
        served = _most(question, room, partial(serve_mixed, prices, form, mesh.replicas))
        if not question.meets(served):
            dropped.miss(form, served)
        elif best is None or served.output_rate > best.served.output_rate:
            best = Candidate((Role(name=MIXED, layout=form, replicas=mesh.replicas),), served, (memory,))
    return best


def _most(question: Question, room: int, serve: Callable[[int], Served]) -> Served:
    """What is delivered at the concurrency that was asked for, or as many as fit.

    With targets, at the largest power of two (or as many as fit) that meets them; bisection finds it, as more requests are never
    faster. One request where nothing meets them.
    """
    if question.concurrency is not None:
        return serve(min(question.concurrency, room))
    steps = [2**power for power in range(room.bit_length())]
    steps += [room] if steps[-1] < room else []
    meeting, missing = 0, len(steps)
    while missing - meeting > 1:
        middle = (meeting + missing) // 2
        if question.meets(serve(steps[middle])):
            meeting = middle
        else:
            missing = middle
    return serve(steps[meeting])


class PrefillOption(NamedTuple):
    """A layout for prompts alone.

    Attributes:
        role: with its replicas.
        memory: of the fullest device.
        latency: seconds of a prompt.
        rate: prompts a second of all replicas.
    """

    role: Role
    memory: DeviceMemory
    latency: float
    rate: float


def prefill_option(question: Question, prices: Prices, role: Role) -> PrefillOption:
    """What a prefill role delivers."""
    layout = role.layout
    latency, occupied = prompt_times(prices, layout, prices.prefill(layout, layout.data))
    return PrefillOption(role, question.memory(layout, PREFILL), latency, role.replicas * layout.data / occupied)


def prefill_options(question: Question, prices: Prices, devices: int, dropped: Dropped) -> list[PrefillOption]:
    """Layouts for prompts on `devices` devices: the one with the highest rate and the one with the lowest latency."""
    found = []
    for mesh in meshes(question, devices, PREFILL, dropped):
        if fits(question, mesh, PREFILL, dropped) is None:
            continue
        for form in forms(question, mesh.layout, PREFILL, dropped):
            found.append(prefill_option(question, prices, Role(name=PREFILL, layout=form, replicas=mesh.replicas)))
    if not found:
        return []
    return list(dict.fromkeys((max(found, key=lambda each: each.rate), min(found, key=lambda each: each.latency))))


def best_split(
    question: Question, prices: Prices, options: list[PrefillOption], mesh: Mesh, dropped: Dropped
) -> Candidate | None:
    """The best form of a mesh that decodes what one of the prefill layouts delivers."""
    memory = fits(question, mesh, DECODE, dropped)
    if memory is None:
        return None
    room = memory.sequences(question.context) * mesh.layout.data * mesh.replicas
    best: Candidate | None = None
    for form in forms(question, mesh.layout, DECODE, dropped):
        for option in options:
            layouts, replicas = (option.role.layout, form), (option.role.replicas, mesh.replicas)
            served = _most(question, room, partial(serve_split, prices, layouts, replicas))
            if not question.meets(served):
                dropped.miss(form, served)
            elif best is None or served.output_rate > best.served.output_rate:
                roles = (option.role, Role(name=DECODE, layout=form, replicas=mesh.replicas))
                best = Candidate(roles, served, (option.memory, memory))
    return best


def refinements(question: Question, layout: Layout) -> Iterator[Layout]:
    """Variants of a mesh beyond its exchange: no drafts, redundant experts, two micro-batches, a shared cache."""
    if layout.drafts and question.pins.drafts is None:
        yield replace(layout, drafts=0)
    tokens = math.inf if question.concurrency is None else question.concurrency * (1 + layout.drafts) / question.devices
    if layout.expert >= 16 and question.config.n_routed_experts / layout.expert > LEAST_EXPERTS and tokens >= LEAST_TOKENS:
        yield replace(layout, redundant_experts=layout.redundant_experts + layout.expert)
    if layout.stage_ranks > layout.tensor:
        yield replace(layout, overlap=True)
        yield replace(layout, overlap=True, drafts=0)
    if layout.tensor > 1 and layout.context == 1:
        yield replace(layout, decode_context=layout.tensor)
