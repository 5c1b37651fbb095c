"""The tensors that a GLM-5 checkpoint holds: name, shape and what may be stored under it.

Shapes are `[out, in]`. The names are those of the published checkpoints, with one tensor for each expert; transformers
stacks the experts after loading and takes them apart again when it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import PER_CHANNEL, PackedInt4
from glm5_port.errors import ConfigError
from glm5_port.quant.packing import CODES_PER_WORD

PROJECTION = "projection"
FLOAT = "float"
FLOAT32 = "float32"
INT4_CODES = "int4 codes"
INT4_SCALES = "int4 scales"
INT4_SHAPE = "int4 shape"
INT8_CODES = "int8 codes"
INT8_SCALES = "int8 scales"

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
        shape: its shape.
        kind: what may be stored: "projection" (bf16, fp16, fp32, or block-FP8 with multipliers), "float" (bf16, fp16, fp32;
            never quantised by the block-FP8 scheme), "float32" (exactly that), or a part of an INT4 weight in the canonical
            packing: "int4 codes" (int32, eight codes a word), "int4 scales" (bf16), "int4 shape" (two integers), or of an INT8
            weight: "int8 codes" (int8), "int8 scales" (bf16, fp32).
        component: the part of the model it belongs to, for counts ("attention", "routed experts", ...).
    """

    shape: tuple[int, ...]
    kind: str
    component: str


