"""Plans as data: which rank holds what, what travels how, validated and readable, saved as JSON.

Ranks of a replica count from the inside out: rank = ((stage * data + d) * context + c) * tensor + t. The attention mesh is
(pipeline, data, context, tensor); the mesh of the experts lies over the same ranks of a stage: (pipeline, expert, expert_tensor).
Replicas follow each other, prefill before decode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from glm5_port.config import Glm5Config
from glm5_port.errors import PlanError, did_you_mean
from glm5_port.parallel.topology import EXCHANGES

FORMAT = 1
"""Version of the JSON."""
MIXED, PREFILL, DECODE = "mixed", "prefill", "decode"
ROLES = (MIXED, PREFILL, DECODE)
WEIGHTS = ("bf16", "fp8", "int4", "w4a8")
"""bf16; block-FP8 as published; INT4 experts with 16-bit activations (canonical export); W4A8 experts and W8A8 elsewhere
(ascendV1)."""
KV_FORMATS = ("plain", "fp8", "int8")
ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, DEDUPLICATED, HIERARCHICAL = EXCHANGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks of one replica share the model.

    Attributes:
        tensor: ranks that share attention heads, dense MLP and vocabulary.
        data: attention groups that serve different sequences.
        context: ranks that share the tokens of a prompt; whole attention weights on each. Prefill only.
        decode_context: ranks of a tensor group that share the latent cache of a sequence; divides `tensor`.
        pipeline: stages.
        stages: layers of each stage; empty means even, the first ones larger.
        expert: groups that hold different experts; expert * expert_tensor = tensor * context * data.
        expert_tensor: ranks that share one expert's width.
        exchange: how tokens reach their experts, one of `EXCHANGES`.
        prefill_exchange: the same while a mixed role computes prompts; empty means as `exchange`.
        exchange_bits: of `exchange`: 16, or 8 for INT8 or FP8 with scales on the way to the experts. Tokens that are gathered in
            prefill only are in 16 bits.
        overlap: two micro-batches, one computing while the other communicates.
        redundant_experts: copies of much-used experts, over all expert groups.
        drafts: tokens that the MTP layer drafts each step; 0 leaves it out.
    """

    tensor: int = 1
    data: int = 1
    context: int = 1
    decode_context: int = 1
    pipeline: int = 1
    stages: tuple[int, ...] = ()
    expert: int = 1
    expert_tensor: int = 1
    exchange: str = ALL_REDUCE
    prefill_exchange: str = ""
    exchange_bits: int = 16
    overlap: bool = False
    redundant_experts: int = 0
    drafts: int = 0

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.stage_ranks * self.pipeline

    def in_phase(self, phase: str) -> Layout:
        """The layout with the exchange of "prefill" or "decode" as its only one."""
        if phase != PREFILL or not self.prefill_exchange:
            return replace(self, prefill_exchange="") if self.prefill_exchange else self
        bits = 16 if self.prefill_exchange in (ALL_GATHER, ALL_REDUCE) else self.exchange_bits
        return replace(self, exchange=self.prefill_exchange, prefill_exchange="", exchange_bits=bits)

    def stage_layers(self, layers: int) -> tuple[range, ...]:
        """The layers of the trunk on each stage."""
        base, more = divmod(layers, self.pipeline)
        sizes = self.stages or tuple(base + (stage < more) for stage in range(self.pipeline))
        starts = [sum(sizes[:stage]) for stage in range(len(sizes) + 1)]
        return tuple(range(first, last) for first, last in pairwise(starts))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank of a replica stands in both meshes."""
        inside = rank % self.stage_ranks
        return {
            "pipeline": rank // self.stage_ranks,
            "data": inside // (self.tensor * self.context),
            "context": inside // self.tensor % self.context,
            "tensor": inside % self.tensor,
            "expert": inside // self.expert_tensor,
            "expert_tensor": inside % self.expert_tensor,
        }

    def __str__(self) -> str:
        names = [
            ("PP", self.pipeline),
            ("DP", self.data),
            ("CP", self.context),
            ("TP", self.tensor),
            ("DCP", self.decode_context),
        ]
        attention = " x ".join(f"{name}{size}" for name, size in names if size > 1) or "1 device"
        experts = f"EP{self.expert}" if self.expert > 1 else ""
        experts += f" x TP{self.expert_tensor} in experts" if self.expert > 1 and self.expert_tensor > 1 else ""
        exchange = self.exchange + (f" ({self.prefill_exchange} in prefill)" if self.prefill_exchange else "")
        exchange = f"{exchange}{' in 8 bits' if self.exchange_bits == 8 else ''}" if self.stage_ranks > 1 else ""
        more = [
            f"{self.redundant_experts} redundant experts" if self.redundant_experts else "",
            "two micro-batches" if self.overlap else "",
            f"{self.drafts} drafts" if self.drafts else "",
        ]
        return ", ".join(part for part in (attention, experts, exchange, *more) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Replicas of one layout that do the same work.

    Attributes:
        name: "mixed" (prefill and decode in turns), "prefill" or "decode".
        layout: of each replica.
        replicas: independent copies.
    """

    name: str
    layout: Layout
    replicas: int = 1

    @property
    def ranks(self) -> int:
        """Of all replicas."""
        return self.layout.ranks * self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """A whole deployment.

    Attributes:
        model: family member, or the path that was given.
        hardware: name of the topology.
        node_devices: devices of a machine.
        weights: one of `WEIGHTS`.
        kv_format: format of the latent and index caches, one of `KV_FORMATS`.
        roles: one "mixed" role, or "prefill" and "decode".
        max_context: tokens of the longest sequence, input and output.
        max_sequences: sequences at the same time in one attention group of the role that decodes.
        chunk: tokens of a prompt that are computed at once.
    """

    model: str
    hardware: str
    node_devices: int
    weights: str
    kv_format: str
    roles: tuple[Role, ...]
    max_context: int
    max_sequences: int
    chunk: int
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def ranks(self) -> int:
        """Devices of the whole deployment."""
        return sum(role.ranks for role in self.roles)

    def check_world(self, world_size: int) -> None:
        """Refuses a process group of another size, before any weight is read.

        Raises:
            PlanError: the plan is for another number of ranks.
        """
        if world_size != self.ranks:
            raise PlanError(
                f"this plan is for {self.ranks} ranks, and {world_size} were started\n"
                f"  {'; '.join(f'{role.name}: {role.replicas} x {role.layout}' for role in self.roles)}\n"
                f"  Start {self.ranks} ranks, or make a plan for {world_size}: glm5-port plan"
            )

    def check(self, config: Glm5Config) -> None:
        """Refuses a plan that this model cannot have.

        Raises:
            PlanError: every reason, with the nearest value that would do.
        """
        found = []
        names = tuple(role.name for role in self.roles)
        if names not in ((MIXED,), (PREFILL, DECODE)):
            found.append(f"roles are {', '.join(names) or 'none'}; a plan has one mixed role, or prefill and decode")
        for name, value, known in (("weights", self.weights, WEIGHTS), ("kv_format", self.kv_format, KV_FORMATS)):
            if value not in known:
                found.append(f"{name} = {value!r}{did_you_mean(value, known)}; known are {', '.join(known)}")
        for role in self.roles:
            found += [f"{role.name}: {reason}" for reason in problems(role.layout, config, role.name)]
            if role.replicas < 1:
                found.append(f"{role.name}: replicas = {role.replicas}; there must be at least one")
        if found:
            raise PlanError("\n  ".join(["this plan is impossible", *found]))

    # --- JSON ------------------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` gives an equal plan."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ParallelPlan:
        """Reads a plan.

        Raises:
            PlanError: the file cannot be read, or holds no plan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> ParallelPlan:
        """A plan from plain data.

        Raises:
            PlanError: another format, a missing or unknown key, or a value of another type.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            version = data.get("format") if isinstance(data, Mapping) else data
            raise PlanError(f"this is no plan of format {FORMAT} (format = {version!r}); `glm5-port plan --save` writes one")
        roles = data.get("roles")
        if not isinstance(roles, list | tuple):
            raise PlanError("a plan has a list of roles")
        built = []
        for role in roles:
            layout = _build(Layout, role.get("layout") if isinstance(role, Mapping) else None, "layout")
            rest = {"name": MIXED, **role, "layout": layout}
            built.append(_build(Role, rest, "role"))
        values = {key: value for key, value in data.items() if key != "format"}
        return _build(cls, values | {"roles": built}, "plan")


