"""A plan on torch.distributed: what the model of one rank holds, and what it exchanges. `launch.start` makes one from a plan.

The residual stream between blocks is either whole on every rank (exchange "all_reduce": one attention group, sums by all-reduce),
or divided by rows over all ranks of a stage (any other exchange): then a tensor group gathers its rows before a divided block and
reduce-scatters after it (sequence-parallel tensor parallelism), and the exchange of experts takes the rows from there.

Shape legend: T tokens of a step, A tokens of this rank's attention, t rows that it carries, D hidden, K selected positions, V
vocabulary, v its part here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from glm5_port import collectives
from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.config_quantization import PER_CHANNEL
from glm5_port.errors import InputError, PlanError, RankMismatchError
from glm5_port.model.bindings import Binder
from glm5_port.model.cache import DECODE, PREFILL, Batch, PagedCache
from glm5_port.model.ranks import Exchange, Experts, Part, Ranks
from glm5_port.model.sampling import Sampling
from glm5_port.parallel.placement import Placement, place
from glm5_port.parallel.plan import ALL_REDUCE, Layout
from glm5_port.parallel.rows import RankBatch, SharedCache
from glm5_port.parallel.sharding import divided
from glm5_port.quant.packing import CODES_PER_WORD
from glm5_port.selection import Selection, check_ranks_agree

MIXER = 0x9E3779B97F4A7C15 - (1 << 64)
"""Odd, so that multiplying by it loses no bit of a digest."""


class PlanRanks(Ranks):
    """One rank of a replica.

    Args:
        layout: of the replica; its ranks are those of the default process group.
        config: the model.
        node_devices: ranks of a machine.
        device: of this rank.
        loads: layer -> tokens of each expert, from which copies are placed; None: all alike.
        timeout: seconds that a collective may take; None: torch's default.

    Attributes:
        layout: as given.
        rank: of this process.
        at: its coordinates.
        whole: whether every rank has every token.
    """

    alone = False

    def __init__(
        self,
        layout: Layout,
        config: Glm5Config,
        *,
        node_devices: int,
        device: torch.device,
        loads: Mapping[int, Sequence[float]] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.layout, self.config, self.device = layout, config, device
        self.rank = dist.get_rank()
        self.at = layout.coordinates(self.rank)
        self.whole = layout.exchange == ALL_REDUCE
        self.node_ranks = math.gcd(node_devices, layout.stage_ranks)  # neighbours that surely share a machine
        self.stages = layout.stage_layers(config.num_hidden_layers)
        self.first, self.last = self.at["pipeline"] == 0, self.at["pipeline"] == layout.pipeline - 1
        self.selects, self.dtype = True, torch.float32  # until the model says
        sizes = (layout.pipeline, layout.data, layout.context, layout.tensor)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "data", "context", "tensor"))
        nodes = (layout.pipeline, layout.stage_ranks // self.node_ranks, self.node_ranks)
        inside = init_device_mesh(device.type, nodes, mesh_dim_names=("pipeline", "node", "in_node"))
        stage = init_device_mesh(device.type, (layout.pipeline, layout.stage_ranks), mesh_dim_names=("pipeline", "stage"))
        self.tensor, self.context, self.pipeline = (mesh.get_group(name) for name in ("tensor", "context", "pipeline"))
        self.stage, self.world = stage.get_group("stage"), cast(dist.ProcessGroup, dist.group.WORLD)
        exchange = (self.stage, inside.get_group("in_node"), inside.get_group("node"))
        self.groups = " ".join(group.group_name for group in exchange)
        if timeout is not None:  # groups do not take it over from the one that they are made of
            for group in (self.tensor, self.context, self.pipeline, *exchange):
                collectives.set_timeout(group, timeout)
        loads = loads or {}
        self.placements = {
            layer: place(config.n_routed_experts, layout.expert, layout.redundant_experts, loads.get(layer))
            for layer in (*config.moe_layers, *([] if config.mtp_layer is None else [config.mtp_layer]))
        }
        self._digest = torch.zeros((), dtype=torch.int64, device=device)

    # -- what is here ----------------------------------------------------------------------------------------------------

    def part(self, config: Glm5Config, *, selects: bool) -> Part:
        layout, self.selects = self.layout, selects
        local = dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // layout.tensor,
            intermediate_size=config.intermediate_size // layout.tensor,
        )
        return Part(
            config=local,
            layers=tuple(self.stages[self.at["pipeline"]]),
            experts=lambda layer: self.placements[layer].groups[self.at["expert"]],
            expert_width=config.moe_intermediate_size // layout.expert_tensor,
            shared_width=config.shared_intermediate_size // (layout.tensor if self.whole else 1),
            vocabulary=config.vocab_size // layout.tensor,
            has_embedding=self.first or (self.last and layout.drafts > 0),
            has_head=self.last,
        )

    def cut(self, name: str, component: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Raises PlanError where a plan's cut does not fall between elements, or between groups of INT4 codes."""
        over, axis = divided(name, component, shape, self.layout)
        ways = 1 if over is None else getattr(self.layout, over)
        if over is None or ways == 1:
            return None
        group = None if self.config.int4 is None or axis == 0 else self.config.int4.group_size
        if axis == 1 and shape[1] == 1 and name.endswith("_scale") and group in (None, PER_CHANNEL):
            return None  # one scale serves the whole row, and so each part
        units, what = shape[axis], "elements"
        if group is not None and group != PER_CHANNEL and name.endswith(("_packed", "_scale")):
            units, what = (units * CODES_PER_WORD // group if name.endswith("_packed") else units), "INT4 groups"
        if units % ways:
            raise PlanError(
                f"{name}: {units} {what} along dimension {axis} cannot be divided into {ways} parts ({over})\n"
                f"  Make a plan with a smaller {over} group: glm5-port plan --tp"
            )
        size = shape[axis] // ways
        return axis, self.at[over] * size, size

    def describe(self) -> dict[str, Any] | None:
        return {"layout": str(self.layout), "ranks": self.layout.ranks, **dataclasses.asdict(self.layout)}

    def check_choices(self, selections: Sequence[Selection]) -> None:
        with collectives.answered("all_gather", "bookkeeping"):
            check_ranks_agree(selections, self.stage)  # stages differ in what they run

    def new_cache(self, lengths: Sequence[int], page_size: int, **options: Any) -> PagedCache:
        self.dtype = options["dtype"]
        return SharedCache(self.layout, self.at, lengths, page_size, **options)

    # -- rows ------------------------------------------------------------------------------------------------------------

    def gather(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        if self.whole:
            return hidden_TD
        return collectives.all_gather(hidden_TD, self.tensor, "tensor")[: len(batch.positions_T)]

    def add_up(self, parts_TD: Tensor, batch: Batch, purpose: str = "tensor") -> Tensor:
        if self.whole:
            return collectives.all_reduce(parts_TD, self.tensor, purpose)
        padding = _rank(batch).carried * self.layout.tensor - parts_TD.shape[0]
        return collectives.reduce_scatter(F.pad(parts_TD, (0, 0, 0, padding)), self.tensor, purpose)

    def enter(self, tokens_T: Tensor, embedding: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        step = _rank(batch)
        if self.first:
            return self.embed(tokens_T, embedding, batch), None
        width, source = self.config.hidden_size, self.rank - self.layout.stage_ranks
        hidden_TD = torch.empty(step.carried, width, dtype=self.dtype, device=self.device)
        if self.whole:
            hidden_TD = self._receive_rows(step.carried, width, self.dtype, source)
        else:
            collectives.receive(hidden_TD, source, self.pipeline, "pipeline")
        indices_AK: Tensor | None = None
        if self._shares_indices(self.at["pipeline"]):
            indices_AK = self._receive_rows(len(batch.positions_T), self.config.index_topk, torch.int32, source)
        return hidden_TD, indices_AK

    def leave(
        self,
        block_TD: Tensor,
        residual_TD: Tensor,
        indices_TK: Tensor | None,
        batch: Batch,
        norm: Callable[..., Any] | None,
        rows_B: Tensor | None = None,
    ) -> Tensor:
        step = _rank(batch)
        if self.last:
            return super().leave(block_TD, residual_TD, indices_TK, batch, norm, rows_B)
        total_TD, to = block_TD + residual_TD, self.rank + self.layout.stage_ranks
        if self.whole:
            self._send_rows(total_TD, to)
        else:
            collectives.send(total_TD, to, self.pipeline, "pipeline")
        if self._shares_indices(self.at["pipeline"] + 1):
            self._send_rows(cast(Tensor, indices_TK), to)
        return total_TD.new_zeros(step.tokens if rows_B is None else rows_B.shape[0], total_TD.shape[1])

    def embed(self, tokens_T: Tensor, embedding: Tensor | None, batch: Batch) -> Tensor:
        if embedding is None:
            raise InputError("this model has no weights yet: build it with glm5_port.load(path)")
        local_A = tokens_T[_rank(batch).rows_T] - self.at["tensor"] * embedding.shape[0]
        here_A = (local_A >= 0) & (local_A < embedding.shape[0])
        found_AD = F.embedding(torch.where(here_A, local_A, 0), embedding) * here_A.unsqueeze(1)
        return self.add_up(found_AD, batch, "vocabulary")

    def collect(self, hidden_TD: Tensor, batch: Batch, rows_B: Tensor | None = None) -> Tensor:
        if self.whole:
            return super().collect(hidden_TD, batch, rows_B)
        step = _rank(batch)
        if rows_B is None:
            return collectives.all_gather(hidden_TD, self.stage, "bookkeeping")[step.places_T]
        owner_B, row_B = step.places_T[rows_B] // step.carried, step.places_T[rows_B] % step.carried
        each = min(step.carried, rows_B.shape[0])  # that a rank sends: as many as it could be asked for, so that nobody counts
        is_of_BP = F.one_hot(owner_B, self.layout.stage_ranks)
        place_B = (is_of_BP.cumsum(0) * is_of_BP).sum(1) - 1  # among the rows asked of the same rank
        mine_B = torch.where(owner_B == self.stage.rank(), place_B, each)
        sent_M = rows_B.new_zeros(each + 1).scatter_(0, mine_B, row_B)[:each]
        return collectives.all_gather(hidden_TD[sent_M], self.stage, "bookkeeping")[owner_B * each + place_B]

    def carry(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        if self.whole:
            return hidden_TD
        step = _rank(batch)
        mine_AD = hidden_TD[step.rows_T]
        padded = F.pad(mine_AD, (0, 0, 0, step.carried * self.layout.tensor - mine_AD.shape[0]))
        return padded[self.at["tensor"] * step.carried :][: step.carried]

    def rows_here(self, rows_TK: Tensor | None, batch: Batch) -> Tensor | None:
        return None if rows_TK is None else rows_TK[_rank(batch).rows_T]

    def rows_of_step(self, rows_TK: Tensor | None, batch: Batch) -> Tensor | None:
        if rows_TK is None:
            return None
        step = _rank(batch)
        return rows_TK.new_full((step.tokens, rows_TK.shape[1]), -1).index_copy(0, step.rows_T, rows_TK)

    def _shares_indices(self, stage: int) -> bool:
        """Whether the first layer of a stage attends to what an earlier stage selected."""
        return self.selects and not self.config.owns_indexer(self.stages[stage][0])

    def _send_rows(self, rows: Tensor, to: int) -> None:
        """Rows that every rank of a tensor group has: each sends a part."""
        size = -(-rows.shape[0] // self.layout.tensor)
        padded = F.pad(rows, (0, 0, 0, size * self.layout.tensor - rows.shape[0]))
        collectives.send(padded[self.at["tensor"] * size :][:size], to, self.pipeline, "pipeline")

    def _receive_rows(self, count: int, width: int, dtype: torch.dtype, source: int) -> Tensor:
        size = -(-count // self.layout.tensor)
        empty = torch.empty(size, width, dtype=dtype, device=self.device)
        part = collectives.receive(empty, source, self.pipeline, "pipeline")
        return collectives.all_gather(part, self.tensor, "bookkeeping")[:count]

    def share_cache(self, fields: list[Tensor], batch: Batch) -> None:
        if self.layout.context == 1:
            return
        slots_of = _rank(batch).slots_of
        rows = [field.view(torch.uint8).flatten(0, 1).flatten(1) for field in fields]
        mine = torch.cat([each[batch.slots_T] for each in rows], dim=1)
        most = max(len(slots) for slots in slots_of)
        arrived = collectives.all_gather(F.pad(mine, (0, 0, 0, most - mine.shape[0])), self.context, "context")
        for context, slots in enumerate(slots_of):
            if context != self.at["context"]:
                parts = arrived[context * most :][: len(slots)].split([each.shape[1] for each in rows], dim=1)
                for each, part in zip(rows, parts, strict=True):
                    each[slots] = part

    # -- experts ---------------------------------------------------------------------------------------------------------

    def exchange(self, bind: Binder, layer: int, config: Glm5Config) -> Exchange:
        return PlanExchange(self, bind, self.placements[layer])

    # -- logits and tokens -----------------------------------------------------------------------------------------------

    def observe(self, indices_TK: Tensor | None) -> None:
        if indices_TK is None:
            return
        flat = indices_TK.flatten().long()
        place = torch.arange(1, flat.numel() + 1, device=flat.device)
        self._digest = self._digest * MIXER + ((flat + 2) * MIXER * place).sum() + flat.numel()

    def logits(self, head: Callable[[Tensor], Tensor] | None, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], self.config.vocab_size)
        rows = hidden.flatten(0, -2)
        found = self._group_logits(head, rows) if self.last else rows.new_empty(rows.shape[0], self.config.vocab_size)
        last = self.rank % self.layout.stage_ranks + (self.layout.pipeline - 1) * self.layout.stage_ranks
        found = collectives.broadcast(found.contiguous(), last, self.pipeline, "vocabulary")
        self._share([])
        return found.view(shape)

    def _group_logits(self, head: Callable[[Tensor], Tensor] | None, hidden_BD: Tensor) -> Tensor:
        if head is None:
            raise InputError("this model has no weights yet: build it with glm5_port.load(path)")
        parts_BV = collectives.all_gather(head(hidden_BD), self.tensor, "vocabulary")
        return parts_BV.unflatten(0, (self.layout.tensor, hidden_BD.shape[0])).transpose(0, 1).flatten(1)

    def choose(
        self,
        sampling: Sampling,
        head: Callable[[Tensor], Tensor] | None,
        hidden_BD: Tensor,
        sequences: Sequence[int],
        positions: Sequence[int],
    ) -> list[int]:
        """The rows are shared by the attention groups (and context ranks) of the last stage, whoever computed them."""
        groups = self.layout.data * self.layout.context
        group = self.at["data"] * self.layout.context + self.at["context"]
        share = -(-len(sequences) // groups)
        mine = slice(group * share, min((group + 1) * share, len(sequences)))
        tokens: list[int] = []
        if self.last:
            logits_BV = self._group_logits(head, hidden_BD[mine])
            tokens = sampling.choose(logits_BV, sequences[mine], positions[mine])
        told = self._share(tokens + [-1] * (share - len(tokens)))
        chosen = told[-self.layout.stage_ranks :: self.layout.tensor]
        return [token for group in chosen for token in group][: len(sequences)]

    def _share(self, tokens: list[int]) -> list[list[int]]:
        """What every rank tells, after a check that ranks of one tensor group selected, and chose, alike.

        Raises:
            RankMismatchError: on every rank, when they did not.
        """
        mine = torch.cat([self._digest.view(1), torch.tensor(tokens, dtype=torch.int64).to(self.device)])
        told = collectives.all_gather(mine, self.world, "bookkeeping").view(self.layout.ranks, -1).tolist()
        for first in range(0, self.layout.ranks, self.layout.tensor):
            group = told[first : first + self.layout.tensor]
            if any(each != group[0] for each in group):
                rows = "\n".join(
                    f"  rank {first + place}: selection {each[0]:x}, tokens {each[1:]}" for place, each in enumerate(group)
                )
                raise RankMismatchError(
                    f"ranks of one tensor group selected different positions or chose different tokens\n{rows}\n"
                    "  They compute the same on the same inputs: look for a kernel that is not deterministic on one of them "
                    "(glm5-port parity), or a rank with other software."
                )
        return [each[1:] for each in told]


class PlanExchange(Exchange):
    """Routed experts and the shared expert of one layer, whose experts lie on many ranks. Dispatch and combine are bound
    together: what one leaves for the other is theirs alone."""

    def __init__(self, ranks: PlanRanks, bind: Binder, placement: Placement) -> None:
        self.ranks = ranks
        self.placement = placement.table().to(ranks.device)
        self.slots = placement.slots
        self.options: dict[str, dict[str, Any]] = {}
        self.bound: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        for phase in (PREFILL, DECODE):
            layout = ranks.layout.in_phase(phase)
            facts = {
                "form": layout.exchange,
                "bits": layout.exchange_bits,
                "ranks": layout.stage_ranks,
                "node_ranks": ranks.node_ranks,
                "expert_tensor": layout.expert_tensor,
            }
            dispatch, combine = bind(ops.dispatch_tokens, phase=phase, **facts), bind(ops.combine_tokens, phase=phase, **facts)
            if dispatch.implementation.id != combine.implementation.id:
                raise InputError(
                    f"dispatch_tokens would run {dispatch.implementation.id} and combine_tokens {combine.implementation.id}: "
                    "what one leaves for the other is its own\n  Pin both to one implementation with "
                    "GLM5_PORT_OP_DISPATCH_TOKENS and GLM5_PORT_OP_COMBINE_TOKENS."
                )
            self.bound[phase] = dispatch, combine
            self.options[phase] = {**facts, "groups": ranks.groups}

    def __call__(
        self, hidden_TD: Tensor, route_weights_TK: Tensor, ids_TK: Tensor, batch: Batch, experts: Experts, shared: Experts
    ) -> Tensor:
        step = _rank(batch)
        (dispatch, combine), options = self.bound[step.exchange_phase], self.options[step.exchange_phase]
        if step.own < step.carried:  # padding goes nowhere
            is_token_T1 = (torch.arange(step.carried, device=ids_TK.device) < step.own).unsqueeze(1)
            ids_TK = torch.where(is_token_T1, ids_TK, -1)
        arrived_RD, weights_RK, places_RK, trace = dispatch(
            hidden_TD, route_weights_TK, ids_TK, self.placement, slots=self.slots, **options
        )
        results_RD = experts(hidden=arrived_RD, route_weights=weights_RK, ids=places_RK)
        total_TD = combine(results_RD, trace, tokens=hidden_TD.shape[0], **options) + shared(hidden_TD)
        return self.ranks.add_up(total_TD, batch) if self.ranks.whole else total_TD


def _rank(batch: Batch) -> RankBatch:
    return cast(RankBatch, batch)
