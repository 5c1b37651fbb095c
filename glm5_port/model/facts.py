"""The static facts of a GLM-5 model, operator by operator: what a choice may depend on, and `explain` assumes by default."""

from __future__ import annotations

from typing import Any

from glm5_port.config import Glm5Config
from glm5_port.operators.exchange import ALL_REDUCE
from glm5_port.quant.int4 import AMAX7, PER_CHANNEL


def operator_facts(config: Glm5Config, *, cache_format: str, page_size: int) -> dict[str, dict[str, Any]]:
    """Operator name -> fact name -> value, for everything a model binds and for the operators that tools bind.

    Where one operator is used at several widths (`rms_norm`, `linear`, `int4_matmul`, ...), the entry is its largest use and
    layers override what differs.
    """
    width = {"width": config.hidden_size}
    attention = {
        "heads": config.num_attention_heads,
        "latent_dim": config.kv_lora_rank,
        "rope_dim": config.qk_rope_head_dim,
        "page_size": page_size,
        "cache_format": cache_format,
    }
    project = {
        **width,
        "query_latent_dim": config.q_lora_rank,
        "latent_dim": config.kv_lora_rank,
        "rope_dim": config.qk_rope_head_dim,
        "rope_interleaved": config.rope_interleave,
        "heads": config.num_attention_heads,
        "nope_dim": config.qk_nope_head_dim,
    }
    values = {"heads": config.num_attention_heads, "value_dim": config.v_head_dim, "latent_dim": config.kv_lora_rank}
    scores = {
        "heads": config.index_n_heads,
        "head_dim": config.index_head_dim,
        "page_size": page_size,
        "cache_format": cache_format,
    }
    experts = {**width, "experts": config.n_routed_experts, "top_k": config.num_experts_per_tok}
    int4 = {"group_size": AMAX7.group_size if config.int4 is None else config.int4.group_size}
    int4_experts = {**experts, **int4, "width_between": config.moe_intermediate_size}
    exchange = {"form": ALL_REDUCE, "bits": 16, "ranks": 1, "node_ranks": 1, "expert_tensor": 1}
    return {
        "rms_norm": width,
        "add_rms_norm": width,
        "rotate": {
            "head_dim": config.qk_rope_head_dim,
            "rope_dim": config.qk_rope_head_dim,
            "interleaved": config.rope_interleave,
            "start": 0,
        },
        "linear": {"width_in": config.hidden_size, "width_out": config.vocab_size},
        "linear_per_head": {
            "heads": config.num_attention_heads,
            "width_in": config.kv_lora_rank,
            "width_out": config.v_head_dim,
        },
        "gated_mlp": {**width, "width_between": config.intermediate_size},
        "mla_project": project,
        "mla_prologue": project,
        "mla_prologue_into_cache": {**project, "page_size": page_size, "cache_format": cache_format},
        "write_cache": {
            "kind": "latent",
            "widths": (config.kv_lora_rank, config.qk_rope_head_dim),
            "page_size": page_size,
            "cache_format": cache_format,
        },
        "mla_attention_expanded": {**attention, "nope_dim": config.qk_nope_head_dim, "value_dim": config.v_head_dim},
        "mla_attention_absorbed": attention,
        "sparse_mla_attention": {**attention, "top_k": config.index_topk},
        "attention_output": {**values, **width},
        "indexer_prologue": {
            **width,
            "query_latent_dim": config.q_lora_rank,
            "heads": config.index_n_heads,
            "head_dim": config.index_head_dim,
            "rope_dim": config.qk_rope_head_dim,
            "rope_interleaved": config.indexer_rope_interleave,
        },
        "indexer_scores": scores,
        "select_top_k": {"top_k": config.index_topk},
        "lightning_indexer": {**scores, "top_k": config.index_topk},
        "route_experts": {
            **experts,
            "groups": config.n_group,
            "groups_kept": config.topk_group,
            "renormalise": config.norm_topk_prob,
        },
        "dispatch_tokens": {**experts, **exchange},
        "combine_tokens": {**width, **exchange},
        "expert_mlp": {**experts, "width_between": config.moe_intermediate_size},
        "int4_quantize": {**width, **int4, "rule": AMAX7.name},
        "int4_quantize_measured": {**width, **int4, "rule": AMAX7.name},
        "int4_dequantize": {**width, **int4},
        "int4_matmul": {"width_in": config.hidden_size, "width_out": config.intermediate_size, **int4},
        "int8_matmul": {"width_in": config.hidden_size, "width_out": config.intermediate_size},
        "expert_mlp_int4": int4_experts,
        "expert_mlp_int4_w4a8": {**int4_experts, "activation_group_size": PER_CHANNEL},
    }
