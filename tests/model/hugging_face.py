"""What the comparison with Hugging Face transformers needs beside `glm5_port.testing.hugging_face`: a smaller config, and ways
to watch what the model selects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as modeling

from glm5_port.testing.hugging_face import write_checkpoint
from glm5_port.testing.tiny import TINY

SMALL: dict[str, Any] = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "index_head_dim": 32,
    "num_nextn_predict_layers": 0,
}


def make(directory: Path, *, seed: int = 0, **changes: Any) -> GlmMoeDsaForCausalLM:
    """Writes a random float32 checkpoint of `SMALL` with fields replaced, and returns the model that was saved."""
    return write_checkpoint(directory, {**SMALL, **changes}, seed=seed)


def set_latent_eps(model: GlmMoeDsaForCausalLM, eps: float) -> None:
    """Gives the two latent norms another eps than Hugging Face's fixed 1e-6."""
    for layer in model.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = eps
        layer.self_attn.kv_a_layernorm.variance_epsilon = eps


@contextlib.contextmanager
def watch_selection() -> Iterator[list[Tensor]]:
    """Collects what every indexer of the model selects, in call order: [B, S, k] each."""
    seen: list[Tensor] = []
    original = modeling.GlmMoeDsaIndexer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = original(self, *args, **kwargs)
        seen.append(result)
        return result

    modeling.GlmMoeDsaIndexer.forward = forward
    try:
        yield seen
    finally:
        modeling.GlmMoeDsaIndexer.forward = original


class StableTopK(TorchFunctionMode):
    """Within the context, top-k is a stable sort, which keeps the lowest position first among equals: this library's rule."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.topk, torch.topk):
            return func(*args, **(kwargs or {}))
        given = dict(zip(("x", "k", "dim"), args, strict=False)) | (kwargs or {})
        x, k, dim = given["x"], given["k"], given.get("dim", -1)
        values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
