"""Small models of both kinds for the tests of INT4-aware training, and what they are asked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.quant import dequantize, unpack_int4
from glm5_port.quant.qat import (
    canonical_tensors,
    scale_parameters,
)
from glm5_port.testing.tiny import tiny_config

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 4,
    "index_topk_freq": None,
    "index_skip_topk_offset": None,
    "indexer_types": ["full", "full", "shared"],
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "eos_token_id": [47],
    "pad_token_id": 46,
}
ROWS = torch.randint(0, 46, (2, 13), generator=torch.Generator().manual_seed(5))
EXPERTS = 2 * 4 * 3
"""Matrices of two MoE layers."""

torch.set_num_threads(1)


def small_config(**changes: Any) -> Glm5Config:
    return tiny_config(**{**SMALL, **changes})


def ours(dtype: torch.dtype = torch.float32, *, mtp: bool = False, max_context: int | None = None, **changes: Any) -> Glm5Model:
    config = small_config(**changes)
    weights = random_weights(config, dtype=dtype, mtp=mtp)
    return build(config, weights, backend="cpu", dtype=dtype, trainable=True, block_size=5, mtp=mtp, max_context=max_context)


def logits_of(model: nn.Module) -> Tensor:
    found = model(ROWS)
    return found if isinstance(found, Tensor) else found.logits


def loss_of(model: nn.Module) -> Tensor:
    logits = logits_of(model)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ROWS[:, 1:].flatten())


def train(model: nn.Module, steps: int, *, lr: float = 2e-3, **options: Any) -> list[float]:
    """AdamW on one fixed batch; the learned scales at a fortieth of the rate."""
    scales = scale_parameters(model)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not scale for scale in scales)]
    groups = [{"params": others}] + ([{"params": scales, "lr": lr / 40, "weight_decay": 0.0}] if scales else [])
    optimizer = torch.optim.AdamW(groups, lr=lr, **options)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def decoded(model: nn.Module) -> dict[str, Tensor]:
    """Weights from canonical tensors alone."""
    tensors = dict(canonical_tensors(model))
    weights = {}
    for name in tensors:
        if name.endswith("_packed"):
            weight = name.removesuffix("_packed")
            weights[weight] = dequantize(unpack_int4(tensors[name]), tensors[weight + "_scale"])
            assert tensors[weight + "_shape"].tolist() == list(weights[weight].shape)
            assert tensors[weight + "_shape"].dtype == torch.int32
            assert tensors[weight + "_scale"].dtype == torch.bfloat16
            assert tensors[name].is_contiguous()
    assert len(tensors) == 3 * len(weights)
    return weights


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, signs of zeros included."""
    return a.shape == b.shape and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))
