"""A model trained aware of INT4, written as what it computed with; learned scales included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.errors import ExportError, InputError
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.save import save_checkpoint
from glm5_port.quant.export import export
from glm5_port.quant.int4 import Int4Rule, quantize
from glm5_port.quant.model_export import export_model
from glm5_port.quant.plan import Options
from glm5_port.quant.qat import canonical_tensors, prepare_qat, requantise, scale_parameters
from glm5_port.quant.transcode import transcode
from glm5_port.quant.verify import verify
from tests.model.hugging_face import make
from tests.model.int4_checkpoints import int4_source
from tests.quant.exports import change, digests, read_all

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
PATTERNS = (r"self_attn\.(q_a|kv_b)_proj", r"layers\.2\.self_attn\.o_proj", r"indexer\.wq_b")


def trained(source: Path, *, learned: bool, steps: int = 2, mtp: bool = True, **options: Any) -> Glm5Model:
    """Prepared, trained for some steps with large ones for the scales, and evaluated once more."""
    model = glm5_port.load(source, backend="cpu", dtype="float32", trainable=True, mtp=mtp)
    prepare_qat(model, learned_scales=learned, **{"patterns": PATTERNS, **options})
    scales = set(scale_parameters(model))
    others = [p for p in model.parameters() if p.requires_grad and p not in scales]
    groups = [{"params": others, "lr": 1e-3}] + ([{"params": list(scales), "lr": 2e-3}] if learned else [])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(steps):
        loss = model(TOKENS).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    requantise(model)
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = int4_source(tmp_path_factory.mktemp("model") / "source")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def learned(source: Path) -> Glm5Model:
    return trained(source, learned=True)


@pytest.fixture
def exported(learned: Glm5Model, tmp_path: Path) -> Path:
    """With its masters beside it."""
    export_model(learned, tmp_path / "int4")
    save_checkpoint(learned, tmp_path / "masters", dtype="bfloat16")
    return tmp_path / "int4"


def test_the_bytes_are_those_of_the_last_forward_pass(learned: Glm5Model, exported: Path) -> None:
    stored, computed = read_all(exported), dict(canonical_tensors(learned))
    parts = {name: tensor for name, tensor in stored.items() if name.endswith(("_packed", "_scale", "_shape"))}
    assert same(parts, computed)
    masters = read_all(exported.parent / "masters")
    assert all(torch.equal(stored[name], masters[name]) for name in stored.keys() - computed.keys())
    by_rule = {name: quantize(masters[name]).scales for name in masters if f"{name}_scale" in stored}
    changed = [name for name, scales in by_rule.items() if not torch.equal(scales, stored[f"{name}_scale"])]
    assert len(changed) > len(by_rule) / 2, "the scales were trained, so that no rule gives them"


def test_it_is_loaded_and_computes_what_was_trained(learned: Glm5Model, exported: Path) -> None:
    model = glm5_port.load(exported, backend="cpu", dtype="float32")
    exact = glm5_port.load(exported.parent / "masters", backend="cpu", dtype="float32")
    with torch.no_grad():
        ours, theirs, masters = model(TOKENS), learned(TOKENS), exact(TOKENS)
    # Tensors that are not INT4 are rounded to bfloat16 when they are written.
    assert (ours - theirs).abs().mean() < (masters - theirs).abs().mean() / 3
    assert {s.operator for s in model.decisions()} >= {"expert_mlp_int4", "int4_matmul"}


def test_in_float32_the_logits_are_those_of_training(learned: Glm5Model, tmp_path: Path) -> None:
    export_model(learned, tmp_path / "int4", dtype="float32")
    model = glm5_port.load(tmp_path / "int4", backend="cpu")
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert (model(TOKENS) - learned(TOKENS)).abs().max() < 2e-5


def test_verify_makes_codes_again_from_masters_and_stored_scales(exported: Path) -> None:
    found = verify(exported, exported.parent / "masters")
    assert found.problems == []
    assert any("made again" in line for line in found.checked)
    manifest = json.loads((exported / "int4_manifest.json").read_text())
    assert manifest["rule"]["name"] == "learned"
    assert manifest["source"] == {"model": "Glm5Model in memory"}
    assert any("q_a_proj" in pattern and r"\d+" in pattern for pattern in manifest["include"])
    assert any(r"layers\.2\.self_attn\.o_proj" in pattern for pattern in manifest["include"])


def test_what_verify_sees(learned: Glm5Model, exported: Path) -> None:
    """Without the manifest's hashes too: they would hide whether the recomputation sees anything."""
    weight = "model.layers.2.mlp.experts.1.up_proj.weight"
    (exported / "int4_manifest.json").rename(exported.parent / "manifest")
    manifest = json.loads((exported.parent / "manifest").read_text())
    untouched = {file.name: file.read_bytes() for file in exported.iterdir()}

    def problems(name: str, edit: Any) -> str:
        for file, data in untouched.items():
            (exported / file).write_bytes(data)
        change(exported, lambda tensors: tensors.update({name: edit(tensors[name])}) if name in tensors else None)
        fresh = manifest | {"files": {}}
        (exported / "int4_manifest.json").write_text(json.dumps(fresh))
        return "\n".join(verify(exported, exported.parent / "masters").problems)

    assert problems(f"{weight}_packed", lambda t: t) == ""
    assert f"{weight}_packed is not what the source gives" in problems(f"{weight}_packed", lambda t: t ^ 1)
    assert f"{weight}_packed is not what the source gives" in problems(f"{weight}_scale", lambda t: t.roll(1, 0))
    assert f"{weight}: 64 scales that are not positive" in problems(f"{weight}_scale", lambda t: -t)
    row = torch.tensor([5])
    assert f"{weight}: 2 scales that are NaN" in problems(f"{weight}_scale", lambda t: t.index_fill(0, row, torch.nan))
    assert "not what the source gives" in problems("model.norm.weight", lambda t: t * 2)


