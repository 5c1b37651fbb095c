"""Bytes in and out: reads tensors at their place without mapping files (mapped pages would count as memory of the process),
writes files so that they exist whole or not at all, and hashes them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError
from glm5_port.model.stored_tensors import StoredTensor

PART = ".part"
"""Ending of a file that is not whole yet."""
if TYPE_CHECKING:
    import xxhash

CHUNK = 4 * 2**20
"""Bytes that are copied at once."""
HASHED = 2**18
"""Bytes of a file that are hashed at once: they stay in a core's own cache."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class SpreadTensor(StoredTensor):
    """A tensor whose rows of `row` bytes lie `stride` bytes apart, with rows of another between them."""

    row: int
    stride: int


class Reader:
    """Reads tensors of a directory at their place. May be shared by threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def bytes(self, tensor: StoredTensor, first: int, count: int, room: memoryview | None = None) -> memoryview:
        """`count` bytes of a tensor from its byte `first` on.

        Args:
            tensor: that is read.
            first: byte of it.
            count: of bytes.
            room: at least as many bytes to read into: whoever reads block after block spares new memory for each.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        if isinstance(tensor, SpreadTensor):
            return self._spread(tensor, first, count)
        return self._read(tensor.file, tensor.start + first, memoryview(bytearray(count)) if room is None else room[:count])

    def _spread(self, tensor: SpreadTensor, first: int, count: int) -> memoryview:
        """Reads whole rows with what lies between them, and drops that."""
        begin, end = first // tensor.row, -(-(first + count) // tensor.row)
        span = max(0, (end - begin - 1) * tensor.stride + tensor.row)
        read = self._read(tensor.file, tensor.start + begin * tensor.stride, memoryview(bytearray(span if count else 0)))
        rows = (read[at : at + tensor.row] for at in range(0, len(read), tensor.stride))
        skipped = first - begin * tensor.row
        return memoryview(bytearray(b"".join(rows)))[skipped : skipped + count]

    def _read(self, name: str, place: int, view: memoryview) -> memoryview:
        try:
            file = self._open(name)
            done = 0
            while done < len(view):
                got = os.preadv(file, [view[done:]], place + done)
                if got == 0:
                    raise CheckpointError(f"{self._directory / name} ends at byte {place + done:,}: it is truncated")
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot read {self._directory / name}: {error.strerror}") from error
        return view

    def whole(self, tensor: StoredTensor) -> Tensor:
        """A tensor in its stored dtype."""
        return as_tensor(self.bytes(tensor, 0, tensor.bytes), tensor.dtype, tensor.shape)

    def chunks(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """The bytes of a tensor, some at a time; they stand until the next ones are asked for."""
        room = memoryview(bytearray(min(CHUNK, tensor.bytes)))
        for first in range(0, tensor.bytes, CHUNK):
            yield self.bytes(tensor, first, min(CHUNK, tensor.bytes - first), room)

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._directory / name, os.O_RDONLY)
            return self._files[name]


def as_tensor(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that bytes stand for; it shares their memory."""
    return (torch.frombuffer(buffer, dtype=DTYPES[dtype]) if buffer else torch.empty(0, dtype=DTYPES[dtype])).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row. Copies only if it has to."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def write_at(file: int, data: memoryview, place: int) -> None:
    """Writes all of `data` at a place of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], place + done)


def write_whole(path: Path, data: bytes) -> str:
    """Writes a file so that it is there whole or not at all; its sha256."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_directory(path.parent)
    return hashlib.sha256(data).hexdigest()


def copy_whole(source: Path, path: Path) -> str:
    """Copies a file so that it is there whole or not at all; its sha256."""
    part, digest = path.with_name(path.name + PART), hashlib.sha256()
    with source.open("rb") as given, part.open("wb") as stream:
        while chunk := given.read(CHUNK):
            digest.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_directory(path.parent)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def tensor_digest() -> xxhash.xxh3_128:
    """The digest that tells tensors from each other, XXH3 with 128 bits: twenty times as fast as sha256. It is no proof against
    intent; whole files have sha256.
    """
    import xxhash

    return xxhash.xxh3_128()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(HASHED))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()
