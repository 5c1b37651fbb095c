"""What lies in a checkpoint directory: every stored tensor with its shape, dtype and file, read from file headers alone.

A safetensors file is: 8 bytes little-endian length, a JSON header of that length (name -> dtype, shape, first and last byte),
then the bytes. Reading the header here, not through the library, gives the size that the file must have, so that a truncated
download is found before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm5_port.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FP8 = "F8_E4M3"
FLOATS = ("BF16", "F16", "F32")
_LARGEST_HEADER = 100 * 2**20  # as in the safetensors library
_GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: its shape, its safetensors dtype ("BF16", "F8_E4M3", ...), the file, its bytes there, and the
    place of the first of them, counted from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    bytes: int
    start: int


@dataclass(slots=True)
class StoredTensors:
    """All tensors of a directory.

    Attributes:
        tensors: name -> StoredTensor.
        files: the shard files that the directory should have, in order.
        unreadable: names that the index places in a file that is missing or unreadable; nothing else is known of them.
        faults: what is wrong with the files, one sentence each.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    unreadable: frozenset[str] = frozenset()
    faults: list[str] = field(default_factory=list)


def read_directory(path: Path, index_file: str = INDEX_FILE) -> StoredTensors:
    """Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Args:
        path: the directory.
        index_file: another name of the index.

    Raises:
        CheckpointError: when the directory has neither, or both, or the index is not readable. Faults of single files are
            gathered in the result instead, so that they can be told all at once.
    """
    single, index = (path / SINGLE_FILE).exists(), (path / index_file).exists()
    if not (single or index):
        raise CheckpointError(
            f"{path} holds no weights\n  expected: {SINGLE_FILE}, or {index_file} with its shards{_other_formats(path)}"
        )
    placed = _read_index(path / index_file) if index else None
    files = tuple(sorted(set(placed.values()))) if placed is not None else (SINGLE_FILE,)
    if single and SINGLE_FILE not in files:
        raise CheckpointError(f"{path} holds both {SINGLE_FILE} and an {index_file} of other files: remove the one that is stale")
    stored = StoredTensors(files=files)
    unreadable = {file for file in files if not _add_file(stored, path / file, placed)}
    if placed is not None:
        _check_index(stored, placed, unreadable)
        stored.unreadable = frozenset(name for name, file in placed.items() if file in unreadable)
    return stored


def _other_formats(path: Path) -> str:
    found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf", "*.pth", "*.safetensors") for file in path.glob(pattern))
    return f"; found {', '.join(found[:3])}, which is not read" if found else ""


def _read_index(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        placed = content["weight_map"]
        if not all(isinstance(shard, str) and shard == Path(shard).name for shard in placed.values()):
            raise CheckpointError(f"{file}: weight_map must give a file name in the same directory for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is no safetensors index with a weight_map: {error!r}") from error
    return dict(placed)


def _add_file(stored: StoredTensors, file: Path, placed: Mapping[str, str] | None) -> bool:
    """Adds the tensors of one file; False if its header could not be read."""
    try:
        header, data, size_by_header = _read_header(file)
        found = {name: _stored_tensor(name, entry, file.name, data) for name, entry in header.items() if name != "__metadata__"}
    except CheckpointError as error:
        held = sum(shard == file.name for shard in placed.values()) if placed is not None else 0
        stored.faults.append(f"{file.name}: {error}" + (f" (the index places {held:,} tensors in it)" if held else ""))
        return False
    size = file.stat().st_size
    if size != size_by_header:
        state = "truncated" if size < size_by_header else "longer than it should be"
        stored.faults.append(f"{file.name} is {state}: {size:,} bytes, its header describes {size_by_header:,}")
    for name, tensor in found.items():
        if name in stored.tensors:
            stored.faults.append(f"{name} is stored twice: in {stored.tensors[name].file} and in {file.name}")
        stored.tensors.setdefault(name, tensor)
    return True


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(name -> entry, where the data begin, the size in bytes that the file must have)."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if (start + stream.read(len(_GIT_LFS) - 8)).startswith(_GIT_LFS):
                raise CheckpointError("a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
            if len(start) < 8 or length > _LARGEST_HEADER:
                raise CheckpointError(f"not a safetensors file ({file.stat().st_size:,} bytes)")
            stream.seek(8)
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError("missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointError(f"truncated inside its header: {8 + len(text):,} bytes, the header alone takes {8 + length:,}")
    try:
        header = json.loads(text)
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"not a safetensors file: unreadable header ({error!r})") from error
    return header, 8 + length, 8 + length + max(ends, default=0)


def _stored_tensor(name: str, entry: Mapping[str, Any], file: str, data: int) -> StoredTensor:
    try:
        first, last = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(edge) for edge in entry["shape"])
        tensor = StoredTensor(shape, str(entry["dtype"]), file, last - first, data + first)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"not a safetensors file: the header entry of {name} is unreadable ({error!r})") from error
    width = _BYTES.get(tensor.dtype)
    if width is not None and tensor.bytes != math.prod(tensor.shape) * width:
        raise CheckpointError(
            f"damaged header: {name} is {list(tensor.shape)} {tensor.dtype}, which is not the {tensor.bytes:,} bytes it points to"
        )
    return tensor


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def _check_index(stored: StoredTensors, placed: Mapping[str, str], unreadable: set[str]) -> None:
    """The index and the headers must tell the same, or some readers would load other weights than this one."""
    lacking: dict[str, list[str]] = {}
    for name, file in placed.items():
        if file not in unreadable and (name not in stored.tensors or stored.tensors[name].file != file):
            lacking.setdefault(file, []).append(name)
    for file, names in sorted(lacking.items()):
        stored.faults.append(f"{file} lacks {len(names):,} tensors that {INDEX_FILE} places in it, for example {names[0]}")
    extra = [name for name in stored.tensors if name not in placed]
    if extra:
        example = f"{extra[0]} in {stored.tensors[extra[0]].file}"
        stored.faults.append(f"{INDEX_FILE} does not list {len(extra):,} tensors that the shards hold, for example {example}")
