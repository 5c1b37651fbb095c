"""An export that is killed at any point goes on, and gives the bytes of one that was not. The kills are real: SIGKILL, at a given
call of a given function of the operating system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from glm5_port.errors import ExportError
from glm5_port.quant.export import export
from glm5_port.quant.journal import JOURNAL, Journal
from glm5_port.quant.plan import Options
from tests.quant.exports import SMALL_SHARDS, change, digests, write_source

KILLED = """
import itertools, os, signal, sys
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options

source, destination, function, number, when, workers, kill, name = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell put into the background inherit it as ignored
real, calls = getattr(os, function), itertools.count(1)

def fatal(*arguments):
    call = next(calls)  # one step, also where several threads call
    if call == int(number) and when == "before":
        os.kill(os.getpid(), int(kill))
    result = real(*arguments)
    if call == int(number) and when == "after":
        os.kill(os.getpid(), int(kill))
    return result

setattr(os, function, fatal)
export(source, destination, Options(name, max_shard_bytes=100_000), workers=int(workers))
"""


def run_until(
    source: Path,
    destination: Path,
    function: str,
    number: int,
    when: str,
    workers: int = 1,
    kill: int = signal.SIGKILL,
    name: str = SMALL_SHARDS.format,
) -> int:
    """Exports in another process that kills itself; its exit code."""
    arguments = [str(source), str(destination), function, str(number), when, str(workers), str(int(kill)), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode in (0, -kill), run.stderr
    return run.returncode


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, str]:
    """The bytes of an export that nothing disturbed."""
    export(source, source.parent / "whole", SMALL_SHARDS)
    return digests(source.parent / "whole")


POINTS = [
    ("write", 1, "after"),  # the journal's first line is written, nothing else
    ("pwrite", 1, "before"),  # an empty first shard
    ("pwrite", 60, "after"),  # in the middle of a shard
    ("replace", 1, "before"),  # a shard is whole and has no name yet
    ("replace", 1, "after"),  # it has its name and no line in the journal
    ("write", 2, "after"),  # it has its line, which is not synced yet
    ("replace", 4, "before"),  # several shards are done
    ("replace", 6, "after"),  # the last files: copies and reports
    ("unlink", 1, "before"),  # everything is there but the journal is not gone
]
LATER_POINTS = [
    ("pwrite", 130, "after"),  # rows of an expert, between those of another in ONNX
    ("replace", 9, "before"),  # between the last shard and the last file
    ("replace", 10, "after"),
]
OTHER_FILES = ("gguf", "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("function", "number", "when"), POINTS)
def test_killed_and_resumed_gives_the_same_bytes(
    source: Path, whole: dict[str, str], tmp_path: Path, function: str, number: int, when: str
) -> None:
    before = digests(source)
    destination = tmp_path / "int4"
    assert run_until(source, destination, function, number, when) == -signal.SIGKILL
    assert not (destination / "int4_manifest.json").exists() or (destination / JOURNAL).exists()  # it does not look finished
    made = export(source, destination, SMALL_SHARDS, workers=3)
    assert made.report is not None
    assert digests(destination) == whole
    assert digests(source) == before


def test_killed_with_two_workers_and_again_while_it_goes_on(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    destination = tmp_path / "int4"
    assert run_until(source, destination, "pwrite", 150, "after", workers=2) == -signal.SIGKILL
    assert run_until(source, destination, "replace", 2, "after", workers=2) == -signal.SIGKILL
    made = export(source, destination, SMALL_SHARDS)
    assert made.resumed >= 1
    assert digests(destination) == whole


@pytest.fixture(scope="module")
def whole_of(source: Path) -> dict[str, dict[str, str]]:
    """The same in the formats of other files: parts of GGUF, and data files and graphs of ONNX."""
    for name in OTHER_FILES:
        export(source, source.parent / name, replace(SMALL_SHARDS, format=name))
    return {name: digests(source.parent / name) for name in OTHER_FILES}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_resumed_too(source: Path, whole_of: dict[str, dict[str, str]], tmp_path: Path, name: str) -> None:
    destination = tmp_path / "out"
    assert run_until(source, destination, "replace", 3, "after", workers=2, name=name) == -signal.SIGKILL
    made = export(source, destination, replace(SMALL_SHARDS, format=name), workers=2)
    assert made.resumed >= 1
    assert digests(destination) == whole_of[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize(("function", "number", "when"), [*POINTS, *LATER_POINTS])
def test_other_files_are_resumed_from_any_point(
    source: Path, whole_of: dict[str, dict[str, str]], tmp_path: Path, name: str, function: str, number: int, when: str
) -> None:
    destination = tmp_path / "out"
    assert run_until(source, destination, function, number, when, name=name) == -signal.SIGKILL
    assert not (destination / "int4_manifest.json").exists() or (destination / JOURNAL).exists()
    made = export(source, destination, replace(SMALL_SHARDS, format=name), workers=3)
    assert made.report is not None
    assert digests(destination) == whole_of[name]


def test_interrupted_by_hand_leaves_no_half_files_and_goes_on(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    destination = tmp_path / "int4"
    assert run_until(source, destination, "pwrite", 150, "after", workers=2, kill=signal.SIGINT) == -signal.SIGINT
    assert not list(destination.glob("*.part"))
    assert not (destination / "config.json").exists()
    export(source, destination, SMALL_SHARDS)
    assert digests(destination) == whole


def unfinished(source: Path, destination: Path) -> None:
    """An export that stopped after some shards."""
    assert run_until(source, destination, "replace", 3, "after") == -signal.SIGKILL


@pytest.fixture(scope="module")
def stopped(source: Path, whole: dict[str, str]) -> Path:
    unfinished(source, source.parent / "stopped")
    return source.parent / "stopped"


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def test_finished_shards_are_not_written_again(source: Path, copy: Path, whole: dict[str, str]) -> None:
    first = copy / "model-00001-of-00005.safetensors"
    before = first.stat().st_mtime_ns
    made = export(source, copy, SMALL_SHARDS)
    assert made.resumed == 2
    assert first.stat().st_mtime_ns == before
    assert digests(copy) == whole


def test_a_damaged_or_missing_shard_is_written_again(source: Path, copy: Path, whole: dict[str, str]) -> None:
    first = copy / "model-00001-of-00005.safetensors"
    with first.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    (copy / "model-00002-of-00005.safetensors").unlink()
    made = export(source, copy, SMALL_SHARDS)
    assert made.resumed == 0
    assert digests(copy) == whole


def test_a_line_that_was_cut_short_is_not_believed(source: Path, copy: Path, whole: dict[str, str]) -> None:
    journal = copy / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    made = export(source, copy, SMALL_SHARDS)
    assert made.resumed == 1
    assert digests(copy) == whole


def test_only_the_same_export_goes_on(source: Path, copy: Path, tmp_path: Path) -> None:
    before = digests(copy)
    with pytest.raises(ExportError, match="unfinished export of something else: its mtp differs"):
        export(source, copy, Options(mtp="bf16", max_shard_bytes=SMALL_SHARDS.max_shard_bytes))
    other = write_source(tmp_path / "other")
    change(other, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    with pytest.raises(ExportError, match="unfinished export of something else: its source"):
        export(other, copy, SMALL_SHARDS)
    assert digests(copy) == before


def test_two_exports_to_one_place(source: Path, copy: Path) -> None:
    identity = json.loads((copy / JOURNAL).read_bytes().split(b"\n")[0].partition(b" ")[2])["export"]
    with Journal(copy, identity), pytest.raises(ExportError, match="another export is writing"):
        export(source, copy, SMALL_SHARDS)
