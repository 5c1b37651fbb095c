"""How llama.cpp calls the tensors of a glm-dsa model, and what it reads about one.

Source: the reader and the converter of llama.cpp for glm-dsa (src/models/glm-dsa.cpp, conversion/).
"""

from __future__ import annotations

import re

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from glm5_port.quant.gguf_file import Value

ARCHITECTURE = "glm-dsa"
MOSTLY_Q4_0, SIGMOID = 2, 2

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
_OUTER_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
KV_B = "self_attn.kv_b_proj.weight"
_FLOAT32_MATRICES = ("ffn_gate_inp.weight",)
_OURS = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_EXPERT_PIECE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight\[(\d+)\]")


def piece_of(name: str) -> str | None:
    """The piece that a tensor of the source becomes: an expert has a place in a stack. None if glm-dsa has no such tensor, or
    two for it (kv_b_proj)."""
    if found := _EXPERT.fullmatch(name):
        return f"blk.{found[1]}.ffn_{found[3]}_exps.weight[{found[2]}]"
    if found := re.match(r"model\.layers\.(\d+)\.", name):
        theirs = _LAYER_NAMES.get(name[found.end() :])
        return None if theirs is None else f"blk.{found[1]}.{theirs}"
    return _OUTER_NAMES.get(name)


def source_of(piece: str) -> str | None:
    """The tensor of the source that a piece comes from; None where `piece_of` gives no such piece."""
    if found := _EXPERT_PIECE.fullmatch(piece):
        return f"{layer_prefix(int(found[1]))}mlp.experts.{found[3]}.{found[2]}_proj.weight"
    if found := re.match(r"blk\.(\d+)\.", piece):
        ours = _OURS.get(piece[found.end() :])
        return None if ours is None else layer_prefix(int(found[1])) + ours
    return next((ours for ours, theirs in _OUTER_NAMES.items() if theirs == piece), None)


def is_wide(piece: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in float32: norms, biases and routers."""
    return len(shape) == 1 or piece.endswith(_FLOAT32_MATRICES)


def check_model(config: Glm5Config) -> None:
    """Refuses a model that llama.cpp's glm-dsa does not compute.

    Raises:
        InputError: dense layers above mixtures of experts, or rotation by halves.
    """
    dense = sum(kind == "dense" for kind in config.mlp_layer_types)
    if any(kind == "dense" for kind in config.mlp_layer_types[dense:]):
        raise InputError("gguf: dense layers lie above mixtures of experts; glm-dsa counts leading dense layers only")
    if not (config.rope_interleave and config.indexer_rope_interleave):
        raise InputError("gguf: llama.cpp's glm-dsa rotates interleaved pairs, and this model halves")


def model_metadata(config: Glm5Config, name: str, *, mtp: bool) -> dict[str, Value]:
    """What llama.cpp reads about the model. The MTP layer counts as a block; the latent attention appears as one head of keys;
    groups of experts that leave none out are one group."""
    grouped = config.topk_group < config.n_group
    general: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": MOSTLY_Q4_0,
        "general.quantization_version": 2,
    }
    fields: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers + int(mtp),
        "nextn_predict_layers": int(mtp),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": sum(kind == "dense" for kind in config.mlp_layer_types),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group if grouped else 1,
        "expert_group_used_count": config.topk_group if grouped else 1,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.indexer.types": [config.owns_indexer(layer) for layer in config.layers],
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}