RULES: dict[str, dict[str, Any]] = {
    "experts_and_patterns": {},
    "mtp_not_loaded": {"patterns": (), "mtp": False},
    "experts_by_pattern": {"experts": False, "patterns": (r"mlp\.experts\.\d+\.(gate|up|down)_proj",)},
    "some_layers": {"experts": False, "patterns": (r"layers\.[13]\.mlp\.experts", "shared_experts")},
    "mse_per_channel": {"patterns": (), "rule": Int4Rule("mse", group_size=-1)},
}


@pytest.mark.parametrize("case", RULES)
def test_scales_of_a_rule_give_the_bytes_of_an_export_of_the_masters(source: Path, tmp_path: Path, case: str) -> None:
    """Weights, config.json and index alike; the manifest says where each came from."""
    model = trained(source, learned=False, steps=1, **RULES[case])
    plan = export_model(model, tmp_path / "ours", max_shard_bytes=100_000)
    save_checkpoint(model, tmp_path / "masters", dtype="bfloat16")
    export(tmp_path / "masters", tmp_path / "theirs", plan.options)
    ours, theirs = digests(tmp_path / "ours"), digests(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    # The report of an export also tries whether values are stable when they are quantised again.
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing <= {"int4_manifest.json", "int4_report.json", "int4_report.txt"}
    assert len([name for name in ours if name.endswith(".safetensors")]) > 1
    assert verify(tmp_path / "ours", tmp_path / "masters").problems == []
    reports = [json.loads((tmp_path / kind / "int4_report.json").read_text())["total"] for kind in ("ours", "theirs")]
    assert reports[0]["mean_relative_error"] == pytest.approx(reports[1]["mean_relative_error"])
    assert reports[0]["mean_relative_error"] > 0.01


def test_a_model_of_transformers(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", seed=1, q_lora_rank=64)
    prepare_qat(model, patterns=["q_b_proj"], learned_scales=True)
    with torch.no_grad():
        for scales in scale_parameters(model):
            scales.mul_(1.3)
        logits = model(TOKENS).logits
    export_model(model, tmp_path / "int4", source=tmp_path / "hf")
    parts = {name: tensor for name, tensor in read_all(tmp_path / "int4").items() if f"{name}".endswith(("_packed", "_scale"))}
    assert same(parts, {name: tensor for name, tensor in canonical_tensors(model) if not name.endswith("_shape")})
    ours = glm5_port.load(tmp_path / "int4", backend="cpu", dtype="float32", latent_norm_eps=1e-6)
    with torch.no_grad():
        assert (ours(TOKENS) - logits).abs().max() < 1e-4


def test_learned_scales_are_carried_into_other_formats(exported: Path, tmp_path: Path) -> None:
    transcode(exported, tmp_path / "other", Options(format="gptq"))
    found = verify(tmp_path / "other", exported)
    assert found.problems == []
    assert json.loads((tmp_path / "other" / "int4_manifest.json").read_text())["rule"]["name"] == "learned"


# -- what is refused ---------------------------------------------------------------------------------------------------------


def test_masters_that_moved_after_the_last_forward_pass(source: Path, tmp_path: Path) -> None:
    model = trained(source, learned=True, steps=1)
    with torch.no_grad():
        scale_parameters(model)[3].mul_(1.5)
    with pytest.raises(InputError, match=r"changed after the last forward pass.*\n.*requantise"):
        export_model(model, tmp_path / "int4")
    requantise(model)
    export_model(model, tmp_path / "int4")
    with pytest.raises(ExportError, match="is there already"):
        export_model(model, tmp_path / "int4")


def test_a_model_that_is_not_prepared(source: Path, tmp_path: Path) -> None:
    model = glm5_port.load(source, backend="cpu", dtype="float32", trainable=True)
    with pytest.raises(InputError, match="not prepared"):
        export_model(model, tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


def test_learned_scales_cannot_be_made_from_weights(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"learned scales cannot be made from weights.*\n.*export_model"):
        export(source, tmp_path / "int4", Options(rule=Int4Rule("learned")))
    assert not (tmp_path / "int4").exists()
