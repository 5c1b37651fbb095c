"""The container GGUF, version 3: metadata, one entry for each tensor, then their bytes. Written front to back: every size is
known from shapes, so nothing is held but the piece being written.

    "GGUF", u32 version, u64 tensors, u64 metadata entries
    metadata: string key, u32 type, value            string: u64 length, bytes; array: u32 type, u64 length, values
    tensor: string name, u32 dimensions, u64 each (the innermost first), u32 type, u64 place after the header
    bytes of the tensors, each at a multiple of 32

Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm5_port.errors import CheckpointError
from glm5_port.quant.files import PART, sync_directory

ALIGNMENT = 32
VERSION = 3
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18)}
"""Name of a tensor type -> its number, elements of a block, bytes of a block."""

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[str]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to write.

    Attributes:
        name: as llama.cpp calls it.
        kind: one of `KINDS`.
        shape: the outermost dimension first, as torch has it.
        pieces: makes its bytes, in order, when they are needed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[memoryview]]

    @property
    def bytes(self) -> int:
        """How many they are."""
        _, elements, size = KINDS[self.kind]
        return math.prod(self.shape) // elements * size


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> int:
    """Writes a file so that it is there whole or not at all; its bytes.

    Raises:
        CheckpointError: a tensor gives another number of bytes than its shape says. Nothing is left then.
        OSError: the disk is full or not writable. Nothing is left.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as stream:
            stream.write(_header(metadata, tensors))
            for tensor in tensors:
                stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                start = stream.tell()
                for piece in tensor.pieces():
                    stream.write(piece)
                if stream.tell() - start != tensor.bytes:
                    raise CheckpointError(f"{tensor.name}: {stream.tell() - start:,} bytes instead of {tensor.bytes:,}")
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return size


def _header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    place = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", KINDS[tensor.kind][0], place))
        place += tensor.bytes + -tensor.bytes % ALIGNMENT
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The number of a value's type and the value. Whole numbers are unsigned in metadata and signed in arrays, as llama.cpp
    writes them; an empty array is one of strings: merges may be none, and nothing else is ever empty."""
    if isinstance(value, (bool, int, float, str)):
        number, data = _scalar(value)
        return struct.pack("<I", number) + data
    items = [_scalar(item, signed=True) for item in value]
    number = items[0][0] if items else 8
    return struct.pack("<IIQ", 9, number, len(items)) + b"".join(data for _, data in items)


def _scalar(value: bool | int | float | str, *, signed: bool = False) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return (5, struct.pack("<i", value)) if signed else (4, struct.pack("<I", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, _string(value)
