"""Glm5Config: what a GLM-5 model is, read from a Hugging Face config.json.

The dataclass holds the fields that the model, the checkpoint reader and the planners use, under their standard names, and
checks that they fit each other. How a config.json is turned into these fields (precedence, legacy keys, refusals) stands
in config_file.py, how its weights may be quantised in config_quantization.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from glm5_port.config_file import ARCHITECTURE, DENSE, FULL, MODEL_TYPE, SHARED, SPARSE, read_fields, read_json
from glm5_port.config_quantization import BlockFp8, DynamicInt8, PackedInt4, int_quantized, is_integer, pack_quantized
from glm5_port.errors import ConfigError, InputError, did_you_mean

INDEX_NORM_EPS = 1e-6  # the indexer's LayerNorm: 1e-6 in every implementation, never written to config.json
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm5Config:
    """One `GlmMoeDsaForCausalLM`: GLM-5, 5.1, 5.2, 5.3, or a smaller model of the same class.

    Attributes:
        q_lora_rank, kv_lora_rank: widths of the query latent and of the cached key-value latent.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths per head. `head_dim` of a config.json is not read: it says 64
            in GLM-5 and 192 in GLM-5.2, and no implementation uses it.
        index_n_heads, index_head_dim, index_topk: the lightning indexer. Its first `qk_rope_head_dim` dims are rotated.
        n_group, topk_group: groups of routed experts, and how many of them a token may use.
        rms_norm_eps: of the block norms, the final norm and the norms of the MTP layer.
        latent_norm_eps: of the norms of the two latents. A config.json does not name it; then it equals `rms_norm_eps`, as in
            the serving engines. Hugging Face computes with 1e-6: `dataclasses.replace(config, latent_norm_eps=1e-6)`.
        rope_interleave, indexer_rope_interleave: True rotates the pairs (2i, 2i+1), False the pairs (i, i + dims/2).
        mlp_layer_types: "dense" or "sparse" (mixture of experts) for each layer of the trunk.
        indexer_types: "full" (runs an indexer) or "shared" (attends to the indices of the last full layer below) for each
            layer of the trunk.
        num_nextn_predict_layers: 1 if the checkpoint announces an MTP layer, else 0.
        index_share_for_mtp_iteration: the MTP layer computes indices once and reuses them while it drafts further tokens.
        eos_token_id: every id that ends a text; may be empty.
        dtype: the dtype that config.json names, or None.
        quantization: how a block-FP8 checkpoint is quantised, or None.
        int4: how a checkpoint with INT4 weights is quantised, or None.
        int8: how one with INT8 weights is, or None.
        notes: what reading the file had to decide or left unread, one sentence each; `glm5-port info` shows them.

    Raises:
        ConfigError: when a field is outside its range or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    latent_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    indexer_rope_interleave: bool
    max_position_embeddings: int
    mlp_layer_types: tuple[str, ...]
    indexer_types: tuple[str, ...]
    num_nextn_predict_layers: int = 0
    index_share_for_mtp_iteration: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None
    model_type: str = MODEL_TYPE
    quantization: BlockFp8 | None = None
    int4: PackedInt4 | None = None
    int8: DynamicInt8 | None = None
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_layers(self)
        _check_experts(self)
        _check_tokens(self)
        _check_int4(self)
        _check_int8(self)

    # --- reading and writing -----------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Glm5Config:
        """The configuration that a parsed config.json describes.

        Raises:
            ConfigError: for another architecture, and for a field that is missing, contradictory or unsupported.
        """
        return cls(**read_fields(mapping))

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Glm5Config:
        """Reads a config.json, or the config.json of a directory.

        Raises:
            ConfigError: as `from_dict`, and when the file is missing or is not JSON.
        """
        return cls.from_dict(read_json(path))

    def as_dict(self) -> dict[str, Any]:
        """A mapping in the vocabulary of config.json, from which `from_dict` gives an equal configuration."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "notes"}
        values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
        for name in ("mlp_layer_types", "indexer_types", "eos_token_id"):
            values[name] = list(values[name])
        quantization = values.pop("quantization")
        if quantization is not None:
            values["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(quantization.block),
                "modules_to_not_convert": list(quantization.not_converted),
            }
        if (int4 := values.pop("int4")) is not None:
            values["quantization_config"] = pack_quantized(int4)
        if (int8 := values.pop("int8")) is not None:
            values["quantization_config"] = int_quantized(int8)
        return {"architectures": [ARCHITECTURE], **values}

    # --- what follows from the fields --------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the unrotated part, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^(-1/2), for the expanded and the absorbed form alike."""
        return 1 / math.sqrt(self.qk_head_dim)

    @property
    def index_norm_eps(self) -> float:
        """eps of the LayerNorm on index keys: 1e-6 in every implementation."""
        return INDEX_NORM_EPS

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared expert: the shared experts are stored as one MLP."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def mtp_layer(self) -> int | None:
        """Index of the MTP layer in the checkpoint (the one after the trunk), or None."""
        return self.num_hidden_layers if self.num_nextn_predict_layers else None

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers of the trunk."""
        return tuple(range(self.num_hidden_layers))

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers of the trunk that own an indexer."""
        return tuple(layer for layer in self.layers if self.owns_indexer(layer))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers of the trunk that are mixtures of experts."""
        return tuple(layer for layer in self.layers if self.is_moe(layer))

    def owns_indexer(self, layer: int) -> bool:
        """Whether a layer runs its own indexer. The MTP layer always does."""
        return self._kind(layer, self.indexer_types, FULL) == FULL

    def is_moe(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts. The MTP layer always is."""
        return self._kind(layer, self.mlp_layer_types, SPARSE) == SPARSE

    def is_int4(self, module: str) -> bool:
        """Whether a projection ("model.layers.3.self_attn.o_proj") is stored in INT4."""
        return self.int4 is not None and self.int4.names(module)

    def is_int8(self, module: str) -> bool:
        """Whether a projection is stored in INT8."""
        return self.int8 is not None and self.int8.names(module)

    def has_int4_experts(self, layer: int) -> bool:
        """Whether the routed experts of a layer are stored in INT4."""
        return self.is_moe(layer) and self.is_int4(f"model.layers.{layer}.mlp.experts.0.gate_proj")

    def index_source(self, layer: int) -> int:
        """The layer whose indices `layer` attends to: itself when it owns an indexer, else the last owner below it."""
        while not self.owns_indexer(layer):
            layer -= 1
        return layer

    def _kind(self, layer: int, kinds: tuple[str, ...], of_mtp: str) -> str:
        if 0 <= layer < self.num_hidden_layers:
            return kinds[layer]
        if layer == self.mtp_layer:
            return of_mtp
        last = self.num_hidden_layers + self.num_nextn_predict_layers - 1
        raise InputError(f"layer {layer} does not exist: the layers are 0 to {last}")

    @property
    def family_member(self) -> str:
        """The release that this configuration describes, as far as a configuration tells: 5 and 5.1 are equal in
        everything but their weights, and so are 5.2 and 5.3."""
        if any(getattr(self, name) != value for name, value in _RELEASED.items()):
            return "GLM-5 class"
        dense_first = (DENSE,) * 3 + (SPARSE,) * 75
        for name, theta, context, owners in _RELEASES:
            same = (self.rope_theta, self.max_position_embeddings, self.full_layers) == (theta, context, owners)
            if same and self.mlp_layer_types == dense_first:
                return name
        return "GLM-5 class"


