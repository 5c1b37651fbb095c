"""A small GLM-5.2-shaped model: every structural feature of the family at a size that a laptop runs in seconds.

Latent 512 + rope 64 and index heads of 128, as released, so that every cache format applies; 16 index heads, because with few of
them random models tie at the selection cut (all dots negative: score exactly zero) and two correct implementations may differ.
"""

from __future__ import annotations

from typing import Any

from glm5_port.config import Glm5Config

TINY: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "float32",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 48,
    "v_head_dim": 32,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 8,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
    "index_share_for_mtp_iteration": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 8_000_000.0, "rope_type": "default"},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": [257],
    "pad_token_id": 256,
}
"""config.json of the tiny model: bytes 0..255, pad 256, end 257."""


def tiny_config(**changes: Any) -> Glm5Config:
    """`TINY` with fields replaced, as a checked config."""
    return Glm5Config.from_dict({**TINY, **changes})
