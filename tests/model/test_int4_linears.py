"""A model whose projections are INT4, beside or without its experts: computed from codes, one matrix at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import glm5_port
from glm5_port.config import Glm5Config
from glm5_port.config_quantization import PER_CHANNEL
from glm5_port.errors import CheckpointError, ConfigError, InputError
from glm5_port.model.accounting import weight_bytes
from glm5_port.model.composed import AbsorbedQueries, IndexQueries, Mlp, Output
from glm5_port.model.decoder import Glm5Model
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options
from glm5_port.testing.bisect import bisect
from tests.model.int4_checkpoints import EVERYTHING, decoded_model, int4_export, int4_source
from tests.model.models import calls, prompt
from tests.quant.exports import change

PROMPTS = [prompt(21), prompt(9, seed=1)]
SOME = (
    r"q_b_proj",
    r"layers\.0\.mlp\.up_proj",
    r"layers\.[24]\.self_attn\.o_proj",
    r"indexer\.wk\.",
    r"shared_experts\.down_proj",
)
"""Part of each fused operator only."""
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "everything": (EVERYTHING, 32),
    "everything_per_channel": (EVERYTHING, PER_CHANNEL),
    "attention": ((r"self_attn",), 32),
    "kv_b_alone": ((r"kv_b_proj",), 32),
    "some": (SOME, 32),
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    include, group_size = KINDS[request.param]
    return int4_export(tmp_path_factory.mktemp(request.param), include, group_size)


def operators(model: Glm5Model) -> set[str]:
    return {selection.operator for selection in model.decisions()}


@pytest.mark.parametrize("max_context", [None, 6], ids=["sparse", "dense"])
def test_logits_and_tokens_are_those_of_the_decoded_weights(checkpoint: Path, max_context: int | None) -> None:
    """Prefill and decode, with selection and without."""
    options: dict[str, Any] = {"max_context": max_context}
    model, decoded = glm5_port.load(checkpoint, backend="cpu", dtype="float32", **options), decoded_model(checkpoint, **options)
    prompts = PROMPTS if max_context is None else [row[:3] for row in PROMPTS]
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1]))
        assert (logits - decoded(torch.tensor(prompts[:1]))).abs().max() < 2e-5
    assert logits.std() > 0.3
    assert model.generate(prompts, max_new_tokens=3, stop_ids=()) == decoded.generate(prompts, max_new_tokens=3, stop_ids=())
    assert "int4_matmul" in operators(model) or "kv_b" in str(checkpoint)
    assert "int4_matmul" not in operators(decoded)


def test_the_mtp_layer_drafts_from_its_codes(checkpoint: Path) -> None:
    models = glm5_port.load(checkpoint, backend="cpu", dtype="float32", mtp=True), decoded_model(checkpoint, mtp=True)
    heads: list[list[torch.Tensor]] = []
    for model in models:
        made = calls(model, lambda m=model: m.generate(PROMPTS[1:], max_new_tokens=4, stop_ids=(), draft_tokens=2))
        heads.append([result for name, _, result in made if name == "linear" and result.shape[-1] == model.config.vocab_size])
        assert model.speculation.drafted > 1
    for ours, theirs in zip(*heads, strict=True):  # of the trunk and of every draft
        assert (ours - theirs).abs().max() < 2e-5


def within_budget(checkpoint: Path, dtype: str, **options: Any) -> None:
    """bisect: each call of a run, replayed against its float64 gold."""
    suspect = glm5_port.load(checkpoint, backend="cpu", dtype=dtype, **options)
    reference = glm5_port.load(checkpoint, backend="cpu", dtype=dtype, implementation="reference", **options)
    report = bisect(suspect, reference, [PROMPTS[1]], max_new_tokens=2)
    assert report.first is None
    assert report.calls > 50


def test_every_operator_is_within_its_budget_in_the_model(tmp_path: Path) -> None:
    within_budget(int4_export(tmp_path, SOME, indexer_types=["full", "shared"], num_hidden_layers=2), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_is_within_its_budget_in_every_kind(checkpoint: Path, dtype: str) -> None:
    within_budget(checkpoint, dtype)


@pytest.mark.slow
def test_8_bit_activations_are_within_their_budget(tmp_path: Path) -> None:
    within_budget(int4_export(tmp_path), "float32", int4_activations="int8")


def test_no_matrix_is_kept_in_floating_point(tmp_path: Path, canonical_weights: None) -> None:
    """What stays wide: embedding, head, norms, routers, the indexer's head weights, and kv_b_proj in its two halves."""
    model = glm5_port.load(int4_export(tmp_path), dtype="float32", mtp=True)
    wide = {
        name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.bfloat16 and p.dim() > 1
    }
    allowed = ("embedding", "head.weight", "join.weight", "route.gate", "head_weights.weight", "absorb.weight", "values.weight")
    assert [name for name in wide if not name.endswith(allowed)] == []
    codes = [name for name, p in model.named_parameters() if p.dtype == torch.int32]
    assert len(codes) > 50
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    head_weights = sum(p.numel() * 4 for name, p in model.named_parameters() if "k_norm" in name)
    assert head_weights > 0
    shapes = sum(8 for name in codes for _ in range(model.config.n_routed_experts if "experts" in name else 1))
    assert 0 <= weight_bytes(model.config, torch.float32, mtp=True) - sum(held.values()) <= 3 * shapes


