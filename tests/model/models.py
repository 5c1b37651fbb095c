"""Small models for the tests of this folder: every structural feature of the family in a few milliseconds a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.testing.tiny import tiny_config

QUICK: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 4,
    "indexer_types": ["full", "full", "shared", "full", "shared"],
    "index_topk_freq": None,
    "index_skip_topk_offset": None,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "eos_token_id": [39],
    "pad_token_id": 38,
}


def quick_config(**changes: Any) -> Glm5Config:
    """`QUICK` with fields replaced. Selection (index_topk 4) is active in every prompt of more than four tokens."""
    return tiny_config(**{**QUICK, **changes})


def quick_model(
    config: Glm5Config | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> Glm5Model:
    """A model with random weights, in float64 unless told otherwise: then equal means equal to 1e-10, not to luck."""
    config = config or quick_config()
    weights = random_weights(config, dtype=dtype, seed=seed, mtp=options.get("mtp", False))
    return build(config, weights, backend="cpu", dtype=dtype, **options)


def prompt(length: int, *, seed: int = 0, vocabulary: int = 38) -> list[int]:
    """`length` random tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


@contextlib.contextmanager
def watch(model: Glm5Model, seen: Callable[[str, dict[str, Any], Any], None]) -> Iterator[None]:
    """Within the context, `seen(operator, arguments by name, result)` is called after every operator call of the model."""
    bindings = model.binder.bindings
    originals = [bound.function for bound in bindings]

    def watcher(bound: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            arguments = dict(zip(bound.implementation.operator.parameters, args, strict=False)) | kwargs
            seen(bound.selection.operator, arguments, result)
            return result

        return call

    for bound, inner in zip(bindings, originals, strict=True):
        bound.function = watcher(bound, inner)
    try:
        yield
    finally:
        for bound, inner in zip(bindings, originals, strict=True):
            bound.function = inner


def calls(model: Glm5Model, run: Callable[[], Any]) -> list[tuple[str, dict[str, Any], Any]]:
    """Every operator call that `run()` makes: (operator, arguments, result)."""
    found: list[tuple[str, dict[str, Any], Any]] = []
    with watch(model, lambda *call: found.append(call)):
        run()
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())
