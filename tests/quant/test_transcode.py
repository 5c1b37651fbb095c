"""Transcoding: the same bytes there and back and as exported directly, foreign checkpoints taken in, faults refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, ExportError, InputError
from glm5_port.quant import int4, writing
from glm5_port.quant.export import export
from glm5_port.quant.formats import find_format
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import pack_int4
from glm5_port.quant.plan import Options
from glm5_port.quant.transcode import plan_transcode, transcode
from glm5_port.quant.verify import verify
from tests.quant.exports import SMALL_SHARDS, change, digests, expert, read_all, write_source
from tests.quant.formats import numbered

RECORDS = {"int4_manifest.json", "int4_report.json", "int4_report.txt"}
"""What tells how a checkpoint was made, not what it holds."""
PER_CHANNEL = Int4Rule("amax7", -1)


def small(name: str) -> Options:
    return Options(format=name, max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("transcode") / "source")


@pytest.fixture(scope="module")
def canonical(source: Path) -> Path:
    export(source, source.parent / "canonical", SMALL_SHARDS)
    return source.parent / "canonical"


def contents(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(directory).items() if name not in RECORDS}


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_there_and_back_gives_identical_bytes(source: Path, canonical: Path, tmp_path: Path, name: str) -> None:
    transcode(canonical, tmp_path / name, small(name), workers=2)
    transcode(tmp_path / name, tmp_path / "back", SMALL_SHARDS, workers=2)
    assert contents(tmp_path / "back") == contents(canonical)
    assert contents(tmp_path / name) != contents(canonical)
    export(source, tmp_path / "direct", small(name))
    assert contents(tmp_path / "direct") == contents(tmp_path / name)
    for directory in (tmp_path / name, tmp_path / "back"):
        assert verify(directory).problems == []
    assert verify(tmp_path / name, canonical).problems == []
    assert verify(tmp_path / "back", tmp_path / name).problems == []
    assert verify(tmp_path / "back", source).problems == []


def test_from_one_foreign_format_to_the_other(canonical: Path, tmp_path: Path) -> None:
    transcode(canonical, tmp_path / "gptq", small("gptq"))
    transcode(tmp_path / "gptq", tmp_path / "awq", small("awq"))
    transcode(canonical, tmp_path / "direct", small("awq"))
    assert contents(tmp_path / "awq") == contents(tmp_path / "direct")


def test_nothing_is_quantised_or_multiplied_out(
    source: Path, canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight became a number")

    for name in ("quantize", "dequantize", "dequantize_packed", "quantize_packed"):
        monkeypatch.setattr(int4, name, refuse)
    for name in ("quantize_measured", "quantize_packed", "quantize_with_scales", "quantize_rows", "dequantize_rows"):
        monkeypatch.setattr(writing, name, refuse)
    with pytest.raises(AssertionError, match="a weight became a number"):
        export(source, tmp_path / "exported")
    transcode(canonical, tmp_path / "gptq", small("gptq"))
    assert verify(tmp_path / "gptq").problems == []


def test_modelslim_from_canonical_is_modelslim_from_bf16(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "canonical", Options(rule=PER_CHANNEL, mtp="bf16"))
    transcode(tmp_path / "canonical", tmp_path / "modelslim", Options(format="modelslim"))
    export(source, tmp_path / "direct", Options(format="modelslim", rule=PER_CHANNEL))
    assert contents(tmp_path / "modelslim") == contents(tmp_path / "direct")


def test_modelslim_refuses_groups_and_an_int4_mtp_layer(canonical: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MTP layer in INT4, and format modelslim has it in bf16 only"):
        transcode(canonical, tmp_path / "modelslim", Options(format="modelslim"))
    export(source, tmp_path / "trunk", Options(mtp="bf16"))
    with pytest.raises(InputError, match="vllm-ascend refuses W4A8"):
        transcode(tmp_path / "trunk", tmp_path / "modelslim", Options(format="modelslim"))
    assert not (tmp_path / "modelslim").exists()


def test_the_manifest_says_where_codes_come_from(canonical: Path, tmp_path: Path) -> None:
    transcode(canonical, tmp_path / "gptq", small("gptq"))
    manifest = json.loads((tmp_path / "gptq" / "int4_manifest.json").read_text())
    assert (manifest["format"], manifest["codes_from"], manifest["rule_known"]) == ("gptq", "compressed-tensors", True)
    assert (manifest["rule"]["name"], manifest["rule"]["group_size"]) == ("amax7", 32)
    assert manifest["expert_matrices"] == {"trunk": 36, "mtp": 12}
    entry = manifest["tensors"]["model.layers.1.mlp.experts.0.gate_proj.qweight"]
    assert (entry["action"], entry["from"]) == ("repack", expert(1, 0, "gate"))


# --- checkpoints of others -------------------------------------------------------------------------------------------------


def foreign(canonical: Path, directory: Path, block: dict[str, Any], make: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
    """A checkpoint of somebody else: no manifest, a block as others write it, codes that no rule of ours gives. What it means:
    weight -> (codes, scales)."""
    shutil.copytree(canonical, directory)
    for name in RECORDS:
        (directory / name).unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    meant: dict[str, Any] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".weight_packed")]:
            name = key.removesuffix("_packed")
            outputs, inputs = tensors[name + "_shape"].tolist()
            for part in ("_packed", "_scale", "_shape"):
                del tensors[name + part]
            meant[name] = numbered(outputs, inputs, inputs // 32)
            tensors |= make(name, *meant[name])

    change(directory, edit)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    placed = {}
    for file in sorted(set(index["weight_map"].values())):
        header = (directory / file).read_bytes()
        names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        placed |= {name: file for name in names if name != "__metadata__"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return meant


def check_taken_in(directory: Path, meant: dict[str, Any]) -> None:
    written = read_all(directory)
    assert len(meant) == 48
    for name, (codes, scales) in meant.items():
        assert torch.equal(written[name + "_packed"], pack_int4(codes)), name
        assert torch.equal(written[name + "_scale"], scales), name
        assert written[name + "_shape"].tolist() == list(codes.shape)
    manifest = json.loads((directory / "int4_manifest.json").read_text())
    assert not manifest["rule_known"]
    assert manifest["rule"]["rounding"].startswith("not known")
    assert verify(directory).problems == []


KIMI = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_kimi_style_checkpoint_is_taken_in(canonical: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def make(name: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        shape = torch.tensor(codes.shape, dtype=dtype)
        return {name + "_packed": pack_int4(codes), name + "_scale": scales, name + "_shape": shape}

    meant = foreign(canonical, tmp_path / "kimi", KIMI, make)
    made = transcode(tmp_path / "kimi", tmp_path / "ours", SMALL_SHARDS)
    assert any("not known" in note for note in made.plan.notes)
    check_taken_in(tmp_path / "ours", meant)
    assert verify(tmp_path / "ours", tmp_path / "kimi").problems == []


@pytest.mark.parametrize(("version", "zero"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888 - 2**32)])
def test_a_gptq_checkpoint_of_somebody_else_is_taken_in(canonical: Path, tmp_path: Path, version: str, zero: int) -> None:
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": version}

    def make(name: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        parts = find_format("gptq").encode(name, pack_int4(codes), scales)
        return {key: torch.full_like(part, zero) if key.endswith("qzeros") else part for key, part in parts.items()}

    meant = foreign(canonical, tmp_path / "gptq", block, make)
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(block))
    transcode(tmp_path / "gptq", tmp_path / "ours", SMALL_SHARDS)
    check_taken_in(tmp_path / "ours", meant)
    assert not (tmp_path / "ours" / "quantize_config.json").exists()


def test_a_gptq_scale_that_bfloat16_does_not_hold_is_refused(canonical: Path, tmp_path: Path) -> None:
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}

    def make(name: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        parts = find_format("gptq").encode(name, pack_int4(codes), scales)
        if name == expert(2, 3, "down"):
            parts[name.removesuffix("weight") + "scales"][1, 2] = 1.0009765625  # 11 bits of mantissa
        return parts

    foreign(canonical, tmp_path / "gptq", block, make)
    with pytest.raises(
        InputError, match=rf"{expert(2, 3, 'down')}: 1 of \d+ scales are not exact in bfloat16.*\[2, 1\] = 1\.00097"
    ):
        transcode(tmp_path / "gptq", tmp_path / "ours", SMALL_SHARDS)


# --- wrong use -------------------------------------------------------------------------------------------------------------


def test_half_a_checkpoint_is_refused_before_anything_is_written(canonical: Path, tmp_path: Path) -> None:
    shutil.copytree(canonical, tmp_path / "half")
    name = expert(1, 2, "up") + "_scale"
    change(tmp_path / "half", lambda tensors: tensors.pop(name, None))
    with pytest.raises(CheckpointError, match=rf"is not whole, so nothing is written\n(.*\n)*.*{name}"):
        transcode(tmp_path / "half", tmp_path / "gptq", small("gptq"))
    assert not (tmp_path / "gptq").exists()


def test_a_bf16_checkpoint_and_other_methods_are_refused(source: Path, canonical: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no INT4 checkpoint that can be read"):
        plan_transcode(source, small("gptq"))
    shutil.copytree(canonical, tmp_path / "other")
    config = json.loads((canonical / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a quantization_config of compressed-tensors, gptq, awq"):
        plan_transcode(tmp_path / "other", small("gptq"))


def test_the_source_and_other_output_stay_untouched(canonical: Path, tmp_path: Path) -> None:
    before = digests(canonical)
    with pytest.raises(ExportError, match="lies in the source"):
        transcode(canonical, canonical / "gptq", small("gptq"))
    transcode(canonical, tmp_path / "gptq", small("gptq"))
    written = digests(tmp_path / "gptq")
    with pytest.raises(ExportError, match="a finished export of something else"):
        transcode(canonical, tmp_path / "gptq", small("awq"))
    assert transcode(canonical, tmp_path / "gptq", small("gptq")).workers == 0
    assert digests(tmp_path / "gptq") == written
    assert digests(canonical) == before


def test_a_broken_run_goes_on_where_it_was(canonical: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, _: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transcode(canonical, tmp_path / "gptq", small("gptq"), progress=stop)
    assert not (tmp_path / "gptq" / "config.json").exists()
    assert transcode(canonical, tmp_path / "gptq", small("gptq")).resumed > 0
    transcode(canonical, tmp_path / "again", small("gptq"))
    assert digests(tmp_path / "gptq") == digests(tmp_path / "again")


def test_parts_may_lie_in_different_files(canonical: Path, tmp_path: Path) -> None:
    """Nobody promises that the parts of a weight share a file; a changed file is noticed wherever it is."""
    shutil.copytree(canonical, tmp_path / "apart")
    index = json.loads((canonical / "model.safetensors.index.json").read_text())
    *_, last = sorted(set(index["weight_map"].values()))
    moved: dict[str, Tensor] = {}
    name = expert(1, 0, "gate") + "_scale"
    assert index["weight_map"][name] != last

    def take(tensors: dict[str, Tensor]) -> None:
        moved.update({key: tensors.pop(key) for key in [key for key in tensors if key == name]})

    change(tmp_path / "apart", take)
    change(tmp_path / "apart", lambda tensors: tensors.update(moved), last)
    index["weight_map"][name] = last
    (tmp_path / "apart" / "model.safetensors.index.json").write_text(json.dumps(index))
    for record in RECORDS:
        (tmp_path / "apart" / record).unlink()
    plan = plan_transcode(tmp_path / "apart", small("gptq"))
    (tensor,) = (tensor for tensor in plan.tensors if tensor.name == expert(1, 0, "gate"))
    assert tensor.files == {index["weight_map"][expert(1, 0, "gate") + "_packed"], last}
    transcode(tmp_path / "apart", tmp_path / "gptq", small("gptq"))
    transcode(canonical, tmp_path / "direct", small("gptq"))
    assert contents(tmp_path / "gptq") == contents(tmp_path / "direct")
