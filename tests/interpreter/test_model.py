"""A tiny GLM-5.2 whose layers run the Triton kernels by the interpreter gives the tokens of the CPU's reference. No GPU runs."""

from __future__ import annotations

from typing import Any

import torch

from glm5_port.backends.cuda.triton_support import BACKEND, interpreted
from glm5_port.model.build import build, random_weights
from glm5_port.registry import OPERATORS, Implementation
from glm5_port.testing.tiny import tiny_config

CONFIG = tiny_config(num_hidden_layers=4, vocab_size=64, eos_token_id=[63], pad_token_id=62)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1]]
EXPECTED = {
    "add_rms_norm",
    "mla_prologue_into_cache",
    "indexer_prologue",
    "write_cache",
    "lightning_indexer",
    "sparse_mla_attention",
    "route_experts",
}


def triton_of(operator: str, facts: dict[str, Any]) -> Implementation | None:
    """The best one of cuda's own, if its weights are canonical; also where the portable one would be chosen."""
    mine = [i for i in OPERATORS[operator].implementations.values() if i.backend == BACKEND]
    fits = [i for i in mine if i.prepare is None and not i.not_supported(**facts)]
    return min(fits, key=lambda i: i.rank, default=None)


def test_greedy_tokens_are_those_of_the_reference() -> None:
    assert interpreted()
    weights = random_weights(CONFIG, dtype=torch.float32)
    reference = build(CONFIG, weights, implementation="reference")
    model = build(CONFIG, weights, implementation="reference")
    replaced = set()
    for bound in model.binder.bindings:  # tensors are on the CPU, where nothing would choose a kernel of cuda
        facts = {**bound.selection.facts, "device_type": "cuda"}
        if (chosen := triton_of(bound.selection.operator, facts)) is not None:
            bound.function = chosen.function
            replaced.add(bound.selection.operator)
    assert replaced >= EXPECTED
    with torch.no_grad():
        tokens = model.generate(PROMPTS, max_new_tokens=4, stop_ids=[])
        assert tokens == reference.generate(PROMPTS, max_new_tokens=4, stop_ids=[])
        logits, expected = (m(torch.tensor(PROMPTS[:1])) for m in (model, reference))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
