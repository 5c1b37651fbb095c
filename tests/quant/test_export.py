"""Exports: codes and scales against exact arithmetic, everything else byte for byte, the same bytes for any number of workers, a
memory bound that is measured, and what compressed-tensors and transformers make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from glm5_port.errors import ExportError, InputError
from glm5_port.model.block_fp8 import dequantize_rows
from glm5_port.quant.export import export
from glm5_port.quant.files import as_bytes
from glm5_port.quant.int4 import Int4Rule, dequantize
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from glm5_port.quant.verify import verify
from tests.model import checkpoint_files
from tests.quant.exports import SMALL_SHARDS, digests, expert, plain_quantize, read_all, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("bf16") / "source")


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    destination = source.parent / "int4"
    export(source, destination, SMALL_SHARDS, workers=2)
    return destination


def test_experts_are_quantised_exactly_and_everything_else_is_carried(source: Path, exported: Path) -> None:
    given, written = read_all(source), read_all(exported)
    experts = 0
    for name, tensor in given.items():
        if ".mlp.experts." not in name:
            assert torch.equal(written.pop(name), tensor), name
            assert written.get(name) is None
            continue
        experts += 1
        codes, scales = plain_quantize(tensor)
        assert torch.equal(unpack_int4(written.pop(name + "_packed")), codes), name
        stored = written.pop(name + "_scale")
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, scales), name
        shape = written.pop(name + "_shape")
        assert shape.dtype == torch.int32
        assert shape.tolist() == list(tensor.shape)
    assert experts == 3 * 12 + 12
    assert not written


def test_nothing_of_the_source_changes_and_its_other_files_are_copied(source: Path, exported: Path, tmp_path: Path) -> None:
    before = digests(source)
    export(source, tmp_path / "int4")
    assert digests(source) == before
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((exported / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    weights = block["config_groups"]["group_0"]["weights"]
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "pack-quantized")
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"], weights["strategy"]) == (4, 32, True, "group")


def test_index_and_manifest_tell_every_byte(source: Path, exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    manifest = json.loads((exported / "int4_manifest.json").read_text())
    written = read_all(exported)
    assert set(index["weight_map"]) == set(written) == set(manifest["tensors"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert set(manifest["files"]) | {"int4_manifest.json"} == {file.name for file in exported.iterdir()}
    assert all(
        manifest["files"][name]["sha256"] == digest for name, digest in digests(exported).items() if name in manifest["files"]
    )
    read = read_all(source)
    for name, entry in manifest["tensors"].items():
        assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(as_bytes(written[name])), name
        assert entry["source_xxh3_128"] == xxhash.xxh3_128_hexdigest(as_bytes(read[entry["from"]])), name
    assert manifest["rule"]["name"] == "amax7"
    assert manifest["expert_matrices"] == {"trunk": 36, "mtp": 12}
    assert str(exported.parent) not in (exported / "int4_manifest.json").read_text()


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_any_number_of_workers_writes_the_same_bytes(source: Path, exported: Path, tmp_path: Path, workers: int) -> None:
    made = export(source, tmp_path / "int4", SMALL_SHARDS, workers=workers, memory=4 * 2**30)
    assert made.workers == workers
    assert digests(tmp_path / "int4") == digests(exported)


def test_a_second_run_finds_everything_done(source: Path, exported: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in exported.iterdir()}
    assert export(source, exported, SMALL_SHARDS).report is None
    assert {file.name: file.stat().st_mtime_ns for file in exported.iterdir()} == before


def test_block_fp8_is_multiplied_out_first(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", fp8=True)
    export(source, tmp_path / "int4", SMALL_SHARDS)
    given, written = read_all(source), read_all(tmp_path / "int4")
    name = expert(2, 1, "down")
    weight = dequantize_rows(given[name], given[name + "_scale_inv"], (128, 128), torch.bfloat16)
    codes, scales = plain_quantize(weight)
    assert torch.equal(unpack_int4(written[name + "_packed"]), codes)
    assert torch.equal(written[name + "_scale"], scales)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(written[name], dequantize_rows(given[name], given[name + "_scale_inv"], (128, 128), torch.bfloat16))
    assert not any(key.endswith("_scale_inv") for key in written)
    assert not verify(tmp_path / "int4", source).problems


def test_an_fp8_matrix_of_several_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_port.quant import writing

    changes: dict[str, Any] = {"hidden_size": 160, "moe_intermediate_size": 416, "n_routed_experts": 2}
    source = write_source(tmp_path / "source", fp8=True, **changes)
    export(source, tmp_path / "whole")
    monkeypatch.setattr(writing, "BLOCK_WEIGHTS", 1)  # 128 rows at a time: the height of a block
    export(source, tmp_path / "blocks")
    assert [d for n, d in digests(tmp_path / "blocks").items() if n.startswith("model-")] == [
        d for n, d in digests(tmp_path / "whole").items() if n.startswith("model-")
    ]


def test_other_rules_groups_and_float32_sources(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", dtype="float32")
    for rule in (Int4Rule("amax7", -1), Int4Rule("signed8", 16), Int4Rule("mse", 32)):
        destination = tmp_path / f"{rule.name}{rule.group_size}"
        export(source, destination, Options(rule=rule))
        found = verify(destination, source)
        assert not found.problems
        manifest = json.loads((destination / "int4_manifest.json").read_text())
        assert (manifest["rule"]["name"], manifest["rule"]["group_size"]) == (rule.name, rule.group_size)


@pytest.mark.parametrize("include", [(), ("shared_experts",)])
def test_mtp_layer_as_it_was(source: Path, tmp_path: Path, include: tuple[str, ...]) -> None:
    """Whatever patterns find in it."""
    export(source, tmp_path / "int4", Options(mtp="bf16", include=include))
    given, written = read_all(source), read_all(tmp_path / "int4")
    mtp = [name for name in given if name.startswith("model.layers.4.")]
    assert mtp
    assert all(torch.equal(given[name], written[name]) for name in mtp)
    assert not verify(tmp_path / "int4", source).problems


def test_unknown_tensors_are_carried_unchanged(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=1)
    from safetensors.torch import save_file

    strangers = {"model.extra.table": torch.arange(5, dtype=torch.int64), "flags": torch.tensor([True, False])}
    save_file({**read_all(source), **strangers}, source / "model.safetensors")
    made = export(source, tmp_path / "int4")
    written = read_all(tmp_path / "int4")
    assert all(torch.equal(written[name], tensor) for name, tensor in strangers.items())
    assert any("2 tensors are not known here" in note for note in made.plan.notes)
    assert not verify(tmp_path / "int4", source).problems


def test_report_counts_what_is_there(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=1)
    from safetensors.torch import save_file

    tensors = read_all(source)
    odd = tensors[expert(1, 0, "up")]
    odd[0, :32] = 0.0
    odd[1, :32] = 1e-38
    odd[2, :32] = 1e-9  # below what float16 holds
    save_file(tensors, source / "model.safetensors")
    report = export(source, tmp_path / "int4").report
    assert report is not None
    layer = next(entry for entry in report["layers"] if entry["layer"] == 1)
    assert (layer["zero_groups"], layer["tiny_groups"], layer["fp16_unsafe_scales"], layer["unstable_groups"]) == (1, 1, 1, 0)
    assert layer["matrices"] == 12
    names = [expert(1, number, p) for number in range(4) for p in ("gate", "up", "down")]
    errors = magnitudes = at_limit = count = 0.0
    for name in names:
        codes, scales = plain_quantize(tensors[name]) if name != expert(1, 0, "up") else (None, None)
        written = read_all(tmp_path / "int4")
        codes, scales = unpack_int4(written[name + "_packed"]), written[name + "_scale"]
        wide = tensors[name].double()
        errors += float((wide - dequantize(codes, scales).double()).abs().sum())
        magnitudes += float(wide.abs().sum())
        at_limit += float((codes.abs() == 7).sum())
        count += codes.numel()
    assert layer["mean_relative_error"] == pytest.approx(errors / magnitudes, rel=1e-5)
    assert layer["codes_at_limit"] == at_limit / count
    assert 0.06 < layer["max_relative_error"] < 0.08  # half a step of 1/7
    text = (tmp_path / "int4" / "int4_report.txt").read_text()
    assert "4 (MTP)" in text


MEASURE = """
import sys
from glm5_port.quant.export import export
from glm5_port.quant.files import as_bytes
from glm5_port.quant.plan import Options
from glm5_port.quant.transcode import is_int4, transcode
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    run = transcode if is_int4(sys.argv[1]) else export
    made = run(sys.argv[1], sys.argv[2], Options(sys.argv[5]), memory=int(sys.argv[3]), workers=int(sys.argv[4]))
