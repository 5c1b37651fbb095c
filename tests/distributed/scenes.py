"""What the ranks of a test do: run layouts of a small model and compare with one process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.ranks import Ranks
from glm5_port.model.tensors import expected_tensors
from glm5_port.parallel.execute import PlanRanks
from glm5_port.parallel.plan import Layout
from tests.model.models import prompt, quick_config

NODE = 2
"""Ranks of a machine, in every scene."""
GATHER, FLAT, DEDUPLICATED, HIERARCHICAL = "all_gather", "all_to_all", "deduplicated", "hierarchical"

TWO = {
    "TP2": Layout(tensor=2, expert_tensor=2),
    "TP2 EP2": Layout(tensor=2, expert=2),
    "TP2 EP2 gather": Layout(tensor=2, expert=2, exchange=GATHER),
    "TP2 EP2 deduplicated": Layout(tensor=2, expert=2, exchange=DEDUPLICATED),
    "DP2 EP2 gather": Layout(data=2, expert=2, exchange=GATHER),
    "DP2 EP2 flat": Layout(data=2, expert=2, exchange=FLAT),
    "DP2 EP2 flat, gather in prefill": Layout(data=2, expert=2, exchange=FLAT, prefill_exchange=GATHER),
    "DP2 EP2 flat with copies": Layout(data=2, expert=2, exchange=FLAT, redundant_experts=4),
    "PP2": Layout(pipeline=2),
    "PP2, selection shared across the cut": Layout(pipeline=2, stages=(2, 3)),
    "DP2 EP2 flat, 3 drafts": Layout(data=2, expert=2, exchange=FLAT, drafts=3),
    "CP2 EP2 gather": Layout(context=2, expert=2, exchange=GATHER),
}
FOUR = {
    "DP2 TP2 EP4 gather": Layout(data=2, tensor=2, expert=4, exchange=GATHER),
    "DP2 TP2 EP2 x TP2 gather": Layout(data=2, tensor=2, expert=2, expert_tensor=2, exchange=GATHER),
    "DP4 EP4 hierarchical": Layout(data=4, expert=4, exchange=HIERARCHICAL),
    "DP2 TP2 EP4 hierarchical with copies": Layout(data=2, tensor=2, expert=4, exchange=HIERARCHICAL, redundant_experts=4),
    "TP4 EP4 flat": Layout(tensor=4, expert=4, exchange=FLAT),
    "PP2 TP2 EP2": Layout(pipeline=2, tensor=2, expert=2, stages=(2, 3)),
    "PP2 TP2 EP2 gather": Layout(pipeline=2, tensor=2, expert=2, exchange=GATHER, stages=(4, 1)),
    "PP2 DP2 EP2 deduplicated": Layout(pipeline=2, data=2, expert=2, exchange=DEDUPLICATED, stages=(2, 3)),
    "PP2 TP2 EP2 gather, 2 drafts": Layout(pipeline=2, tensor=2, expert=2, exchange=GATHER, drafts=2),
    "TP4 EP4, 2 drafts": Layout(tensor=4, expert=4, drafts=2),
    "DP2 CP2 EP4 hierarchical": Layout(data=2, context=2, expert=4, exchange=HIERARCHICAL),
    "CP2 TP2 EP4 gather": Layout(context=2, tensor=2, expert=4, exchange=GATHER),
}
PROMPTS = [prompt(length) for length in (13, 1, 6, 30)]
NEW_TOKENS = 4


@functools.cache
def config() -> Glm5Config:
    """`quick_config` with heads enough for four ranks."""
    return quick_config(num_attention_heads=4, num_key_value_heads=4)


def make(ranks: Ranks, of: Glm5Config | None = None, **options: Any) -> Glm5Model:
    """The model of one rank, from random weights of which it takes its part."""
    of, mtp = of or config(), options.get("mtp", False)
    whole, expected = random_weights(of, dtype=torch.float32, mtp=mtp), expected_tensors(of, mtp=mtp)

    def read(name: str) -> Tensor:
        cut = ranks.cut(name, expected[name].component, expected[name].shape)
        return whole(name) if cut is None else whole(name).narrow(*cut).clone()

    return build(of, read, backend="cpu", dtype=torch.float32, ranks=ranks, **options)


def ranks_of(layout: Layout, of: Glm5Config | None = None, **options: Any) -> PlanRanks:
    return PlanRanks(layout, of or config(), node_devices=NODE, device=torch.device("cpu"), **options)


def layouts(rank: int, world: int) -> dict[str, tuple[float, bool, int]]:
    """Layout -> (largest difference of logits from one process, whether generation is the same, parameters held)."""
    ids = torch.tensor([prompt(23), prompt(23, seed=1)])
    alone = make(Ranks())
    logits, tokens = alone(ids), alone.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    found = {}
    for name, layout in (TWO if world == 2 else FOUR).items():
        model = make(ranks_of(layout), mtp=layout.drafts > 0)
        error = float((model(ids) - logits).abs().max())
        same = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, draft_tokens=max(layout.drafts, 1)) == tokens
        assert model.speculation.rounds > 0 or not layout.drafts
        found[name] = (error, same, sum(parameter.numel() for parameter in model.parameters()))
    return found


# -- the operators of the exchange, and faults ----------------------------------------------------------------------------


def exchanges(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Every form of dispatch and combine between four ranks, with 0 to 9 tokens each, against the sum that one process computes:
    "experts" that multiply by a number of their own.

    Returns:
        form -> errors of arrivals and sums over what is allowed, rows that arrived, and bytes sent for experts.
    """
    import torch.distributed as dist

    from glm5_port import collectives
    from glm5_port import operators as ops
    from glm5_port.parallel.placement import place

    experts, choices, width = 8, 3, 300
    layout = Layout(data=world, expert=world, exchange=FLAT)
    groups = ranks_of(layout).groups
    counts = {GATHER: [7] * world}
    factors = torch.arange(1.0, experts + 1)
    found: dict[str, dict[str, Any]] = {}
    for redundant in (0, world):
        placement = place(experts, world, redundant)
        here = torch.tensor(placement.groups[rank])
        for form in (GATHER, FLAT, DEDUPLICATED, HIERARCHICAL):
            for bits in (16, 8):
                tokens = counts.get(form, [9, 0, 4, 6])[rank]
                random = torch.Generator().manual_seed(rank)
                hidden = torch.randn(tokens, width, generator=random)
                ids = torch.rand(tokens, experts, generator=random).argsort(dim=1)[:, :choices].to(torch.int32)
                weights = torch.rand(tokens, choices, generator=random)
                if tokens:
                    ids[0, 1] = -1  # no choice
                options = {"form": form, "bits": bits, "ranks": world, "node_ranks": NODE, "expert_tensor": 1, "groups": groups}
                with collectives.record() as sent:
                    arrived, arrived_weights, places, trace = ops.dispatch_tokens(
                        hidden, weights, ids, placement.table(), slots=placement.slots, **options
                    )
                    used = places >= 0
                    factor = torch.where(used, factors[here[places.clamp(min=0).long()]] * arrived_weights, 0.0).sum(1)
                    results = arrived * factor[:, None]
                    total = ops.combine_tokens(results, trace, tokens=tokens, **options)
                chosen = torch.where(ids >= 0, factors[ids.clamp(min=0).long()] * weights, 0.0).sum(1)
                groups_of = torch.nn.functional.pad(hidden, (0, -width % 128)).unflatten(1, (-1, 128))
                step = groups_of.abs().amax(-1).repeat_interleave(128, 1)[:, :width] / 254
                # 8 bits: the dispatch rounds by a step; a gather rounds each rank's part of the sum again, by at most as much
                allowed = 1e-4 + (bits == 8) * chosen[:, None] * step * (2.05 if form == GATHER else 1.01)
                error = float(((total - hidden * chosen[:, None]).abs() / allowed).max()) if tokens else 0.0
                name = f"{form}{' with copies' if redundant else ''}{' in 8 bits' if bits == 8 else ''}"
                found[name] = {
                    "error": error,
                    "rows": arrived.shape[0],
                    "exact": bits == 16,
                    "sent": sum(each.bytes for each in sent if each.purpose == "experts"),
                }
    dist.barrier()
    return found