def test_fused_operators_stay_where_their_matrices_are_floats(tmp_path: Path) -> None:
    model = glm5_port.load(int4_export(tmp_path, SOME), backend="cpu", dtype="float32")
    layers = model.layers
    assert all(isinstance(layer.attention.prologue, AbsorbedQueries) for layer in layers)
    assert [isinstance(layer.attention.output, Output) for layer in layers] == [False, False, True, False, True]
    assert [isinstance(layer.attention.indexer.project, IndexQueries) for layer in layers if layer.attention.indexer] == [
        True
    ] * 3
    assert isinstance(layers[0].mlp.mlp, Mlp)
    kinds = [p.bound.selection.operator for p in (layers[0].mlp.mlp.gate, layers[0].mlp.mlp.up, layers[0].mlp.mlp.down)]
    assert kinds == ["linear", "int4_matmul", "linear"]
    plain = glm5_port.load(tmp_path / "source", backend="cpu")
    assert not operators(plain) & {"int4_matmul", "linear_per_head", "rms_norm", "rotate"}


def test_the_facts_of_every_binding_are_those_of_its_calls(checkpoint: Path, canonical_weights: None) -> None:
    model = glm5_port.load(checkpoint, dtype="float32")
    bindings = {id(bound.function): bound for bound in model.binder.bindings}
    seen = 0
    for bound in bindings.values():
        assert bound.selection.facts["dtype"] == torch.float32
    for operator, arguments, _ in calls(model, lambda: model.generate(PROMPTS, max_new_tokens=2, stop_ids=())):
        stated = [b.selection.facts for b in model.binder.bindings if b.selection.operator == operator]
        declared = next(b.implementation.operator for b in model.binder.bindings if b.selection.operator == operator)
        actual = {name: fact(**arguments) for name, fact in declared.facts.items()}
        assert any(all(facts[name] == value for name, value in actual.items()) for facts in stated), (operator, actual)
        seen += operator == "int4_matmul"
    assert seen or "kv_b" in str(checkpoint)


def test_swapped_codes_change_what_is_computed(tmp_path: Path) -> None:
    """A mutant: gate and up of the dense MLP swapped. Shapes fit, so nothing but the result can tell."""
    directory = int4_export(tmp_path)
    expected = decoded_model(directory)
    gate, up = "model.layers.0.mlp.gate_proj.weight_packed", "model.layers.0.mlp.up_proj.weight_packed"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        if gate in tensors:
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    change(directory, swap)
    model = glm5_port.load(directory, backend="cpu", dtype="float32")
    with torch.no_grad():
        tokens = torch.tensor(PROMPTS[:1])
        assert (model(tokens) - expected(tokens)).abs().max() > 1e-2


# -- what is refused ---------------------------------------------------------------------------------------------------------


def test_matrices_of_an_expert_that_are_not_alike(tmp_path: Path) -> None:
    source = int4_source(tmp_path / "source")
    export(source, tmp_path / "int4", Options(exclude=(r"experts\.\d+\.down_proj",)))
    with pytest.raises(ConfigError, match="matrices of an expert"):
        glm5_port.load(tmp_path / "int4", backend="cpu")


def test_a_projection_that_is_not_what_config_json_says(tmp_path: Path) -> None:
    directory = int4_export(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) == 1
    stored = load_file(shards[0])
    for part in ("_packed", "_scale", "_shape"):
        del stored[name + part]
    stored[name] = load_file(tmp_path / "source" / "model.safetensors")[name]
    save_file(stored, directory / "model.safetensors")
    shards[0].unlink(missing_ok=shards[0].name == "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="missing") as refused:
        glm5_port.load(directory, backend="cpu")
    assert f"{name}_packed" in str(refused.value)


# -- W4A8 --------------------------------------------------------------------------------------------------------------------


def test_experts_multiply_with_8_bits_when_asked_to(tmp_path: Path) -> None:
    directory = int4_export(tmp_path, ())
    wide, narrow, groups = (
        glm5_port.load(directory, backend="cpu", dtype="float32", int4_activations=a) for a in (None, "int8", "int8_groups")
    )
    assert wide.int4_activations == "wide"
    assert "expert_mlp_int4" in operators(wide)
    assert "expert_mlp_int4_w4a8" not in operators(wide)
    assert "expert_mlp_int4_w4a8" in operators(narrow)
    assert "expert_mlp_int4" not in operators(narrow)
    assert operators(groups) == operators(narrow)
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        difference = (narrow(tokens) - wide(tokens)).abs()
        assert 1e-4 < (groups(tokens) - wide(tokens)).abs().max() < 1.0
        assert not torch.equal(groups(tokens), narrow(tokens))
    assert 1e-4 < difference.max() < 1.0, "8 bits are seen, and are not another model"
    reference = glm5_port.load(directory, backend="cpu", dtype="float32", int4_activations="int8", implementation="reference")
    with torch.no_grad():
        assert (narrow(tokens) - reference(tokens)).abs().max() < difference.max() / 3


def test_8_bits_for_what_has_no_int4_experts(tmp_path: Path) -> None:
    source = int4_source(tmp_path / "source")
    for activations in ("int8", "int8_groups"):
        with pytest.raises(InputError, match=f"int4_activations={activations} was asked for a checkpoint without INT4 experts"):
            glm5_port.load(source, backend="cpu", int4_activations=activations)
    with pytest.raises(InputError, match="did you mean int8"):
        glm5_port.load(source, backend="cpu", int4_activations="int")


def test_the_config_of_an_export_names_what_it_holds(tmp_path: Path) -> None:
    config = Glm5Config.from_json(int4_export(tmp_path, SOME))
    assert config.is_int4("model.layers.2.self_attn.o_proj")
    assert not config.is_int4("model.layers.1.self_attn.o_proj")
    assert all(config.has_int4_experts(layer) for layer in (1, 2, 3, 4, 5))
    shutil.rmtree(tmp_path)