def _build(kind: Any, values: Any, what: str) -> Any:
    """A dataclass of this file from a mapping, strictly."""
    if not isinstance(values, Mapping):
        raise PlanError(f"a {what} is a mapping, not {values!r}")
    known = {item.name: item for item in fields(kind)}
    for key in values:
        if key not in known:
            raise PlanError(f"a {what} has no key {key!r}{did_you_mean(str(key), known)}; known are {', '.join(known)}")
    plain = {"int": int, "str": str, "bool": bool}
    cleaned: dict[str, Any] = {}
    for name, item in known.items():
        if name not in values:
            continue
        value, wanted = values[name], plain.get(str(item.type))
        if wanted is not None and type(value) is not wanted:
            raise PlanError(f"{name} of a {what} is {value!r}; expected {item.type}")
        cleaned[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**cleaned)
    except TypeError as error:
        raise PlanError(f"a {what} is not whole: {error}") from error


# --- what a model allows ---------------------------------------------------------------------------------------------------


def problems(layout: Layout, config: Glm5Config, role: str) -> list[str]:
    """Every reason why a model cannot be laid out like this, each with the nearest value that would do."""
    found = [
        f"{name} = {getattr(layout, name)}: it must be at least 1"
        for name in ("tensor", "data", "context", "decode_context", "pipeline", "expert", "expert_tensor")
        if getattr(layout, name) < 1
    ]
    if found:
        return found
    for name, size, parts, what in (
        ("tensor", layout.tensor, config.num_attention_heads, "attention heads"),
        ("tensor", layout.tensor, config.intermediate_size, "columns of the dense MLP"),
        ("tensor", layout.tensor, config.shared_intermediate_size, "columns of the shared expert"),
        ("tensor", layout.tensor, config.vocab_size, "rows of the vocabulary"),
        ("expert_tensor", layout.expert_tensor, config.moe_intermediate_size, "columns of an expert"),
        ("decode_context", layout.decode_context, layout.tensor, "ranks of a tensor group"),
    ):
        if parts % size:
            found.append(f"{name} = {size} does not divide {parts} {what}; nearest: {_nearest_divisors(parts, size)}")
    slots = config.n_routed_experts + layout.redundant_experts
    if slots % layout.expert:
        fill = -config.n_routed_experts % layout.expert
        redundant = f" and {layout.redundant_experts} redundant ones" if layout.redundant_experts else ""
        found.append(
            f"expert = {layout.expert} does not divide {config.n_routed_experts} experts{redundant}; nearest: "
            f"{_nearest_divisors(config.n_routed_experts, layout.expert)}, or {fill} redundant experts"
        )
    if layout.expert * layout.expert_tensor != layout.stage_ranks:
        found.append(
            f"expert x expert_tensor = {layout.expert} x {layout.expert_tensor}, but a stage has tensor x context x data = "
            f"{layout.tensor} x {layout.context} x {layout.data} = {layout.stage_ranks} ranks; "
            f"nearest: expert = {layout.stage_ranks}, expert_tensor = 1"
        )
    if layout.pipeline > config.num_hidden_layers:
        found.append(f"pipeline = {layout.pipeline}: there are {config.num_hidden_layers} layers")
    elif layout.stages and (len(layout.stages) != layout.pipeline or sum(layout.stages) != config.num_hidden_layers):
        found.append(
            f"stages = {', '.join(map(str, layout.stages))}: expected {layout.pipeline} numbers that add up to "
            f"{config.num_hidden_layers}"
        )
    for name, exchange in (("exchange", layout.exchange), ("prefill_exchange", layout.prefill_exchange or layout.exchange)):
        if exchange not in EXCHANGES:
            found.append(f"{name} = {exchange!r}{did_you_mean(exchange, EXCHANGES)}; known: {', '.join(EXCHANGES)}")
        elif exchange == ALL_REDUCE and layout.data * layout.context > 1:
            found.append(
                f"{name} = all_reduce needs every rank to hold every token, but there are data x context = "
                f"{layout.data} x {layout.context} groups; nearest: all_gather"
            )
        elif exchange not in (ALL_REDUCE, ALL_GATHER) and layout.expert_tensor > 1:
            found.append(f"{name} = {exchange} sends whole tokens to whole experts; nearest: expert_tensor = 1, or all_gather")
        if not layout.prefill_exchange:
            break
    if layout.exchange_bits not in (8, 16):
        found.append(f"exchange_bits = {layout.exchange_bits}: 8 or 16")
    if layout.context > 1 and role != PREFILL:
        found.append(f"context = {layout.context} shares a prompt: a prefill role has it, not a {role} one; nearest: context = 1")
    if layout.decode_context > 1 and role == PREFILL:
        found.append(f"decode_context = {layout.decode_context}: a prefill role has `context` instead")
    if layout.drafts and config.mtp_layer is None:
        found.append(f"drafts = {layout.drafts}: this model has no MTP layer; nearest: 0")
    return found


def _nearest_divisors(number: int, wanted: int) -> str:
    below = max(size for size in range(1, wanted + 1) if number % size == 0)
    above = next((size for size in range(wanted, number + 1) if number % size == 0), below)
    return f"{below} or {above}" if below != above else str(below)


def even(layout: Layout, layers: int) -> Layout:
    """The layout with its stages written out."""
    return replace(layout, stages=tuple(len(each) for each in layout.stage_layers(layers)))
