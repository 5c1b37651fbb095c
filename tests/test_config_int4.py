"""INT4 experts in a config.json: what is read, what is refused, and what a checkpoint must then hold."""

from __future__ import annotations

from typing import Any

import pytest

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import PER_CHANNEL
from glm5_port.errors import ConfigError
from glm5_port.model.accounting import count_parameters
from glm5_port.model.tensors import PROJECTION, expected_tensors
from glm5_port.testing.tiny import TINY, tiny_config

IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]


def block(**weights: Any) -> dict[str, Any]:
    """The quantization_config that exporters of Kimi-K2 style write."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights},
            }
        },
        "ignore": IGNORE,
    }


def int4_config(**changes: Any) -> Glm5Config:
    return tiny_config(quantization_config={**block(), **changes})


def test_experts_are_expected_in_three_parts_and_the_rest_as_ever() -> None:
    expected, plain = expected_tensors(int4_config(), mtp=True), expected_tensors(tiny_config(), mtp=True)
    changed = set(plain) - set(expected)
    assert changed == {name for name in plain if ".mlp.experts." in name}
    up, down = "model.layers.2.mlp.experts.15.up_proj.weight", "model.layers.2.mlp.experts.15.down_proj.weight"
    hidden, inner = TINY["hidden_size"], TINY["moe_intermediate_size"]
    assert [expected[up + part].shape for part in ("_packed", "_scale", "_shape")] == [
        (inner, hidden // 8),
        (inner, hidden // 32),
        (2,),
    ]
    assert expected[down + "_scale"].shape == (hidden, inner // 32)
    assert count_parameters(int4_config()) == count_parameters(tiny_config())


def test_layers_that_ignore_names_stay_as_they_are() -> None:
    config = int4_config(ignore=[*IGNORE, r"re:.*layers\.7\..*", "re:.*layers\\.3\\..*"])
    assert [layer for layer in range(8) if config.has_int4_experts(layer)] == [2, 4, 5, 6]


def test_what_ignore_does_not_name_is_expected_in_three_parts() -> None:
    """As exports write it that quantise more than experts: kept modules one by one."""
    kept = [f"re:.*{name}" for name in ("kv_a_proj_with_mqa", r"indexer\.(wk|weights_proj)", "shared_experts.up_proj")]
    config = int4_config(ignore=["lm_head", *kept])
    expected, plain = expected_tensors(config, mtp=True), expected_tensors(tiny_config(), mtp=True)
    packed = {name.removesuffix("_packed") for name in expected if name.endswith("_packed")}
    assert set(plain) - set(expected) == packed
    projections = {name for name, spec in plain.items() if spec.kind == PROJECTION}
    assert projections - packed == {n for n in projections if "kv_a_proj" in n or ".wk." in n or "shared_experts.up_proj" in n}
    assert expected["model.layers.0.mlp.down_proj.weight_scale"].shape == (TINY["hidden_size"], TINY["intermediate_size"] // 32)
    assert count_parameters(config) == count_parameters(tiny_config())


def test_per_channel_and_round_trip() -> None:
    config = tiny_config(quantization_config=block(strategy="channel", group_size=None))
    assert config.int4 is not None
    assert config.int4.group_size == PER_CHANNEL
    assert Glm5Config.from_dict(config.as_dict()) == config
    assert Glm5Config.from_dict(int4_config().as_dict()) == int4_config()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "marlin-24"}, "format = 'marlin-24'"),
        ({"config_groups": {}}, "exactly one group"),
        ({"config_groups": block()["config_groups"] | {"group_1": {}}}, "exactly one group"),
        ({"ignore": ["re:("]}, "no regular expression"),
        ({"ignore": "lm_head"}, "must be a list"),
        ({"ignore": ["lm_head"]}, "does not name model.layers.0.self_attn.indexer.weights_proj"),
        ({"ignore": IGNORE[1:]}, "does not name lm_head"),
        ({"ignore": [*IGNORE, r"re:.*experts\.\d+\.down_proj"]}, "the matrices of an expert are read all in INT4, or none"),
        (block(num_bits=8), "num_bits = 8"),
        (block(symmetric=False), "symmetric = False"),
        (block(actorder="group"), "actorder = 'group'"),
        (block(strategy="tensor"), "strategy = 'tensor'"),
        (block(group_size=0), "group_size = 0"),
        (block(group_size=True), "group_size = True"),
    ],
)
def test_what_is_not_read_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=".*") as refused:
        int4_config(**changes)
    assert said in str(refused.value)