_RELEASED: dict[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "indexer_rope_interleave": True,
}
_RELEASES: tuple[tuple[str, float, int, tuple[int, ...]], ...] = (
    ("GLM-5 / GLM-5.1", 1e6, 202752, tuple(range(78))),
    ("GLM-5.2 / GLM-5.3", 8e6, 1048576, (0, 1, *range(2, 78, 4))),
)


def released(name: str) -> Glm5Config:
    """The configuration of a release: "GLM-5", "GLM-5.1", "GLM-5.2" or "GLM-5.3". For tools that need the true widths.

    Raises:
        InputError: no such release.
    """
    for members, theta, context, owners in _RELEASES:
        if name in members.split(" / "):
            return Glm5Config(
                **_RELEASED,
                latent_norm_eps=_RELEASED["rms_norm_eps"],
                rope_theta=theta,
                max_position_embeddings=context,
                mlp_layer_types=(DENSE,) * 3 + (SPARSE,) * 75,
                indexer_types=tuple(FULL if layer in owners else SHARED for layer in range(78)),
                num_nextn_predict_layers=1,
                index_share_for_mtp_iteration=len(owners) < 78,
                eos_token_id=(154820, 154827, 154829),
                pad_token_id=154820,
                dtype="bfloat16",
            )
    known = [member for members, *_ in _RELEASES for member in members.split(" / ")]
    raise InputError(f"{name!r} is no release of GLM-5{did_you_mean(name, known)}\n  known: {', '.join(known)}")


_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "max_position_embeddings",
)
_POSITIVE_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "latent_norm_eps", "rope_theta")
_BOOLEANS = (
    "norm_topk_prob",
    "rope_interleave",
    "indexer_rope_interleave",
    "index_share_for_mtp_iteration",
    "tie_word_embeddings",
)


