"""`transcode`, and `export` in other formats, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm5_port.quant.export import export
from tests.quant.exports import SMALL_SHARDS, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("transcode") / "source")


@pytest.fixture(scope="module")
def canonical(source: Path) -> Path:
    export(source, source.parent / "canonical", SMALL_SHARDS)
    return source.parent / "canonical"


def test_the_command(canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    destination = str(tmp_path / "gptq")
    planned = command_line("transcode", str(canonical), destination, "--format", "gptq", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    assert plan["expert_matrices"] == {"trunk": 36, "mtp": 12}
    assert not Path(destination).exists()
    assert "repack" in command_line("transcode", str(canonical), destination, "--format", "gptq", "--dry-run").out
    done = command_line("transcode", str(canonical), destination, "--format", "gptq")
    assert done.code == 0, done.err
    assert "from compressed-tensors to gptq, codes and scales bit for bit" in done.out
    assert sum(file.stat().st_size for file in Path(destination).glob("*.safetensors")) == plan["bytes_written"]
    again = command_line("transcode", str(canonical), destination, "--format", "gptq", "--json")
    assert json.loads(again.out)["workers"] == 0
    assert command_line("verify", destination, "--source", str(canonical)).code == 0


def test_wrong_use_of_the_command(source: Path, canonical: Path, tmp_path: Path, command_line: Callable[..., Any]) -> None:
    def refused(*arguments: str) -> str:
        result = command_line(*arguments)
        assert result.code == 2, result.out
        assert result.err.count("Traceback") == 0
        return str(result.err)

    there = str(tmp_path / "out")
    assert "did you mean gptq?" in refused("transcode", str(canonical), there, "--format", "gtpq")
    assert "did you mean modelslim?" in refused("export", str(source), there, "--format", "model-slim")
    assert "is no INT4 checkpoint" in refused("transcode", str(source), there, "--format", "gptq")
    assert "is INT4 already" in refused("export", str(canonical), there, "--format", "gptq")
    assert "not groups of 32" in refused("export", str(source), there, "--format", "modelslim")
    assert "groups of 24" in refused("export", str(source), there, "--format", "awq", "--group-size", "24")
    assert not Path(there).exists()