EVEN_TOKENS, EVEN_WIDTH, EVEN_EXPERTS, EVEN_CHOICES = 400, 256, 64, 8


def even_exchanges(rank: int, world: int) -> dict[str, int]:
    """Form -> bytes that this rank sends for experts, there and back; EVEN_TOKENS bfloat16 tokens, random routes."""
    from glm5_port import collectives
    from glm5_port import operators as ops
    from glm5_port.parallel.placement import place

    groups = ranks_of(Layout(data=world, expert=world, exchange=FLAT)).groups
    placement = place(EVEN_EXPERTS, world, 0)
    random = torch.Generator().manual_seed(rank)
    hidden = torch.randn(EVEN_TOKENS, EVEN_WIDTH, generator=random).bfloat16()
    ids = torch.rand(EVEN_TOKENS, EVEN_EXPERTS, generator=random).argsort(dim=1)[:, :EVEN_CHOICES].to(torch.int32)
    weights, found = torch.rand(EVEN_TOKENS, EVEN_CHOICES, generator=random), {}
    for form in (GATHER, FLAT, DEDUPLICATED, HIERARCHICAL):
        options = {"form": form, "bits": 16, "ranks": world, "node_ranks": NODE, "expert_tensor": 1, "groups": groups}
        with collectives.record() as sent:
            arrived, _, _, trace = ops.dispatch_tokens(hidden, weights, ids, placement.table(), slots=placement.slots, **options)
            ops.combine_tokens(arrived, trace, tokens=EVEN_TOKENS, **options)
        found[form] = sum(each.bytes - each.routes for each in sent if each.purpose == "experts")
    return found


