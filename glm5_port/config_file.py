"""Reads a Hugging Face config.json into the fields of `Glm5Config`.

Four sorts of keys, and nothing else happens to a key:

  read        becomes a field (`_REQUIRED`, `_OPTIONAL` and the derived ones below);
  fixed       must hold the value that the class has hard-coded, or be absent (`_FIXED`);
  ignored     cannot change what the model computes at inference (`_HARMLESS`);
  unknown     null is ignored; a key known to change the mathematics of a related model (`_FOREIGN`) is an error; any other
              is ignored and named in `Glm5Config.notes`, which `glm5-port info` shows.

A field that several keys can give (legacy names, two places) must agree in all of them. A field that no key gives is an
error, unless the class defines what its absence means; each such case says so below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from glm5_port.config_quantization import is_integer, read_quantization
from glm5_port.errors import ConfigError, did_you_mean

MODEL_TYPE = "glm_moe_dsa"
ARCHITECTURE = "GlmMoeDsaForCausalLM"
DENSE, SPARSE = "dense", "sparse"
FULL, SHARED = "full", "shared"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_REQUIRED = (
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
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
)
# key -> what its absence means: no MTP layer is announced (transformers' class has none), no sharing over MTP iterations,
# no special token. An absent tie_word_embeddings is the class default.
_OPTIONAL: dict[str, Any] = {
    "num_nextn_predict_layers": 0,
    "index_share_for_mtp_iteration": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}
_DERIVED = _words(
    """
    model_type architectures n_routed_experts num_experts num_local_experts latent_norm_eps rope_parameters rope_theta
    rope_scaling rope_interleave indexer_rope_interleave mlp_layer_types first_k_dense_replace indexer_types
    index_topk_pattern index_topk_freq index_skip_topk_offset num_key_value_heads qk_head_dim layer_types eos_token_id
    dtype torch_dtype quantization_config compression_config
    """
)
# key -> the only value that the architecture has. transformers hard-codes each of them or has it as the class default.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "partial_rotary_factor": 1.0,
}
_PLAIN_ROTARY: dict[str, Any] = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
# Training only (dropout, losses, initialisation), how Hugging Face runs or labels a model, and layouts of a deployment.
# head_dim is here because it says 64 in GLM-5 and 192 in GLM-5.2, and every implementation ignores it.
_HARMLESS = _words(
    """
    head_dim attention_dropout initializer_range output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux
    ep_size pretraining_tp use_cache transformers_version _name_or_path name_or_path return_dict output_hidden_states
    output_attentions chunk_size_feed_forward is_encoder_decoder id2label label2id num_labels problem_type auto_map
    _attn_implementation attn_implementation _experts_implementation experts_implementation tokenizer_class
    task_specific_params torchscript use_mtp
    """
)
# Keys of relatives of this architecture that change what is computed.
_FOREIGN = _words(
    """
    sliding_window use_sliding_window attn_logit_softcapping final_logit_softcapping logit_scale embedding_multiplier
    residual_multiplier attention_multiplier swiglu_limit index_kpool linear_attn_config hc_mult hc_sinkhorn_iters
    num_nextn zero_expert_num use_qk_norm qk_layernorm moe_latent_size cli_factor rope_head_dim mrope_section
    text_config vision_config
    """
)

_OTHER_MODELS = {
    "glm5_next": "GLM-5.3-Flash: linear attention (KDA) in three of four layers, hyper-connections, pooled index keys and no "
    "rotary embedding. It shares the name GLM-5 and none of these layers",
    "deepseek_v32": "DeepSeek-V3.2: similar blocks, but its indexer rotates half-split pairs and its rotary embedding is "
    "scaled (YaRN)",
    "deepseek_v3": "DeepSeek-V3 / R1: multi-head latent attention without a lightning indexer",
    "deepseek_v4": "DeepSeek-V4: another attention",
    "glm4": "GLM-4: a dense model with grouped-query attention",
    "glm4_moe": "GLM-4.5 to 4.7: a mixture of experts with grouped-query attention, without latent attention",
    "glm4_moe_lite": "GLM-4.7-Flash: latent attention without a lightning indexer",
}


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """The mapping in a config.json, or in the config.json of a directory.

    Raises:
        ConfigError: when there is no such file, it is not JSON, it is no object, or an object names a key twice.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    expected = "expected: a config.json, or a directory that holds one"
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}\n  {expected}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{file}: {error}") from error
        raise ConfigError(f"{file} is not valid JSON: {error}\n  {expected}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}; a config.json is an object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return content


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Glm5Config` for a parsed config.json.

    Raises:
        ConfigError: for another architecture, and for a key that is missing, contradictory or unsupported.
    """
    _check_architecture(raw)
    given = {key: value for key, value in raw.items() if value is not None}
    notes: list[str] = []
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise ConfigError(f"config.json does not name {', '.join(missing)}: a missing size is never guessed")
    _check_fixed(given)
    layers = given["num_hidden_layers"]
    if not is_integer(layers) or layers < 1:
        raise ConfigError(f"num_hidden_layers = {layers!r}: it must be a positive integer")
    fields = {name: given[name] for name in _REQUIRED}
    fields |= {name: given.get(name, absent) for name, absent in _OPTIONAL.items()}
    fields |= {
        "model_type": raw["model_type"],
        "n_routed_experts": _routed_experts(given),
        "latent_norm_eps": given.get("latent_norm_eps", given["rms_norm_eps"]),
        "rope_theta": _rope_theta(given),
        "rope_interleave": _interleaved(given, "rope_interleave", notes),
        "indexer_rope_interleave": _interleaved(given, "indexer_rope_interleave", notes),
        "mlp_layer_types": _mlp_layer_types(given, layers),
        "indexer_types": _indexer_types(given, layers, notes),
        "eos_token_id": _tokens(given.get("eos_token_id", ())),
        "dtype": _agreed(given, ("dtype", "torch_dtype")),
        **read_quantization(given),
    }
    _check_unknown(given, notes)
    return fields | {"notes": tuple(notes)}


def _check_architecture(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type is None:
        raise ConfigError(f"config.json does not name model_type; expected {MODEL_TYPE!r} ({ARCHITECTURE}: GLM-5, 5.1, 5.2, 5.3)")
    if model_type != MODEL_TYPE:
        known = _OTHER_MODELS.get(str(model_type))
        what = known or "an architecture that this library does not implement"
        near = "" if known else did_you_mean(str(model_type), [MODEL_TYPE])
        raise ConfigError(
            f"model_type = {model_type!r} is {what}{near}\n"
            f"  supported: {MODEL_TYPE!r} ({ARCHITECTURE}), which is GLM-5, 5.1, 5.2 and 5.3"
        )
    architectures = raw.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise ConfigError(f"architectures = {architectures!r}: supported is [{ARCHITECTURE!r}]")


def _check_fixed(given: Mapping[str, Any]) -> None:
    for name, only in _FIXED.items():
        if given.get(name, only) != only:
            raise ConfigError(f"{name} = {given[name]!r} is not supported: {ARCHITECTURE} has {name} = {only!r}")
    heads = given["num_attention_heads"]
    if given.get("num_key_value_heads", heads) != heads:
        raise ConfigError(
            f"num_key_value_heads = {given['num_key_value_heads']!r} differs from num_attention_heads = {heads!r}: latent "
            "attention has one key and value head for each query head"
        )
    nope, rope = given["qk_nope_head_dim"], given["qk_rope_head_dim"]
    if "qk_head_dim" in given and is_integer(nope) and is_integer(rope) and given["qk_head_dim"] != nope + rope:
        raise ConfigError(f"qk_head_dim = {given['qk_head_dim']!r}, but qk_nope_head_dim + qk_rope_head_dim = {nope} + {rope}")
    if "layer_types" in given:
        types, layers = _names(given, "layer_types"), given["num_hidden_layers"]
        foreign = sorted(set(types) - {"indexed_attention", "deepseek_sparse_attention"})  # the second is the older name
        if foreign:
            raise ConfigError(f"layer_types holds {foreign}: every layer of {ARCHITECTURE} is 'indexed_attention'")
        if len(types) != layers:
            raise ConfigError(f"layer_types lists {len(types)} layers, but num_hidden_layers = {layers!r}")


def _agreed(given: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of whichever of `names` is given; None if none is. Two that differ are an error."""
    found = {name: given[name] for name in names if name in given}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ConfigError(f"{' and '.join(f'{name} = {value!r}' for name, value in found.items())} contradict each other")
    return values[0] if values else None


def _routed_experts(given: Mapping[str, Any]) -> Any:
    """`n_routed_experts` or a legacy name of it. transformers 5.23 lets the legacy `num_experts` win over
    `n_routed_experts`, engines read only the latter: two that differ are therefore an error here."""
    experts = _agreed(given, ("n_routed_experts", "num_experts", "num_local_experts"))
    if experts is None:
        raise ConfigError("config.json does not name n_routed_experts (nor its legacy name num_experts)")
    return experts


def _rope_theta(given: Mapping[str, Any]) -> Any:
    """`rope_parameters.rope_theta` (transformers 5) or the legacy top-level `rope_theta`. Only plain rotary embedding
    exists in this class, so any scaling is an error."""
    found = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else {}
    for name in ("rope_parameters", "rope_scaling"):
        parameters = given.get(name, {})
        if not isinstance(parameters, Mapping):
            example = {"rope_theta": 8000000, "rope_type": "default"}
            raise ConfigError(f"{name} = {parameters!r}: it must be an object such as {example}")
        for key, value in parameters.items():
            if key == "rope_theta" and value is not None:
                found[f"{name}.rope_theta"] = value
            elif value is not None and value != _PLAIN_ROTARY.get(key):
                raise ConfigError(
                    f"{name}.{key} = {value!r} is not supported: {ARCHITECTURE} has plain rotary embedding, whose only "
                    "parameters are rope_theta and rope_type = 'default'"
                )
    theta = _agreed(found, found)
    if theta is None:
        raise ConfigError(
            "config.json names no rope_theta, neither in rope_parameters nor at the top level: it is 1e6 in GLM-5, 8e6 in "
            "GLM-5.2, and 1e4 in transformers' class, which fits no release; it is never guessed"
        )
    return theta


def _interleaved(given: Mapping[str, Any], name: str, notes: list[str]) -> Any:
    """The layout of rotary pairs. Absent means interleaved because model_type says glm_moe_dsa: transformers' class of that
    name hard-codes interleaved pairs in both places and does not write the fields, and every released config says true."""
    if name not in given:
        engines = "; vLLM and SGLang read its absence as half-split" if name == "indexer_rope_interleave" else ""
        notes.append(f"{name} is absent: interleaved, as the class {ARCHITECTURE} is defined{engines}")
    return given.get(name, True)


def _mlp_layer_types(given: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """`mlp_layer_types`, else the first `first_k_dense_replace` layers dense and the rest sparse. Where both are given, the
    number of leading dense layers must be the same: transformers reads the list, vLLM and SGLang read the number."""
    dense = given.get("first_k_dense_replace")
    if dense is not None and (not is_integer(dense) or dense < 0):
        raise ConfigError(f"first_k_dense_replace = {dense!r}: it must be an integer from 0")
    if "mlp_layer_types" not in given:
        if dense is None:
            raise ConfigError(
                "config.json names neither mlp_layer_types nor first_k_dense_replace: which layers are dense is never guessed"
            )
        derived: tuple[str, ...] = (DENSE,) * min(dense, layers) + (SPARSE,) * max(layers - dense, 0)
        return derived
    types = _names(given, "mlp_layer_types")
    leading = next((layer for layer, kind in enumerate(types) if kind != DENSE), len(types))
    if dense is not None and min(dense, layers) != leading:
        raise ConfigError(
            f"first_k_dense_replace = {dense} contradicts mlp_layer_types, which begins with {leading} dense layers: "
            "engines read one or the other, so make them agree"
        )
    return types


def _indexer_types(given: Mapping[str, Any], layers: int, notes: list[str]) -> tuple[str, ...]:
    """`indexer_types`, else `index_topk_pattern`, else the schedule: layer i is full iff max(i - offset + 1, 0) is a
    multiple of `index_topk_freq` (absent: 1, every layer), with offset = `index_skip_topk_offset` (absent: 2)."""
    candidates: dict[str, tuple[str, ...]] = {}
    if "indexer_types" in given:
        candidates["indexer_types"] = _names(given, "indexer_types")
    if "index_topk_pattern" in given:
        candidates["index_topk_pattern"] = _pattern(given["index_topk_pattern"], layers)
    if not candidates or "index_topk_freq" in given:
        freq, offset = given.get("index_topk_freq", 1), given.get("index_skip_topk_offset", 2)
        if not is_integer(freq) or freq < 1:
            raise ConfigError(f"index_topk_freq = {freq!r}: it must be a positive integer")
        if not is_integer(offset) or offset < 0:
            raise ConfigError(f"index_skip_topk_offset = {offset!r}: it must be an integer from 0")
        schedule = (FULL if max(layer - offset + 1, 0) % freq == 0 else SHARED for layer in range(layers))
        candidates[f"index_topk_freq = {freq} with index_skip_topk_offset = {offset}"] = tuple(schedule)
    source, types = next(iter(candidates.items()))
    for other, differing in candidates.items():
        if differing != types:
            notes.append(f"{source} decides which layers own an indexer; {other} says otherwise, and vLLM 0.33 would follow it")
    return types


def _pattern(pattern: Any, layers: int) -> tuple[str, ...]:
    letters = {"F": FULL, "S": SHARED}
    if isinstance(pattern, list | tuple) and all(item in letters.values() for item in pattern):
        types: tuple[str, ...] = tuple(pattern)
    elif isinstance(pattern, str) and set(pattern) <= set(letters):
        types = tuple(letters[letter] for letter in pattern)
    else:
        raise ConfigError(
            f"index_topk_pattern = {pattern!r}: it must be a string of F (full) and S (shared), or a list of 'full' and 'shared'"
        )
    if len(types) != layers:
        raise ConfigError(f"index_topk_pattern covers {len(types)} layers, but num_hidden_layers = {layers}")
    return types


def _names(given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = given[name]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} = {value!r}: it must be a list of names, one for each layer")
    return tuple(value)


def _tokens(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_unknown(given: Mapping[str, Any], notes: list[str]) -> None:
    known = {*_REQUIRED, *_OPTIONAL, *_DERIVED, *_FIXED, *_HARMLESS}
    unknown = sorted(set(given) - known)
    foreign = [name for name in unknown if name in _FOREIGN and given[name] is not False]
    if foreign:
        raise ConfigError(
            f"{', '.join(f'{name} = {given[name]!r}' for name in foreign)}: no such key in {ARCHITECTURE}; it changes what a "
            "model computes, so this is another architecture"
        )
    ignored = (name for name in unknown if name not in _FOREIGN)
    notes.extend(f"{name} is not known here and is ignored{did_you_mean(name, sorted(known))}" for name in ignored)
