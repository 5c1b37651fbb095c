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
PROMPTS = [prompt(length) for length in (13, 1, 6, 9, 30)]
NEW_TOKENS = 5


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
