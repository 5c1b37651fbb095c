"""A model whose projections are INT8: read from config.json, checked, and multiplied by 8-bit activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, ConfigError, InputError
from glm5_port.model.accounting import count_parameters, weight_bytes
from glm5_port.model.composed import AbsorbedQueries, IndexQueries, Mlp, Output
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import INT8_CODES, PROJECTION, expected_tensors
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options
from glm5_port.testing.bisect import bisect
from glm5_port.testing.tiny import tiny_config
from tests.model.int8_checkpoints import IGNORE, decoded_model, int8_checkpoint, scheme
from tests.model.models import prompt
from tests.quant.exports import change

TOKENS = torch.tensor([prompt(21)])


def operators(model: Glm5Model) -> set[str]:
    return {selection.operator for selection in model.decisions()}


def logits(model: Glm5Model) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8_checkpoint(tmp_path_factory.mktemp("int8"))


def test_a_config_says_which_projections_are_codes() -> None:
    config = tiny_config(quantization_config=scheme())
    assert Glm5Config.from_dict(config.as_dict()) == config
    expected, plain = expected_tensors(config, mtp=True), expected_tensors(tiny_config(), mtp=True)
    codes = {name for name, spec in expected.items() if spec.kind == INT8_CODES}
    projections = {name for name, spec in plain.items() if spec.kind == PROJECTION}
    assert codes == {name for name in projections if ".mlp.experts." not in name}
    assert set(expected) - set(plain) == {f"{name}_scale" for name in codes}
    assert expected["model.layers.0.mlp.down_proj.weight_scale"].shape == (config.hidden_size, 1)
    assert count_parameters(config) == count_parameters(tiny_config())
    assert weight_bytes(config, torch.bfloat16) < weight_bytes(tiny_config(), torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (scheme(IGNORE[1:]), "does not name lm_head"),
        (scheme([*IGNORE[:1], *IGNORE[2:]]), "experts.0.gate_proj"),
        (scheme([*IGNORE[:3], *IGNORE[4:]]), "indexer.weights_proj"),
        (scheme(weights={"num_bits": 4}), "weights.num_bits = 4"),
        (scheme(weights={"strategy": "tensor"}), "weights.strategy = 'tensor'"),
        (scheme(weights={"symmetric": False}), "weights.symmetric = False"),
        (scheme(dynamic=False), "input_activations.dynamic = False"),
        (scheme(strategy="tensor"), "input_activations.strategy = 'tensor'"),
        ({**scheme(), "config_groups": {}}, "exactly one group"),
    ],
)
def test_what_is_not_read_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(quantization_config=given)
    assert said in str(refused.value)


@pytest.mark.parametrize(("max_context", "moved"), [(None, 0.5), (6, 0.1)], ids=["sparse", "dense"])
def test_projections_multiply_in_8_bits(checkpoint: Path, max_context: int | None, moved: float) -> None:
    """Where a selection decides, near-ties that 8 bits turn over move more than rounding does."""
    model = glm5_port.load(checkpoint, backend="cpu", dtype="float32", max_context=max_context)
    assert "int8_matmul" in operators(model)
    assert isinstance(model.layers[0].mlp.mlp, Mlp)
    assert all(isinstance(layer.attention.prologue, AbsorbedQueries) for layer in model.layers)
    assert all(isinstance(layer.attention.output, Output) for layer in model.layers)
    decoded = decoded_model(checkpoint, max_context=max_context)
    assert "int8_matmul" not in operators(decoded)
    tokens = TOKENS if max_context is None else TOKENS[:, :6]
    with torch.no_grad():
        ours, theirs = model(tokens), decoded(tokens)
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < moved, "8 bits are seen, and are not another model"
    assert model.generate([prompt(5)], max_new_tokens=1, stop_ids=())


def test_the_indexer_has_codes_too(checkpoint: Path) -> None:
    model = glm5_port.load(checkpoint, backend="cpu", dtype="float32")
    indexers = [layer.attention.indexer for layer in model.layers if layer.attention.indexer is not None]
    assert indexers
    assert all(isinstance(indexer.project, IndexQueries) for indexer in indexers)


def test_every_operator_is_within_its_budget_in_the_model(checkpoint: Path) -> None:
    suspect = glm5_port.load(checkpoint, backend="cpu", dtype="bfloat16", mtp=True)
    reference = glm5_port.load(checkpoint, backend="cpu", dtype="bfloat16", implementation="reference", mtp=True)
    report = bisect(suspect, reference, [prompt(9)], max_new_tokens=2)
    assert report.first is None
    assert report.calls > 50


def test_what_ignore_names_stays_in_floating_point(tmp_path: Path) -> None:
    model = glm5_port.load(int8_checkpoint(tmp_path, ("re:.*self_attn",)), backend="cpu", dtype="float32")
    assert "int8_matmul" in operators(model)
    assert "mla_prologue_into_cache" in operators(model)


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_swapped_parts_change_what_is_computed(tmp_path: Path, part: str) -> None:
    """A mutant: gate and up of the dense MLP swapped. Shapes fit, so nothing but the result can tell."""
    directory = int8_checkpoint(tmp_path)
    expected = logits(glm5_port.load(directory, backend="cpu", dtype="float32"))
    gate, up = (f"model.layers.0.mlp.{name}_proj.{part}" for name in ("gate", "up"))
    change(directory, lambda tensors: tensors.update({gate: tensors[up], up: tensors[gate]}))
    assert (logits(glm5_port.load(directory, backend="cpu", dtype="float32")) - expected).abs().max() > 1e-2


def test_refusals(tmp_path: Path) -> None:
    directory = int8_checkpoint(tmp_path)
    with pytest.raises(InputError, match="INT8 weights, whose codes have no gradient"):
        glm5_port.load(directory, backend="cpu", trainable=True)
    with pytest.raises(InputError, match="holds INT8 weights"):
        export(directory, tmp_path / "again", Options())
    name = "model.layers.0.mlp.gate_proj.weight"
    change(directory, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(CheckpointError, match="expected I8, got F32"):
        glm5_port.load(directory, backend="cpu")
