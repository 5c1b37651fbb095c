"""Everything that can go wrong around an export gives one clear error, and leaves the source and earlier output as they were."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm5_port.errors import CheckpointError, ExportError, InputError
from glm5_port.quant import export as export_module
from glm5_port.quant import files
from glm5_port.quant.export import export
from tests.quant.exports import SMALL_SHARDS, digests, expert, read_all, write_source

SAFE = SMALL_SHARDS.format
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("faults") / "source")


@pytest.mark.parametrize("name", [SAFE, "gguf", "onnx"])
def test_too_little_room_is_known_before_a_byte_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = replace(SMALL_SHARDS, format=name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 300_000))
    with pytest.raises(ExportError, match=r"has room for 300.0 kB \(300,000 bytes\)"):
        export(source, tmp_path / "int4", options)
    assert not list((tmp_path / "int4").iterdir())
    monkeypatch.undo()
    export(source, tmp_path / "int4", options)  # and with room it is written there


@pytest.fixture
def small_files() -> Iterator[None]:
    """A file system that refuses files above 50 kB: the kernel's own refusal, as a full disk gives it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [SAFE, "gguf", "onnx"])
def test_a_disk_that_refuses_more(source: Path, tmp_path: Path, small_files: None, name: str) -> None:
    before = digests(source)
    with pytest.raises(ExportError, match="is full"):
        export(source, tmp_path / "int4", replace(SMALL_SHARDS, format=name))
    assert not list((tmp_path / "int4").glob("*.part"))
    assert digests(source) == before


@pytest.mark.parametrize(("after", "name"), [(1, SAFE), (100, SAFE), (200, SAFE), (100, "gguf"), (1000, "onnx")])
def test_disk_full_in_the_middle_keeps_finished_shards_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, name: str
) -> None:
    options = replace(SMALL_SHARDS, format=name)
    export(source, tmp_path / "whole", options)
    left = after

    def full(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(*arguments)

    class Full:
        def __getattr__(self, name: str) -> Any:
            return full if name == "pwrite" else getattr(os, name)

    monkeypatch.setattr(files, "os", Full())
    with pytest.raises(ExportError, match=r"is full: No space left on device\n  Finished shards are kept"):
        export(source, tmp_path / "int4", options, workers=2)
    monkeypatch.undo()
    assert not list((tmp_path / "int4").glob("*.part"))
    assert not (tmp_path / "int4" / "config.json").exists()
    export(source, tmp_path / "int4", options)
    assert digests(tmp_path / "int4") == digests(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_target_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ExportError, match=rf"cannot write to .*int4: {os.strerror(number)}"):
        export(source, tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


def test_a_file_system_that_takes_no_directory(source: Path) -> None:
    with pytest.raises(ExportError, match="cannot write to /proc/int4"):  # refused even to root
        export(source, "/proc/int4")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=1)
    tensors = read_all(source)
    tensors[expert(2, 3, "up")][7, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=rf"{expert(2, 3, 'up')}.*\[7, 5\] is nan"):
        export(source, tmp_path / "int4")
    assert not list((tmp_path / "int4").glob("*.safetensors*"))


def test_and_in_a_later_block_of_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_port.quant import writing

    monkeypatch.setattr(writing, "BLOCK_WEIGHTS", 64)
    source = write_source(tmp_path / "source", shards=1)
    tensors = read_all(source)
    tensors[expert(2, 3, "up")][7, 5] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=rf"{expert(2, 3, 'up')}, rows from 7: element \[0, 5\] is inf"):
        export(source, tmp_path / "int4")


def test_a_source_that_is_cut_short_while_it_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    plan_export = export_module.plan_export

    def then_truncate(*arguments: Any) -> Any:
        plan = plan_export(*arguments)
        with (copy / "model-00002-of-00003.safetensors").open("r+b") as stream:
            stream.truncate(100_000)
        return plan

    monkeypatch.setattr(export_module, "plan_export", then_truncate)
    with pytest.raises(CheckpointError, match="truncated"):
        export(copy, tmp_path / "int4")


def test_reading_across_the_end_of_a_tensor_is_bounded(tmp_path: Path) -> None:
    from glm5_port.model.stored_tensors import read_directory
    from glm5_port.quant.files import Reader

    save_file({"a": torch.arange(10)}, tmp_path / "model.safetensors")
    stored = read_directory(tmp_path).tensors["a"]
    with Reader(tmp_path) as reader:
        assert torch.equal(reader.whole(stored), torch.arange(10))
        with pytest.raises(CheckpointError, match="truncated"):
            reader.bytes(stored, 0, stored.bytes + 1)
