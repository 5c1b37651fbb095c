"""Walks one rank of each stage of a layout through a step on torch's fake process group, and prints what it sent as JSON.

As a program; `charged` and `expected_counts` say what is expected. Hidden states are bf16, as the cost model counts them. Routing
is random and even. The sizes of the form "hierarchical" cannot be seen here, since its second hop sends what other ranks brought:
that is counted, and compared with the charge, between real processes (test_exchange.py).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm5_port import collectives
from glm5_port.config import Glm5Config
from glm5_port.dispatch import trace_through
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span
from glm5_port.model.tensors import expected_tensors
from glm5_port.parallel.cost.compute import imbalance
from glm5_port.parallel.cost.service import TERMS  # and with it every term
from glm5_port.parallel.cost.step import Step, model_size
from glm5_port.parallel.execute import PlanRanks
from glm5_port.parallel.plan import DECODE, PREFILL, Layout
from glm5_port.parallel.topology import find_hardware
from tests.model.models import quick_config

GATHER, FLAT, DEDUPLICATED = "all_gather", "all_to_all", "deduplicated"
LAYOUTS = {
    "TP8": Layout(tensor=8, expert=8),
    "PP4 TP8": Layout(pipeline=4, tensor=8, expert=8),
    "PP4 DP16 TP16 gather: 1,024 ranks": Layout(pipeline=4, data=16, tensor=16, expert=256, exchange=GATHER),
    "DP8 TP2 gather in 8 bits": Layout(data=8, tensor=2, expert=16, exchange=GATHER, exchange_bits=8),
    "DP4 TP2 EP4 x TP2 gather": Layout(data=4, tensor=2, expert=4, expert_tensor=2, exchange=GATHER),
    "PP4 DP256 flat: 1,024 ranks": Layout(pipeline=4, data=256, expert=256, exchange=FLAT),
    "DP64 flat in 8 bits": Layout(data=64, expert=64, exchange=FLAT, exchange_bits=8),
    "DP32 TP2 deduplicated": Layout(data=32, tensor=2, expert=64, exchange=DEDUPLICATED),
    "CP8 gather": Layout(context=8, expert=8, exchange=GATHER),
}
TOKENS = {PREFILL: 128, DECODE: 32}
"""Rows that each rank carries between blocks."""
NODE = 8


def config() -> Glm5Config:
    """Eight layers; every stage of four begins with an indexer."""
    types = ["full", "shared"] * 4
    return quick_config(
        vocab_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, n_routed_experts=256, index_n_heads=2, indexer_types=types, max_position_embeddings=8192,
    )  # fmt: skip


def tokens_of_group(layout: Layout, phase: str) -> int:
    return TOKENS[phase] * layout.tensor * layout.context


def charged(layout: Layout, phase: str) -> dict[str, float]:
    """Bytes that the cost model says a device sends in a step, by purpose; for evenly loaded experts."""
    tokens = tokens_of_group(layout, phase)
    step = Step(
        config=config(), topology=find_hardware("hgx-h200"), layout=layout.in_phase(phase), weights="bf16", kv_format="plain",
        phase=phase, tokens=tokens, sequences=1 if phase == PREFILL else tokens, context=tokens, groups=layout.data, calls=1,
        size=model_size(config()),
    )  # fmt: skip
    even = imbalance(step) if layout.exchange in (FLAT, DEDUPLICATED) else 1.0
    names = {
        "tensor": ("tensor all-reduce", "tensor reduce-scatter, all-gather"),
        "context": ("context all-gather",),
        "experts": ("expert dispatch", "expert combine"),
        "pipeline": ("pipeline hand-off",),
    }
    bytes_of = {purpose: sum(TERMS[name].of(step).link_bytes for name in terms) for purpose, terms in names.items()}
    return bytes_of | {"experts": bytes_of["experts"] / even}


def expected_counts(layout: Layout) -> dict[str, int]:
    """Collectives of one rank of each stage together, by hand."""
    of = config()
    layers, moe, indexed = of.num_hidden_layers, len(of.moe_layers), len(of.full_layers)
    found: Counter[str] = Counter()
    if layout.exchange == "all_reduce":
        found["allreduce_"] += 2 * layers + 1  # and one for the embedding
        found["_allgather_base_"] += layout.pipeline - 1  # hidden states are sent in slices
    else:
        if layout.tensor > 1:
            found["_allgather_base_"] += 2 * layers - moe
            found["_reduce_scatter_base_"] += 2 * layers - moe + 1
        found["_allgather_base_"] += 1  # the last hidden states, to every rank
        if layout.context > 1:
            found["_allgather_base_"] += layers + indexed
        if layout.exchange == GATHER:
            found["_allgather_base_"] += moe
            found["_reduce_scatter_base_" if layout.exchange_bits == 16 else "alltoall_base_"] += moe
        else:
            found["alltoall_base_"] += 3 * moe  # counts, tokens, sums
    return {name: count for name, count in found.items() if count}


def _even_routes(hidden: Tensor, gate: Tensor, correction_bias: Tensor, *, top_k: int, **_: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hidden.shape[0])
    ids = torch.rand(hidden.shape[0], gate.shape[0], generator=generator).argsort(dim=1)[:, :top_k]
    return torch.ones(ids.shape), ids.to(torch.int32)


def walk(layout: Layout, stage: int, phase: str) -> tuple[Counter[str], Counter[str]]:
    """(bytes by purpose, collectives seen by torch) of the second-last rank of a stage, in one step."""
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = (stage + 1) * layout.stage_ranks - 2
    dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
    of = config()
    ranks = PlanRanks(layout, of, node_devices=NODE, device=torch.device("cpu"))
    whole, expected = random_weights(of, dtype=torch.bfloat16), expected_tensors(of, mtp=False)

    def read(name: str) -> Tensor:
        cut = ranks.cut(name, expected[name].component, expected[name].shape)
        return whole(name) if cut is None else whole(name).narrow(*cut).clone()

    ranks.check_choices = lambda selections: None  # type: ignore[method-assign]  # asks objects of other ranks, which are not there
    model = build(of, read, backend="cpu", dtype=torch.bfloat16, ranks=ranks)
    for bound in model.binder.bindings:
        if bound.selection.operator == "route_experts":
            bound.function = _even_routes
    tokens = tokens_of_group(layout, phase)
    each = layout.data if phase == PREFILL else layout.data * tokens
    cache = model.new_cache([tokens] * layout.data if phase == PREFILL else [2] * each)
    spans = [Span(cache.open(), 0, tokens if phase == PREFILL else 1) for _ in range(each)]
    batch = cache.batch(spans)
    ids = torch.zeros(layout.data * tokens, dtype=torch.int64)
    with torch.no_grad(), trace_through(), collectives.record() as sent, CommDebugMode() as seen:
        model.step(ids, batch, cache)
    dist.destroy_process_group()
    bytes_of: Counter[str] = Counter()
    for one in sent:
        bytes_of[one.purpose] += one.bytes - one.routes  # type: ignore[assignment]
    return bytes_of, Counter({str(name).split(".")[-1]: count for name, count in seen.get_comm_counts().items()})


def main() -> None:
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        found[name] = {}
        for phase in (PREFILL, DECODE) if layout.context == 1 else (PREFILL,):
            walked = [walk(layout, stage, phase) for stage in range(layout.pipeline)]
            bytes_of, seen = (sum((each[part] for each in walked), Counter()) for part in (0, 1))
            found[name][phase] = {"bytes": bytes_of, "seen": seen}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