except Exception as error:
    print(error); sys.exit(3)
print(before, peak(), made.workers)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx"])
def test_memory_stays_within_the_bound_with_tensors_larger_than_it(tmp_path: Path, name: str) -> None:
    # experts of 256 MiB and an embedding of 768 MiB, in a process that takes about 300 MiB before it begins
    changes: dict[str, Any] = {"hidden_size": 4096, "moe_intermediate_size": 32768, "n_routed_experts": 2, "vocab_size": 98304,
                               "num_hidden_layers": 2, "indexer_types": ["full", "full"], "intermediate_size": 64}  # fmt: skip
    source = _write_big(tmp_path / "source", changes)
    peak = _peak_within(source, tmp_path / "out", 640 * 2**20, name)
    assert peak < 98304 * 4096 * 2
    if name == "compressed-tensors":
        for other in ("gguf", "onnx"):
            _peak_within(tmp_path / "out", tmp_path / other, 640 * 2**20, other)


def _peak_within(source: Path, destination: Path, bound: int, name: str) -> int:
    """Peak memory of an export, or of a transcoding, by two workers in a process of its own; at most the bound."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(destination), str(bound), "2", name],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    before, peak, workers = map(int, run.stdout.split())
    print(
        f"{name}: before {before / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB, {workers} workers"
    )
    assert peak <= bound
    assert workers == 2
    return peak


def _write_big(directory: Path, changes: dict[str, Any]) -> Path:
    """A checkpoint of zeros but for one row each, written without holding it."""
    from glm5_port.config import Glm5Config
    from glm5_port.model.tensors import expected_tensors

    directory.mkdir()
    fields = {**checkpoint_files.SMALL, **changes, "num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(fields))
    entries: dict[str, Any] = {}
    end = 0
    for name, spec in expected_tensors(Glm5Config.from_dict(fields), mtp=False).items():
        wide = spec.kind == "float32"
        size = torch.Size(spec.shape).numel() * (4 if wide else 2)
        entries[name] = {"dtype": "F32" if wide else "BF16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)  # a sparse file: zeros that take no room
    return directory


def test_too_little_memory_is_one_clear_error_and_fewer_workers_run_where_all_do_not_fit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give at least \d"):
        export(source, tmp_path / "int4", memory=64 * 2**20)
    assert not (tmp_path / "int4").exists()


def test_int4_source_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="INT4 already"):
        export(exported, tmp_path / "again")


def test_destinations_that_are_refused(source: Path, exported: Path, tmp_path: Path) -> None:
    before = digests(source), digests(exported)
    with pytest.raises(ExportError, match="never written to"):
        export(source, source)
    with pytest.raises(ExportError, match="never written to"):
        export(source, source / "int4")
    with pytest.raises(ExportError, match="a finished export of something else"):
        export(source, exported, Options(mtp="bf16"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds other files: thesis.txt"):
        export(source, tmp_path / "full")
    with pytest.raises(ExportError, match="is a file"):
        export(source, tmp_path / "full" / "thesis.txt")
    assert (digests(source), digests(exported)) == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


# --- outside judges --------------------------------------------------------------------------------------------------------


def test_compressed_tensors_decompresses_to_our_values(source: Path, exported: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    block = json.loads((exported / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(block).config_groups["group_0"]
    judge = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    written = read_all(exported)
    names = [name.removesuffix("_packed") for name in written if name.endswith("_packed")]
    assert len(names) == 48
    for name in names:
        parts = {f"weight{part}": written[name + part] for part in ("_packed", "_scale", "_shape")}
        value = judge.decompress(parts, scheme)["weight"]
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, dequantize(unpack_int4(parts["weight_packed"]), parts["weight_scale"])), name