def _check_ranges(config: Glm5Config) -> None:
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        if not is_integer(value) or value < 1:
            raise ConfigError(f"{name} = {value!r}: it must be a positive integer")
    for name in _POSITIVE_NUMBERS:
        value = getattr(config, name)
        if not (is_integer(value) or isinstance(value, float)) or not (0 < value < math.inf):
            raise ConfigError(f"{name} = {value!r}: it must be a positive, finite number")
    for name in _BOOLEANS:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} = {getattr(config, name)!r}: it must be true or false")
    if config.model_type != MODEL_TYPE:
        raise ConfigError(f"model_type = {config.model_type!r}: this library implements {MODEL_TYPE!r} ({ARCHITECTURE})")
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"qk_rope_head_dim = {config.qk_rope_head_dim}: it must be even, because rotary embedding turns pairs")
    if config.index_head_dim < config.qk_rope_head_dim:
        raise ConfigError(
            f"index_head_dim = {config.index_head_dim} is below qk_rope_head_dim = {config.qk_rope_head_dim}: the indexer "
            "rotates its first qk_rope_head_dim dims"
        )
    if config.tie_word_embeddings:
        raise ConfigError(
            "tie_word_embeddings = true is not supported: every GLM-5 release has an LM head of its own. Save the model with "
            "tie_word_embeddings = false and an explicit lm_head.weight"
        )
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ConfigError(f"dtype = {config.dtype!r}: supported are {', '.join(DTYPES)}")


def _check_layers(config: Glm5Config) -> None:
    for name, kinds in (("mlp_layer_types", (DENSE, SPARSE)), ("indexer_types", (FULL, SHARED))):
        types = getattr(config, name)
        if len(types) != config.num_hidden_layers:
            raise ConfigError(f"{name} lists {len(types)} layers, but num_hidden_layers = {config.num_hidden_layers}")
        for layer, kind in enumerate(types):
            if kind not in kinds:
                raise ConfigError(f"{name}[{layer}] = {kind!r}: supported are {kinds[0]!r} and {kinds[1]!r}")
    if config.indexer_types[0] != FULL:
        raise ConfigError(
            "indexer_types[0] = 'shared': the first layer has no layer below whose indices it could share; it must be 'full'"
        )
    if config.num_nextn_predict_layers not in (0, 1) or not is_integer(config.num_nextn_predict_layers):
        raise ConfigError(
            f"num_nextn_predict_layers = {config.num_nextn_predict_layers!r}: supported are 0 (no MTP layer) and 1, as in every "
            "GLM-5 release"
        )


def _check_experts(config: Glm5Config) -> None:
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    if experts % groups:
        raise ConfigError(f"n_group = {groups} does not divide n_routed_experts = {experts}")
    if experts // groups < 2:
        raise ConfigError(
            f"n_group = {groups} leaves {experts // groups} expert in each group of n_routed_experts = {experts}: a group is "
            "scored by its two best experts, so it needs two"
        )
    if kept > groups:
        raise ConfigError(f"topk_group = {kept} exceeds n_group = {groups}")
    available = kept * (experts // groups)
    if config.num_experts_per_tok > available:
        raise ConfigError(
            f"num_experts_per_tok = {config.num_experts_per_tok} exceeds the {available} experts that a token can reach "
            f"(topk_group = {kept} of n_group = {groups}, n_routed_experts = {experts})"
        )


def _check_tokens(config: Glm5Config) -> None:
    named = [("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)]
    named += [("eos_token_id", token) for token in config.eos_token_id]
    for name, token in named:
        if token is not None and not (is_integer(token) and 0 <= token < config.vocab_size):
            raise ConfigError(f"{name} = {token!r}: a token id is an integer from 0 to vocab_size - 1 = {config.vocab_size - 1}")


def _check_int4(config: Glm5Config) -> None:
    """What is never INT4 must be named by `ignore`, and the matrices of an expert must be stored alike."""
    if config.int4 is None:
        return
    layers = [*config.layers, *([] if config.mtp_layer is None else [config.mtp_layer])]
    floats = ["lm_head", *(f"model.layers.{i}.self_attn.indexer.weights_proj" for i in layers if config.owns_indexer(i))]
    if (module := next((module for module in floats if config.is_int4(module)), None)) is not None:
        raise ConfigError(
            f"quantization_config.ignore does not name {module}, so it would be INT4: this library reads INT4 in projections of "
            "attention, indexers' queries and keys, MLPs and experts only"
        )
    for layer in layers:
        modules = [f"model.layers.{layer}.mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")]
        if config.is_moe(layer) and len({config.is_int4(module) for module in modules}) > 1:
            raise ConfigError(
                f"quantization_config.ignore names some of {', '.join(modules)} and not the others: the matrices of an expert "
                "are read all in INT4, or none of them"
            )


def _check_int8(config: Glm5Config) -> None:
    """What is never INT8 must be named by `ignore`."""
    if config.int8 is None:
        return
    layers = [*config.layers, *([] if config.mtp_layer is None else [config.mtp_layer])]
    floats = ["lm_head"]
    floats += [f"model.layers.{layer}.self_attn.indexer.weights_proj" for layer in layers if config.owns_indexer(layer)]
    floats += [f"model.layers.{layer}.mlp.experts.0.gate_proj" for layer in layers if config.is_moe(layer)]
    if (module := next((module for module in floats if config.is_int8(module)), None)) is not None:
        raise ConfigError(
            f"quantization_config.ignore does not name {module}, so it would be INT8: this library reads INT8 in projections of "
            "attention, indexers' queries and keys, dense MLPs and shared experts only"
        )
