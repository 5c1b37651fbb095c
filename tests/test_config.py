"""Glm5Config: the released files as they are, what transformers writes, and an error for everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8
from glm5_port.errors import ConfigError, InputError

# --- the released files, written out field by field (spec/glm5.md 1.1 names the sources) ---------------------------------------

GLM_5: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_head_dim": 256,
    "head_dim": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 202752,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
    "ep_size": 1,
    "pretraining_tp": 1,
    "use_cache": True,
    "transformers_version": "5.0.2.dev0",
}
GLM_5_1 = {**GLM_5}
F, S = "full", "shared"
FULL_5_2 = (0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74)
GLM_5_2 = {
    **GLM_5,
    "head_dim": 192,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_router_dtype": "float32",
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_types": ["full" if layer in FULL_5_2 else "shared" for layer in range(78)],
    "index_share_for_mtp_iteration": True,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "transformers_version": "5.12.0",
}
GLM_5_3 = {**GLM_5_2, "transformers_version": "5.15.0"}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
}

SMALL: dict[str, Any] = {**GLM_5, "num_hidden_layers": 8, "first_k_dense_replace": 1}


def small(**changes: Any) -> Glm5Config:
    """An eight-layer configuration with fields replaced."""
    return Glm5Config.from_dict({**SMALL, **changes})


def without(*names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**SMALL, **changes}.items() if name not in names}


@pytest.mark.parametrize(
    ("released", "name", "theta", "context", "owners"),
    [
        (GLM_5, "GLM-5 / GLM-5.1", 1e6, 202752, tuple(range(78))),
        (GLM_5_1, "GLM-5 / GLM-5.1", 1e6, 202752, tuple(range(78))),
        (GLM_5_2, "GLM-5.2 / GLM-5.3", 8e6, 1048576, FULL_5_2),
        (GLM_5_3, "GLM-5.2 / GLM-5.3", 8e6, 1048576, FULL_5_2),
    ],
)
def test_the_released_files(released: dict[str, Any], name: str, theta: float, context: int, owners: tuple[int, ...]) -> None:
    config = Glm5Config.from_dict(released)
    assert config.family_member == name
    assert (config.rope_theta, config.max_position_embeddings, config.full_layers) == (theta, context, owners)
    assert config.moe_layers == tuple(range(3, 78))
    assert (config.qk_head_dim, config.softmax_scale) == (256, 0.0625)
    assert config.rope_interleave
    assert config.indexer_rope_interleave
    assert config.mtp_layer == 78
    assert config.owns_indexer(78)
    assert config.is_moe(78)
    assert config.latent_norm_eps == config.rms_norm_eps == 1e-5
    assert config.index_norm_eps == 1e-6
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, (154820, 154827, 154829), 154820)
    assert config.quantization is None
    assert config.notes == ()


def test_index_sharing_of_5_2() -> None:
    config = Glm5Config.from_dict(GLM_5_2)
    assert config.index_share_for_mtp_iteration
    assert [config.index_source(layer) for layer in (0, 1, 2, 3, 5, 6, 7, 77, 78)] == [0, 1, 2, 2, 2, 6, 6, 74, 78]


def test_the_fp8_release() -> None:
    config = Glm5Config.from_dict({**GLM_5_2, "quantization_config": FP8})
    assert config.quantization == BlockFp8((128, 128), ("lm_head", "model.layers.0.self_attn.indexer.weights_proj"))
    assert config.family_member == "GLM-5.2 / GLM-5.3"


def test_a_smaller_model_has_no_release_name() -> None:
    assert small().family_member == "GLM-5 class"
    assert Glm5Config.from_dict({**GLM_5_2, "n_routed_experts": 128}).family_member == "GLM-5 class"
    assert Glm5Config.from_dict({**GLM_5, "rope_parameters": {"rope_theta": 8e6}}).family_member == "GLM-5 class"


@pytest.mark.parametrize("mapping", [GLM_5, GLM_5_2, {**GLM_5_2, "quantization_config": FP8}, {**SMALL, "latent_norm_eps": 1e-6}])
def test_as_dict_reads_back_equal(mapping: dict[str, Any]) -> None:
    config = Glm5Config.from_dict(mapping)
    again = Glm5Config.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert again.notes == ()


def test_latent_norm_eps_is_a_field_of_its_own() -> None:
    assert small(rms_norm_eps=1e-4).latent_norm_eps == 1e-4
    assert small(latent_norm_eps=1e-6).latent_norm_eps == 1e-6
    assert dataclasses.replace(small(), latent_norm_eps=1e-6).latent_norm_eps == 1e-6


def test_no_layer_beyond_the_model() -> None:
    for layer in (-1, 9):
        with pytest.raises(InputError, match=f"layer {layer} does not exist: the layers are 0 to 8"):
            small().owns_indexer(layer)
    with pytest.raises(InputError):
        small(num_nextn_predict_layers=0).is_moe(8)


# --- what transformers writes ---------------------------------------------------------------------------------------------------


def test_a_config_that_transformers_wrote(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.GlmMoeDsaConfig(
        num_hidden_layers=8,
        index_topk_freq=4,
        index_skip_topk_offset=3,
        rope_parameters={"rope_theta": 8e6, "rope_type": "default"},
    )
    written.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "indexer_rope_interleave" not in saved, "transformers still does not write the layout of rotary pairs"
    for config in (
        Glm5Config.from_dict(written.to_dict()),
        Glm5Config.from_json(tmp_path),
        Glm5Config.from_json(tmp_path / "config.json"),
    ):
        assert config.indexer_types == (F, F, F, S, S, S, F, S)
        assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 5
        assert (config.rope_theta, config.rope_interleave, config.indexer_rope_interleave) == (8e6, True, True)
        assert config.num_nextn_predict_layers == 0
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, (1,), None)
        assert [note.split()[0] for note in config.notes] == ["rope_interleave", "indexer_rope_interleave"]


@pytest.mark.parametrize(("freq", "offset"), [(1, 2), (2, 2), (4, 2), (4, 3), (3, 1), (4, 5)])
def test_the_schedule_is_that_of_transformers(freq: int, offset: int) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GlmMoeDsaConfig(num_hidden_layers=8, index_topk_freq=freq, index_skip_topk_offset=offset)
    assert small(index_topk_freq=freq, index_skip_topk_offset=offset).indexer_types == tuple(theirs.indexer_types)


# --- index sharing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "types"),
    [
        ({}, [F] * 8),
        ({"index_topk_freq": 4}, [F, F, S, S, S, F, S, S]),  # absent offset: 2
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, [F, F, F, S, S, S, F, S]),
        ({"index_skip_topk_offset": 3}, [F] * 8),  # absent freq: 1
        ({"index_topk_pattern": "FSSFSSFS"}, [F, S, S, F, S, S, F, S]),
        ({"index_topk_pattern": [F, S, F, S, F, S, F, S]}, [F, S, F, S, F, S, F, S]),
        ({"index_topk_pattern": "FSSSSSSS", "index_topk_freq": 4}, [F] + [S] * 7),
        ({"indexer_types": [F, F] + [S] * 6, "index_topk_pattern": "FSSSSSSS", "index_topk_freq": 1}, [F, F] + [S] * 6),
    ],
)
def test_which_layers_own_an_indexer(keys: dict[str, Any], types: list[str]) -> None:
    assert small(**keys).indexer_types == tuple(types)


def test_a_key_that_lost_is_noted() -> None:
    (note,) = small(indexer_types=[F, F] + [S] * 6, index_topk_freq=4).notes
    assert note.startswith("indexer_types decides which layers own an indexer; index_topk_freq = 4")
    assert small(indexer_types=[F, F, S, S, S, F, S, S], index_topk_freq=4).notes == ()


# --- keys that give one field ---------------------------------------------------------------------------------------------------


def test_legacy_keys() -> None:
    legacy = without("n_routed_experts", "rope_parameters", "dtype", num_experts=16, rope_theta=5e5, torch_dtype="float16")
    config = Glm5Config.from_dict(legacy)
    assert (config.n_routed_experts, config.rope_theta, config.dtype) == (16, 5e5, "float16")
    assert small(num_experts=256, rope_theta=1000000, torch_dtype="bfloat16") == small()
    assert small(rope_scaling=None, rope_theta=1e6) == small()


def test_layer_types_may_have_either_name() -> None:
    assert small(layer_types=["deepseek_sparse_attention"] * 8) == small(layer_types=["indexed_attention"] * 8) == small()


def test_dense_layers_need_not_come_first() -> None:
    types = ["sparse", "dense"] * 4
    assert small(mlp_layer_types=types, first_k_dense_replace=0).moe_layers == (0, 2, 4, 6)
    assert Glm5Config.from_dict(without("first_k_dense_replace", mlp_layer_types=types)).moe_layers == (0, 2, 4, 6)
    assert small(first_k_dense_replace=20).moe_layers == ()


def test_explicit_half_split_is_honoured() -> None:
    config = small(indexer_rope_interleave=False)
    assert config.rope_interleave
    assert not config.indexer_rope_interleave


def test_unknown_keys_are_noted_and_null_is_nothing() -> None:
    assert small(fine_tuned_by="x", index_topk_frequency=4).notes == (
        "fine_tuned_by is not known here and is ignored",
        "index_topk_frequency is not known here and is ignored; did you mean index_topk_freq?",
    )
    assert small(fine_tuned_by=None, sliding_window=None, use_sliding_window=False).notes == ()


# --- errors ---------------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "glm5_next": (without(model_type="glm5_next"), r"'glm5_next' is GLM-5\.3-Flash: linear attention"),
    "deepseek_v32": (without(model_type="deepseek_v32"), r"'deepseek_v32' is DeepSeek-V3\.2: .*half-split"),
    "llama": (without(model_type="llama"), r"'llama' is an architecture that this library does not implement\n.*'glm_moe_dsa'"),
    "misspelt": (without(model_type="glm_moe_dsq"), r"did you mean glm_moe_dsa\?"),
    "model_type of another kind": (without(model_type=["glm_moe_dsa"]), "model_type"),
    "no model_type": (without("model_type"), "does not name model_type"),
    "architectures": (without(architectures=["GlmMoeDsaModel"]), "architectures"),
    "num_experts disagrees": (without(num_experts=128), r"n_routed_experts = 256 and num_experts = 128 contradict"),
    "no experts": (without("n_routed_experts"), "does not name n_routed_experts"),
    "theta disagrees": (
        without(rope_theta=10000.0),
        r"rope_theta = 10000\.0 and rope_parameters\.rope_theta = 1000000 contradict",
    ),
    "no theta": (without("rope_parameters"), "names no rope_theta"),
    "no theta in rope_parameters": (without(rope_parameters={"rope_type": "default"}), "names no rope_theta"),
    "yarn": (
        without(rope_parameters={"rope_theta": 1e6, "rope_type": "yarn", "factor": 4}),
        r"rope_parameters\.rope_type = 'yarn'",
    ),
    "legacy yarn": (without(rope_scaling={"type": "yarn", "factor": 4}), r"rope_scaling\.type = 'yarn'"),
    "factor": (without(rope_parameters={"rope_theta": 1e6, "factor": 4}), r"rope_parameters\.factor = 4"),
    "partial rotary": (without(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "rope_parameters no object": (without(rope_parameters=1e6), "rope_parameters = 1000000.0: it must be an object"),
    "rope_interleave": (without(rope_interleave="yes"), "rope_interleave = 'yes'"),
    "first layer shared": (without(indexer_types=[S] + [F] * 7), r"indexer_types\[0\] = 'shared'"),
    "first layer shared by offset": (without(index_topk_freq=4, index_skip_topk_offset=0), r"indexer_types\[0\] = 'shared'"),
    "indexer_types short": (without(indexer_types=[F] * 7), "indexer_types lists 7 layers, but num_hidden_layers = 8"),
    "indexer_types word": (without(indexer_types=[F] * 7 + ["half"]), r"indexer_types\[7\] = 'half'"),
    "indexer_types a string": (without(indexer_types="FFFFFFFF"), "indexer_types = 'FFFFFFFF': it must be a list"),
    "pattern short": (without(index_topk_pattern="FS"), "index_topk_pattern covers 2 layers"),
    "pattern letters": (without(index_topk_pattern="FXFXFXFX"), "index_topk_pattern = 'FXFXFXFX'"),
    "freq 0": (without(index_topk_freq=0), "index_topk_freq = 0"),
    "offset": (without(index_topk_freq=2, index_skip_topk_offset=-1), "index_skip_topk_offset = -1"),
    "mlp_layer_types short": (without(mlp_layer_types=["dense"] + ["sparse"] * 3), "mlp_layer_types lists 4 layers"),
    "mlp_layer_types word": (without(mlp_layer_types=["dense"] + ["moe"] * 7), r"mlp_layer_types\[1\] = 'moe'"),
    "dense disagrees": (
        without(mlp_layer_types=["dense"] * 3 + ["sparse"] * 5),
        "first_k_dense_replace = 1 contradicts mlp_layer_types",
    ),
    "no dense": (without("first_k_dense_replace"), "neither mlp_layer_types nor first_k_dense_replace"),
    "dense negative": (without(first_k_dense_replace=-1), "first_k_dense_replace = -1"),
    "moe_layer_freq": (without(moe_layer_freq=2), "moe_layer_freq = 2"),
    "attention_bias": (without(attention_bias=True), "attention_bias = True"),
    "mlp_bias": (without(mlp_bias=True), "mlp_bias = True"),
    "hidden_act": (without(hidden_act="gelu"), "hidden_act = 'gelu' is not supported: .* hidden_act = 'silu'"),
    "scoring_func": (without(scoring_func="softmax"), "scoring_func = 'softmax'"),
    "topk_method": (without(topk_method="greedy"), "topk_method = 'greedy'"),
    "key heads": (without(num_key_value_heads=8), "num_key_value_heads = 8 differs from num_attention_heads = 64"),
    "qk_head_dim": (without(qk_head_dim=192), r"qk_head_dim = 192, but qk_nope_head_dim \+ qk_rope_head_dim = 192 \+ 64"),
    "odd rope": (without("qk_head_dim", qk_rope_head_dim=63), "qk_rope_head_dim = 63: it must be even"),
    "index head": (without(index_head_dim=32), "index_head_dim = 32 is below qk_rope_head_dim = 64"),
    "shared experts": (without(n_shared_experts=0), "n_shared_experts = 0: it must be a positive integer"),
    "groups": (without(n_group=3), "n_group = 3 does not divide n_routed_experts = 256"),
    "groups of one": (without(n_group=256, topk_group=8), "n_group = 256 leaves 1 expert in each group"),
    "topk_group": (without(n_group=4, topk_group=5), "topk_group = 5 exceeds n_group = 4"),
    "experts per token": (
        without(n_group=64, topk_group=1),
        "num_experts_per_tok = 8 exceeds the 4 experts that a token can reach",
    ),
    "layer_types": (without(layer_types=["full_attention"] * 8), r"layer_types holds \['full_attention'\]"),
    "layer_types short": (without(layer_types=["indexed_attention"] * 7), "layer_types lists 7 layers"),
    "tied": (without(tie_word_embeddings=True), "tie_word_embeddings = true is not supported"),
    "two MTP layers": (without(num_nextn_predict_layers=2), "num_nextn_predict_layers = 2"),
    "negative size": (without(hidden_size=-1), "hidden_size = -1: it must be a positive integer"),
    "fractional size": (without(hidden_size=6144.5), "hidden_size = 6144.5"),
    "true as a size": (without(n_group=True), "n_group = True"),
    "no layers": (without(num_hidden_layers=0), "num_hidden_layers = 0"),
    "eps as text": (without(rms_norm_eps="1e-5"), "rms_norm_eps = '1e-5'"),
    "latent eps": (without(latent_norm_eps=0.0), r"latent_norm_eps = 0\.0"),
    "infinite theta": (without(rope_parameters={"rope_theta": float("inf")}), "rope_theta = inf"),
    "number as a flag": (without(norm_topk_prob=1), "norm_topk_prob = 1: it must be true or false"),
    "dtype": (without(dtype="int8"), "dtype = 'int8': supported are bfloat16"),
    "dtypes disagree": (without(torch_dtype="float16"), "dtype = 'bfloat16' and torch_dtype = 'float16' contradict"),
    "token": (
        without(eos_token_id=[154880]),
        "eos_token_id = 154880: a token id is an integer from 0 to vocab_size - 1 = 154879",
    ),
    "pad": (without(pad_token_id=-1), "pad_token_id = -1"),
    "other architecture's key": (without(sliding_window=4096), "sliding_window = 4096: no such key in GlmMoeDsaForCausalLM"),
    "int4": (
        without(quantization_config={"quant_method": "compressed-tensors", "format": "marlin-24"}),
        "quantization_config.format = 'marlin-24' is not supported",
    ),
    "gptq": (without(quantization_config={"quant_method": "gptq", "bits": 4}), "quant_method = 'gptq' is not supported"),
    "compression_config": (without(compression_config={}), "compression_config is not supported"),
    "fp8 without blocks": (without(quantization_config={"quant_method": "fp8"}), "weight_block_size = None"),
    "static fp8": (without(quantization_config={**FP8, "activation_scheme": "static"}), "activation_scheme = 'static'"),
    "e5m2": (without(quantization_config={**FP8, "fmt": "e5m2"}), "fmt = 'e5m2'"),
    "unknown fp8 key": (without(quantization_config={**FP8, "zero_point": True}), "zero_point = True is not known"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_an_error_that_names_the_field(case: str) -> None:
    mapping, words = ERRORS[case]
    with pytest.raises(ConfigError, match=words):
        Glm5Config.from_dict(mapping)


REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim"),
    *("index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "rms_norm_eps", "max_position_embeddings"),
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_never_guessed(name: str) -> None:
    for mapping in (without(name), without(**{name: None})):
        with pytest.raises(ConfigError, match=f"does not name {name}"):
            Glm5Config.from_dict(mapping)


@pytest.mark.parametrize("junk", ["x", -1, 1.5, True, [], ["x"], {}, {"x": 1}, float("nan"), [[1]]], ids=repr)
def test_junk_in_any_key_is_a_config_error_or_harmless(junk: Any) -> None:
    legacy = ("layer_types", "num_experts", "quantization_config", "latent_norm_eps", "rope_theta", "rope_scaling")
    for name in {*GLM_5_2, *legacy}:
        error = refusal({**SMALL, name: junk})
        assert error is None or name in str(error)


def refusal(mapping: dict[str, Any]) -> ConfigError | None:
    try:
        Glm5Config.from_dict(mapping)
    except ConfigError as error:
        return error
    return None


# --- files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list; a config.json is an object"),
        ('{"model_type": "a", "model_type": "b"}', "the key 'model_type' appears twice"),
        ("\xff\xfe", "is not valid JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        Glm5Config.from_json(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        Glm5Config.from_json(tmp_path)