def expected_tensors(config: Glm5Config, mtp: bool) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint, by name, in the order of the layers.

    Args:
        config: the model.
        mtp: whether to include the MTP layer. It lies one index above the trunk, is a full mixture-of-experts layer with an
            indexer of its own, and has neither embedding nor head: it uses those of the trunk.

    Returns:
        name -> TensorSpec.

    Raises:
        ConfigError: with `mtp`, when the configuration announces no MTP layer.
    """
    if mtp and config.mtp_layer is None:
        raise ConfigError("the MTP layer was asked for, but this model has none: num_nextn_predict_layers = 0")
    dim, vocabulary = config.hidden_size, config.vocab_size
    expected = {EMBEDDING: TensorSpec((vocabulary, dim), FLOAT, "embedding")}
    for layer in config.layers:
        expected.update(_decoder_layer(config, layer))
    expected[FINAL_NORM] = TensorSpec((dim,), FLOAT, "norms")
    expected[LM_HEAD] = TensorSpec((vocabulary, dim), FLOAT, "LM head")
    if mtp and config.mtp_layer is not None:
        expected.update(mtp_tensors(config, config.mtp_layer))
    return expected


def mtp_tensors(config: Glm5Config, layer: int) -> dict[str, TensorSpec]:
    """The tensors of the MTP layer: a decoder layer, two norms, the projection that joins them, and the norm of its head."""
    dim, prefix = config.hidden_size, layer_prefix(layer)
    expected = dict(_decoder_layer(config, layer))
    for name in ("enorm", "hnorm", "shared_head.norm"):
        expected[f"{prefix}{name}.weight"] = TensorSpec((dim,), FLOAT, "MTP joint")
    expected[f"{prefix}eh_proj.weight"] = TensorSpec((dim, 2 * dim), FLOAT, "MTP joint")
    return expected


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def _decoder_layer(config: Glm5Config, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    prefix, dim = layer_prefix(layer), config.hidden_size
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", TensorSpec((dim,), FLOAT, "norms")
    yield from _attention(config, prefix + "self_attn.")
    if config.owns_indexer(layer):
        yield from _indexer(config, prefix + "self_attn.indexer.")
    if config.is_moe(layer):
        yield from _experts(config, layer)
    else:
        yield from _as_stored(config, _mlp(prefix + "mlp.", dim, config.intermediate_size, "dense MLP"))


def _attention(config: Glm5Config, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    dim, heads = config.hidden_size, config.num_attention_heads
    query_latent, latent = config.q_lora_rank, config.kv_lora_rank
    projections = {
        "q_a_proj": (query_latent, dim),
        "q_b_proj": (heads * config.qk_head_dim, query_latent),
        "kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, dim),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (dim, heads * config.v_head_dim),
    }
    yield from _as_stored(config, _matrices(prefix, projections, "attention"))
    yield f"{prefix}q_a_layernorm.weight", TensorSpec((query_latent,), FLOAT, "attention")
    yield f"{prefix}kv_a_layernorm.weight", TensorSpec((latent,), FLOAT, "attention")


def _indexer(config: Glm5Config, prefix: str) -> Iterator[tuple[str, TensorSpec]]:
    heads, width = config.index_n_heads, config.index_head_dim
    projections = {"wq_b": (heads * width, config.q_lora_rank), "wk": (width, config.hidden_size)}
    yield from _as_stored(config, _matrices(prefix, projections, "indexers"))
    yield f"{prefix}k_norm.weight", TensorSpec((width,), FLOAT, "indexers")
    yield f"{prefix}k_norm.bias", TensorSpec((width,), FLOAT, "indexers")
    # Never quantised: rounding the head weights flips near-ties of the selection.
    yield f"{prefix}weights_proj.weight", TensorSpec((heads, config.hidden_size), FLOAT, "indexers")


def _experts(config: Glm5Config, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    prefix, dim, experts = layer_prefix(layer) + "mlp.", config.hidden_size, config.n_routed_experts
    yield f"{prefix}gate.weight", TensorSpec((experts, dim), FLOAT, "routers")
    # float32 always: bf16 has too few digits for a bias that decides between nearly equal experts.
    yield f"{prefix}gate.e_score_correction_bias", TensorSpec((experts,), FLOAT32, "correction biases")
    int4 = config.int4 if config.has_int4_experts(layer) else None
    for expert in range(experts):  # all alike, so that their names are not looked for in `ignore` one by one
        for name, spec in _mlp(f"{prefix}experts.{expert}.", dim, config.moe_intermediate_size, "routed experts"):
            yield from _stored(name, spec, int4)
    yield from _as_stored(config, _mlp(f"{prefix}shared_experts.", dim, config.shared_intermediate_size, "shared experts"))


def _mlp(prefix: str, dim: int, inner: int, component: str) -> Iterator[tuple[str, TensorSpec]]:
    yield from _matrices(prefix, {"gate_proj": (inner, dim), "up_proj": (inner, dim), "down_proj": (dim, inner)}, component)


def _matrices(prefix: str, shapes: Mapping[str, tuple[int, int]], component: str) -> Iterator[tuple[str, TensorSpec]]:
    for name, shape in shapes.items():
        yield f"{prefix}{name}.weight", TensorSpec(shape, PROJECTION, component)


def _as_stored(config: Glm5Config, matrices: Iterable[tuple[str, TensorSpec]]) -> Iterator[tuple[str, TensorSpec]]:
    """Each matrix, or the tensors that stand for it where the checkpoint holds it in INT4 or INT8."""
    for name, spec in matrices:
        module = name.removesuffix(".weight")
        if config.is_int8(module):
            yield name, TensorSpec(spec.shape, INT8_CODES, spec.component)
            yield f"{name}_scale", TensorSpec((spec.shape[0], 1), INT8_SCALES, spec.component)
        else:
            yield from _stored(name, spec, config.int4 if config.is_int4(module) else None)


def _stored(name: str, spec: TensorSpec, int4: PackedInt4 | None) -> Iterator[tuple[str, TensorSpec]]:
    """A matrix as it is, or the three tensors of an INT4 one."""
    if int4 is None:
        yield name, spec
        return
    rows, columns = spec.shape
    groups = 1 if int4.group_size == PER_CHANNEL else columns // int4.group_size
    yield f"{name}_packed", TensorSpec((rows, columns // CODES_PER_WORD), INT4_CODES, spec.component)
    yield f"{name}_scale", TensorSpec((rows, groups), INT4_SCALES, spec.component)
    yield f"{name}_shape", TensorSpec((2,), INT4_SHAPE, spec.component)