def quantised(rank: int, world: int) -> dict[str, float]:
    """Largest differences of logits from one process in 16 bits, and from one that rounds what it dispatches, over the spread."""
    from glm5_port.model.ranks import Exchange
    from glm5_port.operators.exchange import in_eight_bits

    class Rounded(Exchange):
        def __call__(self, hidden_TD: Tensor, weights: Tensor, ids: Tensor, batch: Any, experts: Any, shared: Any) -> Tensor:
            return experts(hidden=in_eight_bits(hidden_TD, 8), route_weights=weights, ids=ids) + shared(hidden_TD)

    class RoundedRanks(Ranks):
        def exchange(self, *_: Any) -> Exchange:
            return Rounded()

    ids = torch.tensor([prompt(23)])
    exact, rounded = make(Ranks())(ids), make(RoundedRanks())(ids)
    found = {"rounding": float((rounded - exact).abs().max())}
    for form in (FLAT, DEDUPLICATED, GATHER):
        logits = make(ranks_of(Layout(data=world, expert=world, exchange=form, exchange_bits=8)))(ids)
        found[f"{form} from 16 bits"] = float((logits - exact).abs().max())
        found[f"{form} from rounded"] = float((logits - rounded).abs().max())
    return found


def other_selection(rank: int, world: int) -> str:
    """Rank 1 of a tensor group selects other positions: the error that a rank gets."""
    from glm5_port.errors import RankMismatchError

    model = make(ranks_of(Layout(tensor=world, expert=world, exchange=GATHER)))
    if rank == 1:
        for bound in model.binder.bindings:
            if bound.selection.operator == "lightning_indexer":
                inner = bound.function
                bound.function = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs).flip(1)
    try:
        model.generate([prompt(9)], max_new_tokens=2)
    except RankMismatchError as error:
        return str(error)
    return ""


def asked_rows(rank: int, world: int) -> dict[str, tuple[float, float, float]]:
    """Layout -> (largest difference between the rows that a step was asked for and those of all its rows; bytes that a rank sends
    so that all ranks have them, as asked and of all rows)."""
    from glm5_port import collectives
    from glm5_port.model.cache import Span

    counts, found = [9, 1, 4, 17], {}
    rows = torch.tensor([30, 0, 9, 8, 13])
    tokens = torch.tensor([token for count in counts for token in prompt(count)])
    for name, layout in FOUR.items():
        if layout.drafts:
            continue
        model, results, sent = make(ranks_of(layout)), [], []
        for asked in (rows, None):
            cache = model.new_cache(counts)
            batch = cache.batch([Span(cache.open(), 0, count) for count in counts])
            with torch.no_grad(), collectives.record() as calls:
                results.append(model.step(tokens, batch, cache, asked))
            sent.append(sum(each.bytes for each in calls if each.purpose == "bookkeeping" and each.collective == "all_gather"))
        assert results[0].shape == (len(rows), config().hidden_size)
        found[name] = (float((results[0] - results[1][rows]).abs().max()), *sent)
    return found
