"""A canonical INT4 checkpoint as one GGUF file of architecture glm-dsa, for llama.cpp.

Experts become Q4_0 by moving bits: value = d * (n - 8) with the same codes, and d the scale in float16, which must hold it
exactly. All other tensors keep their values: bf16 where they were, float32 for norms, biases and routers, as llama.cpp wants.
kv_b_proj is split into the two matrices of the absorbed attention, the key's transposed.

llama.cpp multiplies by d * q, not by bf16(d * q).

Source: the reader and the converter of llama.cpp for glm-dsa (src/models/glm-dsa.cpp, conversion/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.checkpoint_check import differences
from glm5_port.model.stored_tensors import StoredTensors, read_directory
from glm5_port.model.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors, layer_prefix
from glm5_port.quant.files import Reader, as_bytes
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE
from glm5_port.quant.formats.gguf_tokenizer import tokenizer_metadata
from glm5_port.quant.gguf_file import GgufTensor, Value, write_gguf
from glm5_port.quant.int4 import PER_CHANNEL
from glm5_port.quant.layouts import Q4_0_BLOCK, to_q4_0
from glm5_port.quant.packing import unpack_int4

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
_KV_B = "self_attn.kv_b_proj.weight"
_PROJECTIONS = ("gate", "up", "down")
_FLOAT32_MATRICES = ("ffn_gate_inp.weight",)


def export_gguf(source: str | PathLike[str], destination: str | PathLike[str], *, name: str | None = None) -> int:
    """Writes a canonical INT4 checkpoint as a GGUF file; its bytes. Holds one expert, or one other tensor, at a time.

    Args:
        source: directory of a checkpoint whose routed experts are compressed-tensors `pack-quantized`, in
            groups of whole blocks of 32.
        destination: the file; it is there whole or not at all.
        name: of the model, for people; that of the directory otherwise.

    Raises:
        InputError: other groups, scales that float16 does not hold (listed), or a model that llama.cpp does not compute.
        CheckpointError: a checkpoint that is not whole.
    """
    directory, path = Path(source), Path(destination)
    config = Glm5Config.from_json(directory)
    stored = read_directory(directory)
    mtp = config.mtp_layer is not None and any(n.startswith(layer_prefix(config.mtp_layer)) for n in stored.tensors)
    check(config)
    if found := differences(expected_tensors(config, mtp), stored, config):
        raise CheckpointError(f"{directory} cannot be written as GGUF\n" + "\n".join(found))
    metadata = {
        **model_metadata(config, name or directory.resolve().name, mtp=mtp),
        **tokenizer_metadata(directory / "tokenizer.json", config),
    }
    with Reader(directory) as reader:
        return write_gguf(path, metadata, list(model_tensors(config, stored, reader, mtp=mtp)))


def check(config: Glm5Config) -> None:
    """Refuses what this format or llama.cpp's glm-dsa cannot hold."""
    if config.int4 is None:
        raise InputError("gguf: this checkpoint has no INT4 experts.\n  Export it as compressed-tensors first.")
    if config.int4.group_size != PER_CHANNEL and config.int4.group_size % Q4_0_BLOCK:
        raise InputError(
            f"gguf: this checkpoint has groups of {config.int4.group_size}; a block of Q4_0 has {Q4_0_BLOCK} weights, and groups "
            "must be whole blocks.\n  Export it with groups of 32 first."
        )
    dense = sum(kind == "dense" for kind in config.mlp_layer_types)
    if any(kind == "dense" for kind in config.mlp_layer_types[dense:]):
        raise InputError("gguf: dense layers lie above mixtures of experts; glm-dsa counts leading dense layers only")
    if not (config.rope_interleave and config.indexer_rope_interleave):
        raise InputError("gguf: llama.cpp's glm-dsa rotates interleaved pairs, and this model halves")


# -- tensors -------------------------------------------------------------------------------------------------------------


def model_tensors(config: Glm5Config, stored: StoredTensors, reader: Reader, *, mtp: bool) -> Iterator[GgufTensor]:
    """Every tensor of the file, in the order of the layers."""
    yield from (_plain(ours, theirs, stored, reader) for ours, theirs in _OUTER_NAMES.items() if ours in stored.tensors)
    last = () if config.mtp_layer is None or not mtp else (config.mtp_layer,)
    for layer in (*config.layers, *last):
        prefix, block = layer_prefix(layer), f"blk.{layer}."
        for ours, theirs in _LAYER_NAMES.items():
            if prefix + ours in stored.tensors:
                yield _plain(prefix + ours, block + theirs, stored, reader)
        yield from _split_kv_b(config, prefix + _KV_B, block, stored, reader)
        if config.is_moe(layer):
            yield from (_experts(config, layer, projection, stored, reader) for projection in _PROJECTIONS)


def _plain(ours: str, theirs: str, stored: StoredTensors, reader: Reader) -> GgufTensor:
    """A tensor as it is; vectors and routers in float32."""
    tensor = stored.tensors[ours]
    widen = len(tensor.shape) == 1 or theirs.endswith(_FLOAT32_MATRICES)
    if not widen:
        return GgufTensor(theirs, tensor.dtype, tensor.shape, lambda: map(memoryview, reader.chunks(tensor)))
    return GgufTensor(theirs, "F32", tensor.shape, lambda: [as_bytes(reader.whole(tensor).to(torch.float32))])


def _split_kv_b(config: Glm5Config, name: str, block: str, stored: StoredTensors, reader: Reader) -> Iterator[GgufTensor]:
    tensor, heads, latent = stored.tensors[name], config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim

    def half(key: bool) -> Iterable[memoryview]:
        whole = reader.whole(tensor).view(heads, nope + value, latent)
        yield as_bytes(whole[:, :nope].transpose(1, 2) if key else whole[:, nope:])

    yield GgufTensor(f"{block}attn_k_b.weight", tensor.dtype, (heads, latent, nope), lambda: half(True))
    yield GgufTensor(f"{block}attn_v_b.weight", tensor.dtype, (heads, value, latent), lambda: half(False))


def _experts(config: Glm5Config, layer: int, projection: str, stored: StoredTensors, reader: Reader) -> GgufTensor:
    """One projection of all experts of a layer, stacked: Q4_0, or as it is where the layer is not quantised."""
    inner, dim, experts = config.moe_intermediate_size, config.hidden_size, config.n_routed_experts
    shape = (experts, dim, inner) if projection == "down" else (experts, inner, dim)
    names = [f"{layer_prefix(layer)}mlp.experts.{expert}.{projection}_proj.weight" for expert in range(experts)]
    theirs = f"blk.{layer}.ffn_{projection}_exps.weight"
    if config.has_int4_experts(layer):
        return GgufTensor(theirs, "Q4_0", shape, lambda: (as_bytes(_blocks(name, stored, reader)) for name in names))
    kinds = {stored.tensors[name].dtype for name in names}
    if len(kinds) > 1:
        raise CheckpointError(f"{theirs}: experts are stored in {', '.join(sorted(kinds))}; one tensor holds one dtype")
    return GgufTensor(
        theirs, kinds.pop(), shape, lambda: (memoryview(c) for name in names for c in reader.chunks(stored.tensors[name]))
    )


def _blocks(name: str, stored: StoredTensors, reader: Reader) -> Tensor:
    """One expert's weight in blocks of Q4_0."""
    packed, scales = reader.whole(stored.tensors[name + PACKED]), reader.whole(stored.tensors[name + SCALE])
    return to_q4_0(unpack_int4(packed), scales, name=name)


# -- metadata ------------------------------------------------------------------------------------------------------------


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
