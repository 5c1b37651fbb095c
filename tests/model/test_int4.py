"""A model whose routed experts are INT4: loaded from the canonical export, computed from codes, never expanded as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import glm5_port
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.build import build
from glm5_port.model.decoder import Glm5Model
from glm5_port.quant.int4 import AMAX7, Int4Rule, dequantize, quantize
from glm5_port.quant.packing import unpack_int4
from glm5_port.testing.tiny import tiny_config
from tests.model.hugging_face import make
from tests.test_config_int4 import IGNORE, block

PROMPTS = [list(range(7, 43)), list(range(90, 113))]


def write_int4(directory: Path, rule: Int4Rule, *, keep_layer: int | None = None) -> Path:
    """Quantises the experts of a checkpoint of transformers by hand, independently of the exporter."""
    import json

    file = directory / "model.safetensors"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if ".mlp.experts." not in name or f"layers.{keep_layer}." in name:
            stored[name] = tensor
            continue
        made = quantize(tensor.to(torch.bfloat16), rule)
        stored |= {f"{name}_packed": made.packed(), f"{name}_scale": made.scales}
        stored[f"{name}_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
    save_file(stored, file)
    config = json.loads((directory / "config.json").read_text())
    size = {"strategy": "channel", "group_size": None} if rule.group_size == -1 else {"group_size": rule.group_size}
    ignore = [*IGNORE, *([] if keep_layer is None else [rf"re:.*layers\.{keep_layer}\..*"])]
    config["quantization_config"] = {**block(**size), "ignore": ignore}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=["groups", "per_channel", "one_layer_kept"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    make(directory, seed=3)
    rule = Int4Rule(group_size=-1) if request.param == "per_channel" else AMAX7
    return write_int4(directory, rule, keep_layer=4 if request.param == "one_layer_kept" else None)


def expanded(directory: Path) -> Glm5Model:
    """The same model with every expert decoded to floating point beforehand."""
    stored = load_file(directory / "model.safetensors")

    def read(name: str) -> Tensor:
        if name in stored:
            return stored[name].clone()
        return dequantize(unpack_int4(stored[f"{name}_packed"]), stored[f"{name}_scale"]).float()

    config = dataclasses.replace(Glm5Config.from_json(directory), int4=None)
    return build(config, read, backend="cpu", dtype="float32")


def test_logits_and_tokens_are_those_of_the_decoded_weights(checkpoint: Path) -> None:
    model, decoded = glm5_port.load(checkpoint, backend="cpu", dtype="float32"), expanded(checkpoint)
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        logits = model(tokens)
        assert (logits - decoded(tokens)).abs().max() < 1e-5
    assert logits.std() > 0.3
    assert model.generate(PROMPTS, max_new_tokens=8, stop_ids=()) == decoded.generate(PROMPTS, max_new_tokens=8, stop_ids=())


def test_experts_stay_in_four_bits(checkpoint: Path, canonical_weights: None) -> None:
    model = glm5_port.load(checkpoint, dtype="float32")
    int4_layers = [layer for layer in model.config.layers if model.config.has_int4_experts(layer)]
    assert int4_layers
    for layer in int4_layers:
        experts = model.layers[layer].mlp.experts
        assert experts.bound.selection.operator == "expert_mlp_int4"
        weights = {name: p.dtype for name, p in experts.named_parameters()}
        assert weights == {
            "gate_up_packed": torch.int32,
            "gate_up_scales": torch.bfloat16,
            "down_packed": torch.int32,
            "down_scales": torch.bfloat16,
        }
    operators = {selection.operator for selection in model.decisions()}
    kept = any(model.config.is_moe(layer) and layer not in int4_layers for layer in model.config.layers)
    assert ("expert_mlp" in operators) == kept


def test_a_missing_scale_is_named_before_anything_is_allocated(tmp_path: Path) -> None:
    make(tmp_path, seed=3)
    write_int4(tmp_path, AMAX7)
    stored = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.3.mlp.experts.5.up_proj.weight_scale"
    del stored[lost]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(1\)") as refused:
        glm5_port.load(tmp_path, backend="cpu")
    assert lost in str(refused.value)


def test_codes_have_no_gradient(tmp_path: Path) -> None:
    make(tmp_path, seed=3)
    write_int4(tmp_path, AMAX7)
    with pytest.raises(InputError, match=r"qat"):
        glm5_port.load(tmp_path, backend="cpu", trainable=True)


def test_a_config_that_promises_int4_and_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    make(tmp_path, seed=3)
    before = (tmp_path / "model.safetensors").read_bytes()
    write_int4(tmp_path, AMAX7)
    (tmp_path / "model.safetensors").write_bytes(before)
    with pytest.raises(CheckpointError, match="missing"):
        glm5_port.load(tmp_path, backend="cpu")


def test_the_tiny_config_knows_its_experts() -> None:
    assert not any(tiny_config().has_int4_experts(layer) for layer in range(8))
