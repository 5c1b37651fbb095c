"""The planner: searches layouts, ranks them, says why the second lost and which link would change the choice."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from glm5_port.errors import PlanError
from glm5_port.parallel.cost.service import Prices, accepted_tokens
from glm5_port.parallel.engines import who_can
from glm5_port.parallel.hardware import MEASURED
from glm5_port.parallel.plan import DECODE, KV_FORMATS, MIXED, PREFILL, WEIGHTS, Layout, ParallelPlan, even, problems
from glm5_port.parallel.quantities import show_seconds
from glm5_port.parallel.search import (
    REFINED,
    Candidate,
    Dropped,
    Mesh,
    Pins,
    Question,
    best_mixed,
    best_split,
    divisors,
    meshes,
    prefill_option,
    prefill_options,
    refinements,
)
from glm5_port.parallel.topology import Topology

BAND = (0.6, 1.6)
"""Measured over estimated, where nothing is calibrated: the span of the published figures in docs/parallel.md, rounded
outwards."""
FAMILIES = 40
"""Kinds of plan that are watched while a link is varied."""
FLIP_RANGE = 64.0
"""A link is varied by this factor both ways."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A link at which another plan wins.

    Attributes:
        level: its name.
        bandwidth: bytes a second of one device as it is.
        at: bytes a second where the choice changes, or None within 1/64 and 64 times what it is.
        winner: the plan that wins beyond.
    """

    level: str
    bandwidth: float
    at: float | None
    winner: Candidate | None
    faster: bool


@dataclass(frozen=True)
class Answer:
    """What the planner found.

    Attributes:
        question: what was asked.
        plan: the best, as data.
        ranking: candidates with different meshes, best first.
        why: differences of the runner-up, worst first: (part of a request, seconds more).
        flips: for each level in use, towards slower and faster links.
        dropped: what was not possible.
        engines: engine -> reasons why it cannot run the plan; empty if it can.
    """

    question: Question
    plan: ParallelPlan
    ranking: tuple[Candidate, ...]
    why: tuple[tuple[str, float], ...]
    flips: tuple[Flip, ...]
    dropped: Dropped
    engines: dict[str, list[str]]

    @property
    def calibrated(self) -> bool:
        """Whether the hardware was measured, and all links that this many devices meet on."""
        topology = self.question.topology
        return topology.calibrated and all(
            topology.levels[place].confidence == MEASURED for place in levels_in_use(self.question)
        )

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.ranking[0]


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """A search makes hundreds of thousands of small values that refer to nothing but numbers. The collector would look for cycles
    among them again and again, for a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_cycle_collection()
def ask(question: Question, *, model: str, with_flips: bool = True) -> Answer:
    """Searches every layout.

    Args:
        question: what is asked.
        model: what the plan calls the model.
        with_flips: also look for the links at which the choice changes.

    Raises:
        PlanError: nothing is possible: every reason and the nearest feasible change.
    """
    _check(question)
    dropped = Dropped()
    ranking = rank(question, question.topology, dropped)
    if not ranking:
        raise PlanError(_why_nothing(question, dropped))
    best = ranking[0]
    layers = question.config.num_hidden_layers
    roles = tuple(replace(role, layout=even(role.layout, layers)) for role in best.roles)
    plan = ParallelPlan(
        model=model,
        hardware=question.topology.name,
        node_devices=question.topology.node_devices,
        weights=question.weights,
        kv_format=question.kv_format,
        roles=roles,
        max_context=question.context,
        max_sequences=math.ceil(best.served.concurrency / best.roles[-1].replicas / best.roles[-1].layout.data),
        chunk=question.work.chunk,
    )
    plan.check(question.config)
    who: dict[str, list[str]] = {}
    for role in best.roles:
        found = who_can(question.topology, role.layout, role.name, question.weights, question.config)
        for name, reasons in found.items():
            who.setdefault(name, [])
            who[name] += [reason for reason in reasons if reason not in who[name]]
    return Answer(
        question=question,
        plan=plan,
        ranking=tuple(ranking),
        why=tuple(_differences(question, best, ranking[1])) if len(ranking) > 1 else (),
        flips=tuple(_flips(question, ranking)) if with_flips else (),
        dropped=dropped,
        engines=who,
    )


def rank(question: Question, topology: Topology, dropped: Dropped) -> list[Candidate]:
    """Candidates with different meshes, best first.

    Every mesh is priced with its best exchange; the best of them are then refined.
    """
    prices = question.prices(topology)
    found: list[tuple[Candidate, Mesh]] = []
    for mesh in meshes(question, question.devices, MIXED, dropped):
        candidate = best_mixed(question, prices, mesh, dropped)
        if candidate is not None:
            found.append((candidate, mesh))
    splits = _splits(question, prices, dropped)
    found += splits
    found.sort(key=lambda each: -each[0].served.output_rate)
    refined = [candidate for candidate, _ in found]
    for candidate, mesh in found[:REFINED]:
        for layout in refinements(question, mesh.layout):
            if problems(layout, question.config, candidate.roles[-1].name):
                continue
            other = _again(question, prices, candidate, Mesh(layout, mesh.replicas), dropped)
            refined += [] if other is None else [other]
    return distinct(refined)


