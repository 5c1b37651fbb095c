"""The container GGUF, version 3: metadata, one entry for each tensor, then their bytes.

    "GGUF", u32 version, u64 tensors, u64 metadata entries
    metadata: string key, u32 type, value            string: u64 length, bytes; array: u32 type, u64 length, values
    tensor: string name, u32 dimensions, u64 each (the innermost first), u32 type, u64 place after the header
    bytes of the tensors, each at a multiple of 32

Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from glm5_port.errors import CheckpointError

ALIGNMENT = 32
VERSION = 3
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18)}
"""Name of a tensor type -> its number, elements of a block, bytes of a block."""
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a value's type -> its bytes."""
_STRING, _ARRAY = 8, 9
_MOST = 2**31
"""Lengths above it are those of a damaged file."""


class UInt16(int):
    """A whole number that metadata holds in 16 bits."""


class Int32(int):
    """A whole number that metadata holds with a sign."""


Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[str]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """An entry of the header.

    Attributes:
        name: as llama.cpp calls it.
        kind: one of `KINDS`.
        shape: the outermost dimension first, as torch has it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many the tensor has."""
        _, elements, size = KINDS[self.kind]
        return math.prod(self.shape) // elements * size


@dataclass(slots=True)
class GgufHeader:
    """What the header of a file says.

    Attributes:
        metadata: key -> type and value as they are stored.
        tensors: entry -> first byte of the tensor, counted from the beginning of the file.
        bytes: that the file must have.
    """

    metadata: dict[str, bytes] = field(default_factory=dict)
    tensors: dict[GgufTensor, int] = field(default_factory=dict)
    bytes: int = 0


def header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> tuple[bytes, list[int], int]:
    """(the first bytes of a file, first byte of each tensor, bytes of the whole file)."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), stored_value(value)]
    places, end = [], 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", KINDS[tensor.kind][0], end))
        places.append(end)
        end += tensor.bytes + -tensor.bytes % ALIGNMENT
    data = b"".join(parts)
    data += b"\0" * (-len(data) % ALIGNMENT)
    return data, [len(data) + place for place in places], len(data) + end


def read_header(path: Path) -> GgufHeader:
    """The header of a file.

    Raises:
        CheckpointError: no GGUF file of this version, cut short inside its header, or a type of tensor that is not written here.
    """
    try:
        with path.open("rb") as stream:
            return _Parser(stream).header()
    except OSError as error:
        raise CheckpointError(
            "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        ) from error
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"not a GGUF file, or damaged inside its header: {error}") from error


class _Parser:
    """Reads a header from its beginning."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def header(self) -> GgufHeader:
        start = self._stream.read(4)
        if start != b"GGUF":
            raise CheckpointError("not a GGUF file")
        version, tensors, entries = self._unpack("<IQQ")
        if version != VERSION or max(tensors, entries) > _MOST:
            raise CheckpointError(f"GGUF version {version}, {tensors:,} tensors; this reads version {VERSION}")
        found = GgufHeader()
        for _ in range(entries):
            key = self._string().decode()
            found.metadata[key] = self._value()
        placed = [self._tensor() for _ in range(tensors)]
        data = self._stream.tell() + -self._stream.tell() % ALIGNMENT
        found.tensors = {tensor: data + place for tensor, place in placed}
        ends = (first + tensor.bytes + -tensor.bytes % ALIGNMENT for tensor, first in found.tensors.items())
        found.bytes = max(ends, default=data)
        return found

    def _tensor(self) -> tuple[GgufTensor, int]:
        name, (count,) = self._string().decode(), self._unpack("<I")
        if count > 4:
            raise CheckpointError(f"damaged header: {name} has {count:,} dimensions")
        dimensions = self._unpack(f"<{count}Q")
        number, place = self._unpack("<IQ")
        kinds = [kind for kind, (known, _, _) in KINDS.items() if known == number]
        if not kinds:
            raise CheckpointError(f"{name} is of type {number}; this reads {', '.join(KINDS)}")
        return GgufTensor(name, kinds[0], tuple(dimensions[::-1])), place

    def _value(self) -> bytes:
        """Type and value as they are stored."""
        number = self._take(4)
        (kind,) = struct.unpack("<I", number)
        if kind != _ARRAY:
            return number + self._scalar(kind)
        head = self._take(12)
        of, count = struct.unpack("<IQ", head)
        if count > _MOST:
            raise CheckpointError(f"damaged header: an array of {count:,} values")
        if of in _SCALARS:
            return number + head + self._take(count * _SCALARS[of])
        return number + head + b"".join(self._scalar(of) for _ in range(count))

    def _scalar(self, kind: int) -> bytes:
        if kind == _STRING:
            text = self._string()
            return struct.pack("<Q", len(text)) + text
        if kind not in _SCALARS:
            raise CheckpointError(f"damaged header: a value of type {kind}")
        return self._take(_SCALARS[kind])

    def _string(self) -> bytes:
        return self._take(self._unpack("<Q")[0])

    def _unpack(self, shape: str) -> tuple[int, ...]:
        return struct.unpack(shape, self._take(struct.calcsize(shape)))

    def _take(self, count: int) -> bytes:
        if count > _MOST:
            raise CheckpointError(f"damaged header: something of {count:,} bytes")
        data = self._stream.read(count)
        if len(data) < count:
            raise CheckpointError("truncated inside its header")
        return data


def shown_value(stored: bytes | None) -> str:
    """A stored value for people."""
    if stored is None:
        return "missing"
    (kind,), data = struct.unpack("<I", stored[:4]), stored[4:]
    if kind == _STRING:
        return repr(data[8:].decode(errors="replace"))
    if kind == _ARRAY:
        return f"{struct.unpack('<Q', data[4:12])[0]:,} values"
    letter = {2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.get(kind, f"{len(data)}s")
    value = struct.unpack(f"<{letter}", data)[0]
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def stored_value(value: Value) -> bytes:
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
    if isinstance(value, UInt16):
        return 2, struct.pack("<H", value)
    if isinstance(value, Int32):
        return 5, struct.pack("<i", value)
    if isinstance(value, int):
        return (5, struct.pack("<i", value)) if signed else (4, struct.pack("<I", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, _string(value)
