"""A small model inside every contract of the vendor's operators: hidden 1024, query latent 2048, latent 512 + 64, nope part 192,
sixteen index heads of 128."""

from __future__ import annotations

from typing import Any

import torch

from tests.model.models import prompt

CONTRACTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_topk": 16,
    "first_k_dense_replace": 2,
    "indexer_types": ["full", "full", "shared", "full"],
    "index_topk_freq": None,
    "index_skip_topk_offset": None,
}
BLOCK = 16
TOKENS = torch.tensor([prompt(40, vocabulary=256)])
