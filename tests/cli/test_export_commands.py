"""`export`, `verify` and `inspect` from the command line: what they print, and one clear error with exit code 2 for wrong use."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quant.exports import digests, expert, write_source

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("commands") / "source")


def test_commands_from_export_to_inspect(
    source: Path,
    tmp_path: Path,
    command_line: Callable[..., Any],
) -> None:
    destination = str(tmp_path / "int4")
    planned = command_line("export", str(source), destination, "--dry-run", "--json")
    assert planned.code == 0
    plan = json.loads(planned.out)
    assert plan["expert_matrices"] == {"trunk": 36, "mtp": 12}
    assert plan["disk"]["enough"]
    assert not Path(destination).exists()
    done = command_line("export", str(source), destination, "--json", "--workers", "2")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bytes_written"] == plan["bytes_written"]
    assert sum(file.stat().st_size for file in Path(destination).glob("*.safetensors")) == plan["bytes_written"]
    again = command_line("export", str(source), destination)
    assert "already: nothing was done" in again.out
    good = command_line("verify", destination, "--source", str(source), "--sample", "9")
    assert good.code == 0
    assert good.out.rstrip().endswith("good")
    shown = command_line("inspect", destination, "--json", "--tensor", expert(1, 0, "gate"))
    assert shown.code == 0
    content = json.loads(shown.out)
    assert content["format"] == "compressed-tensors pack-quantized"
    assert content["quantized_weights"] == 48
    assert sum(content["tensor"]["codes"].values()) == 64 * 96
    assert content["tensor"]["codes"]["-8"] == 0
    for directory in (destination, str(source)):
        assert command_line("inspect", directory, "--tensor", "model.norm.weight").code == 0
    assert command_line("verify", destination, "--sample", "9").code == 2
    (Path(destination) / "tokenizer.json").write_text("other")
    bad = command_line("verify", destination)
    assert bad.code == 1
    assert "WRONG    tokenizer.json does not have the sha256 of the manifest" in bad.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--format", "compressed_tensor"), "did you mean compressed-tensors?"),
        (("--rule", "amax8"), "did you mean amax7"),
        (("--group-size", "48"), "cannot be quantised in groups of 48"),
        (("--group-size", "5"), "multiple of 8"),
        (("--memory", "lots"), "--memory = 'lots' is no size"),
        (("--memory", "1MB"), "give at least"),
        (("--max-shard-size", "0"), "--max-shard-size"),
        (("--mtp", "int8"), "known are int4 and bf16"),
    ],
)
def test_wrong_use_is_one_clear_error_with_exit_2(
    source: Path,
    tmp_path: Path,
    command_line: Callable[..., Any],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    before = digests(source)
    finished = command_line("export", str(source), str(tmp_path / "int4"), *arguments)
    assert finished.code == 2
    assert text in finished.err
    assert "Traceback" not in finished.err
    assert not (tmp_path / "int4").exists()
    assert digests(source) == before


def test_what_is_no_checkpoint(tmp_path: Path, source: Path, command_line: Callable[..., Any]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    half = Path(shutil.copytree(source, tmp_path / "half"))
    (half / "model-00001-of-00003.safetensors").unlink()
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "config.json").write_text('{"model_type": "llama"}')
    for directory, text in ((tmp_path / "none", "not a directory"), (empty, "cannot read"), (half, "missing"), (other, "llama")):
        for command in (
            ("export", str(directory), str(tmp_path / "int4")),
            ("verify", str(directory)),
            ("inspect", str(directory)),
        ):
            finished = command_line(*command)
            assert finished.code in (1, 2), command
            assert text in finished.err + finished.out, command
    assert not (tmp_path / "int4").exists()


def test_dry_run_from_a_config_alone(tmp_path: Path, source: Path, command_line: Callable[..., Any]) -> None:
    config = tmp_path / "config.json"
    shutil.copy(source / "config.json", config)
    finished = command_line("export", str(config), str(tmp_path / "int4"), "--dry-run")
    assert finished.code == 0
    assert "36 + 12 in the MTP layer" in finished.out
    finished = command_line("export", str(config), str(tmp_path / "int4"))
    assert finished.code == 2
    assert "no weights" in finished.err


def test_dry_run_that_does_not_fit_exits_1(
    source: Path,
    tmp_path: Path,
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 10))
    finished = command_line("export", str(source), str(tmp_path / "int4"), "--dry-run")
    assert finished.code == 1
    assert "NOT ENOUGH" in finished.out
