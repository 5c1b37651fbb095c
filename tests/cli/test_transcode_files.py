"""`export` and `transcode` to GGUF and ONNX from the command line, and what `verify` and `inspect` say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm5_port.quant.export import export
from tests.quant.exports import SMALL_SHARDS, digests, expert, write_source


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    export(write_source(root / "source"), root / "canonical", SMALL_SHARDS)
    return root / "canonical"


FORMATS = [("gguf", "model.gguf", 1), ("onnx", "decoder.onnx", 6), ("onnx-float16", "mtp.onnx", 6)]


@pytest.mark.parametrize(("name", "file", "shards"), FORMATS, ids=[f[0] for f in FORMATS])
def test_from_plan_to_inspect(
    canonical: Path, tmp_path: Path, command_line: Callable[..., Any], name: str, file: str, shards: int
) -> None:
    source, there = str(canonical.parent / "source"), str(tmp_path / "out")
    planned = command_line("export", source, there, "--format", name, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert plan["expert_matrices"] == {"trunk": 36, "mtp": 12}
    assert len(plan["shards"]) == shards
    assert plan["disk"]["enough"]
    assert not Path(there).exists()
    done = command_line("export", source, there, "--format", name, "--json", "--workers", "2")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bytes_written"] == plan["bytes_written"]
    assert sum((tmp_path / "out" / shard["file"]).stat().st_size for shard in plan["shards"]) == plan["bytes_written"]
    assert (tmp_path / "out" / file).exists()
    assert "already: nothing was done" in command_line("export", source, there, "--format", name).out
    for compared in (source, str(canonical)):
        assert command_line("verify", there, "--source", compared, "--sample", "40").code == 0
    shown = json.loads(command_line("inspect", there, "--json", "--tensor", expert(1, 0, "gate")).out)
    assert (shown["format"], shown["group_size"], shown["quantized_weights"]) == (name, 32, 48)
    assert sum(shown["tensor"]["codes"].values()) == 64 * 96
    assert command_line("inspect", there, "--tensor", "model.norm.weight").code == 0
    other = command_line("transcode", str(canonical), str(tmp_path / "other"), "--format", name)
    assert other.code == 0, other.err
    assert f"from compressed-tensors to {name}, codes and scales bit for bit" in other.out
    first, second = digests(tmp_path / "out"), digests(tmp_path / "other")
    assert {file for file in first if first[file] != second.get(file)} == {
        "int4_manifest.json",
        "int4_report.json",
        "int4_report.txt",
    }


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_wrong_use(canonical: Path, tmp_path: Path, command_line: Callable[..., Any], name: str) -> None:
    before = digests(canonical)
    source, there = str(canonical.parent / "source"), str(tmp_path / "out")
    for arguments, text in (
        (("transcode", source, there, "--format", name), "is no INT4 checkpoint that can be read"),
        (("export", str(canonical), there, "--format", name), "is INT4 already"),
        (("export", source, there, "--format", name, "--group-size", "8"), "groups of 8"),
        (("export", source, there, "--format", name, "--memory", "1MB"), "give at least"),
    ):
        refused = command_line(*arguments)
        assert refused.code == 2, arguments
        assert text in refused.err
        assert "Traceback" not in refused.err
    assert not Path(there).exists()
    assert digests(canonical) == before


def test_one_tensor_in_two_pieces_is_told(canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    assert command_line("transcode", str(canonical), str(tmp_path / "out"), "--format", "gguf").code == 0
    refused = command_line("inspect", str(tmp_path / "out"), "--tensor", "model.layers.0.self_attn.kv_b_proj.weight")
    assert refused.code == 2
    assert "here it is blk.0.attn_k_b.weight, blk.0.attn_v_b.weight" in refused.err


def test_verify_names_a_part_that_is_not_there(canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    there = tmp_path / "out"
    made = command_line("transcode", str(canonical), str(there), "--format", "gguf", "--max-shard-size", "100kB")
    assert made.code == 0, made.err
    shutil.copytree(there, tmp_path / "less")
    (tmp_path / "less" / "model-00003-of-00006.gguf").unlink()
    found = command_line("verify", str(tmp_path / "less"))
    assert found.code == 1
    assert "WRONG    files: model-00003-of-00006.gguf: missing" in found.out