def _again(question: Question, prices: Prices, candidate: Candidate, mesh: Mesh, dropped: Dropped) -> Candidate | None:
    """A candidate with another layout for what decodes, or on other links."""
    if candidate.roles[0].name == MIXED:
        return best_mixed(question, prices, mesh, dropped)
    option = prefill_option(question, prices, candidate.roles[0])
    return best_split(question, prices, [option], mesh, dropped)


def _splits(question: Question, prices: Prices, dropped: Dropped) -> list[tuple[Candidate, Mesh]]:
    """Prefill on some machines, decode on the others."""
    node = prices.topology.node_devices
    machines = question.devices // node
    found = []
    for first in range(1, machines):
        if machines > 8 and first not in divisors(machines) and machines - first not in divisors(machines):
            continue
        options = prefill_options(question, prices, first * node, dropped)
        if not options:
            continue
        for mesh in meshes(question, (machines - first) * node, DECODE, dropped):
            candidate = best_split(question, prices, options, mesh, dropped)
            if candidate is not None:
                found.append((candidate, mesh))
    return found


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The best of each mesh, best first."""
    kept: dict[tuple[tuple[int, ...], ...], Candidate] = {}
    for candidate in sorted(candidates, key=lambda each: -each.served.output_rate):
        kept.setdefault(candidate.mesh, candidate)
    return list(kept.values())


# --- why, and what would change it -------------------------------------------------------------------------------------------


def request_terms(question: Question, candidate: Candidate) -> dict[str, float]:
    """Seconds of one request by term: its prompt once, and a decode step for each accepted token."""
    steps = question.work.output_tokens / accepted_tokens(question.config, candidate.roles[-1].layout.drafts)
    terms: dict[str, float] = {}
    for phase, breakdown, times in ((PREFILL, candidate.served.prefill, 1.0), (DECODE, candidate.served.decode, steps)):
        for name, _, cost in breakdown:
            terms[f"{phase}: {name}"] = terms.get(f"{phase}: {name}", 0.0) + cost.seconds * times
    total = candidate.served.concurrency * question.work.output_tokens / candidate.served.output_rate
    terms["waiting for prompts of others"] = max(total - sum(terms.values()), 0.0)
    return terms


def _differences(question: Question, best: Candidate, other: Candidate) -> list[tuple[str, float]]:
    """Where the other takes longer for a request, and where it gains, largest first."""
    first, second = request_terms(question, best), request_terms(question, other)
    names = dict.fromkeys((*first, *second))
    changes = [(name, second.get(name, 0.0) - first.get(name, 0.0)) for name in names]
    return sorted((change for change in changes if abs(change[1]) > 1e-6), key=lambda each: -abs(each[1]))


def _check(question: Question) -> None:
    """Refuses questions that no layout can answer.

    Raises:
        PlanError: a figure of the chip that nobody published, or a question that contradicts itself.
    """
    chip = question.topology.chip
    if missing := chip.missing():
        raise PlanError(
            "\n  ".join(
                [
                    f"{chip.title} cannot be planned for: figures are missing",
                    *missing,
                    "Copy its chip file beside a topology file of your own, fill in what you measured, and give that topology",
                ]
            )
        )
    for name, value, known in (("weights", question.weights, WEIGHTS), ("kv", question.kv_format, KV_FORMATS)):
        if value not in known:
            raise PlanError(f"{name} = {value!r}; known are {', '.join(known)}")
    if (question.concurrency is None) == (question.tpot is None and question.ttft is None):
        raise PlanError(
            "give either a concurrency, or targets for TPOT and TTFT\n  for example --concurrency 64, or --tpot-ms 50"
        )
    if question.context > question.config.max_position_embeddings:
        limit = question.config.max_position_embeddings
        raise PlanError(f"input + output = {question.context:,} tokens, but this model was made for {limit:,}")


def _why_nothing(question: Question, dropped: Dropped) -> str:
    """Every reason, most frequent first, and the nearest feasible change."""
    gib, lines = 2**30, ["no layout is possible"]
    lines += [f"the model: {reason}" for reason in _common(dropped.impossible)]
    if dropped.short:
        layout, missing = min(dropped.short.items(), key=lambda each: each[1])
        lines.append(
            f"memory: {len(dropped.short)} layouts do not fit; the nearest, {layout}, lacks {missing / gib:,.1f} GiB a device"
        )
    lines += [f"the engine: {reason}" for reason in _common(dropped.refused)]
    if dropped.late:
        tpot = min(dropped.late.items(), key=lambda each: each[1][0])
        ttft = min(dropped.late.items(), key=lambda each: each[1][1])
        lines.append(f"targets: the lowest TPOT is {show_seconds(tpot[1][0])}, by {tpot[0]}")
        lines.append(f"targets: the lowest TTFT is {show_seconds(ttft[1][1])}, by {ttft[0]}")
    change = _nearest_change(question, dropped)
    return "\n  ".join([*lines, *([f"nearest change: {change}"] if change else [])])


def _common(reasons: dict[str, int], limit: int = 12) -> list[str]:
    return sorted(reasons, key=lambda reason: -reasons[reason])[:limit]


def _nearest_change(question: Question, dropped: Dropped) -> str | None:
    """The smallest change after which something works: a free size, more machines, or smaller weights."""
    if dropped.late:
        return "more machines, or looser targets"
    if question.pins != Pins() and rank_any(replace(question, pins=Pins(), known={})):
        return "leave the fixed sizes out: without them there are plans"
    for factor in (2, 3, 4, 8):
        if rank_any(replace(question, devices=question.devices * factor, known={})):
            return f"{factor} times as many machines ({question.devices * factor} devices)"
    for weights in ("fp8", "w4a8", "int4"):
        if weights != question.weights and rank_any(replace(question, weights=weights, known={})):
            return f"--weights {weights}"
    return None


def rank_any(question: Question) -> bool:
    """Whether anything is possible."""
    prices = question.prices(question.topology)
    dropped = Dropped()
    found = (best_mixed(question, prices, mesh, dropped) for mesh in meshes(question, question.devices, MIXED, dropped))
    return any(candidate is not None for candidate in found)


class Shortlist:
    """Plans whose order is asked for again and again, on links of other speeds."""

    def __init__(self, question: Question, candidates: Iterable[Candidate], *, refined: bool) -> None:
        self._question = question
        self._entries: list[tuple[Candidate, Layout]] = []
        for candidate in candidates:
            own = replace(candidate.roles[-1].layout, prefill_exchange="")
            variants = [own]
            if refined:  # another link may want other variants than this one
                plain = replace(own, overlap=False, decode_context=1)
                variants += [
                    plain,
                    *(each for each in refinements(question, plain) if not problems(each, question.config, MIXED)),
                ]
            self._entries += [(candidate, layout) for layout in dict.fromkeys(variants)]

    def leaders(self, level: int, faster: bool) -> list[Candidate]:
        """Those that are among the first three where a link is as it is, 2, 8, or 64 times slower or faster."""
        found: list[Candidate] = []
        for factor in (1.0, 2.0, 8.0, FLIP_RANGE):
            found += self.order(self._question.topology.scaled(level, factor if faster else 1 / factor))[:3]
        return distinct(found)

    def best(self, topology: Topology) -> Candidate:
        """The one that wins on a topology."""
        return self.order(topology)[0]

    def order(self, topology: Topology) -> list[Candidate]:
        """All on a topology, each with its best form of exchange there, best first."""
        question = replace(self._question, topology=topology)
        prices = question.prices(topology)
        found = []
        for candidate, layout in self._entries:
            again = _again(question, prices, candidate, Mesh(layout, candidate.roles[-1].replicas), Dropped())
            found += [] if again is None else [again]
        return distinct(found)


def levels_in_use(question: Question) -> list[int]:
    """Levels that some group of this many devices could meet on."""
    inside, used = 1, []
    for place, level in enumerate(question.topology.levels):
        within = min(level.devices or question.devices, question.devices)
        if within > inside:
            used.append(place)
        inside = within
    return used


def _flips(question: Question, ranking: list[Candidate]) -> list[Flip]:
    """For each level, the nearest slower and faster bandwidth at which another plan wins: bisection on the logarithm."""
    families: dict[object, Candidate] = {}
    for candidate in ranking:
        layout = candidate.roles[-1].layout
        kind = (len(candidate.roles), candidate.roles[-1].replicas, layout.tensor, layout.pipeline, layout.expert > 1)
        families.setdefault(kind, candidate)
    shortlist = Shortlist(question, distinct([*ranking[:5], *list(families.values())[:FAMILIES]]), refined=False)
    flips = []
    for level in levels_in_use(question):
        here = question.topology.levels[level]
        for faster in (False, True):
            leaders = shortlist.leaders(level, faster)
            flips.append(_flip(question, Shortlist(question, leaders, refined=True), level, faster, here.bandwidth, here.name))
    return flips


def _flip(question: Question, shortlist: Shortlist, level: int, faster: bool, bandwidth: float, name: str) -> Flip:
    own = shortlist.best(question.topology).mesh
    near, far = 1.0, 1.0
    while True:  # the nearest of the steps at which somebody else wins
        far = far * 2 if faster else far / 2
        if not 1 / FLIP_RANGE <= far <= FLIP_RANGE:
            return Flip(name, bandwidth, None, None, faster)
        if shortlist.best(question.topology.scaled(level, far)).mesh != own:
            break
        near = far
    for _ in range(7):
        middle = math.sqrt(near * far)
        if shortlist.best(question.topology.scaled(level, middle)).mesh == own:
            near = middle
        else:
            far = middle
    return Flip(name, bandwidth, bandwidth * far, shortlist.best(question.topology.scaled(level, far)), faster)
