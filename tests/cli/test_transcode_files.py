"""`transcode --format gguf|onnx` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm5_port.quant.export import export
from tests.quant.exports import SMALL_SHARDS, write_source


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    export(write_source(root / "source"), root / "canonical", SMALL_SHARDS)
    return root / "canonical"


def test_a_gguf_file(canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    path = tmp_path / "model.gguf"
    done = command_line("transcode", str(canonical), str(path), "--format", "gguf", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bytes_written"] == path.stat().st_size
    assert path.read_bytes()[:4] == b"GGUF"
    written = path.read_bytes()
    again = command_line("transcode", str(canonical), str(path), "--format", "gguf")
    assert again.code != 0
    assert "exists" in again.err
    assert path.read_bytes() == written


def test_onnx_graphs(canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    folder = tmp_path / "graphs"
    done = command_line("transcode", str(canonical), str(folder), "--format", "onnx")
    assert done.code == 0, done.err
    assert "8 files" in done.out
    assert {file.name for file in folder.glob("*.onnx")} == {f"layer_{layer}.onnx" for layer in (1, 2, 3, 4)}
    again = command_line("transcode", str(canonical), str(folder), "--format", "onnx")
    assert again.code != 0
    assert "is not empty" in again.err


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_dry_run_is_refused_and_a_plain_checkpoint_too(
    canonical: Path, tmp_path: Path, command_line: Callable[..., Any], name: str
) -> None:
    planned = command_line("transcode", str(canonical), str(tmp_path / "out"), "--format", name, "--dry-run")
    assert planned.code != 0
    assert f"--dry-run is not there for {name}" in planned.err
    plain = command_line("transcode", str(canonical.parent / "source"), str(tmp_path / "out"), "--format", name)
    assert plain.code != 0
    assert "no INT4 experts" in plain.err
    assert not (tmp_path / "out").exists()
