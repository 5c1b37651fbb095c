"""The formats that INT4 checkpoints are written in. A format says which tensors stand for a quantised weight, turns codes and
scales into their bytes and back, and writes its block of config.json. Everything else (streaming, shards, journal, manifest) is
the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from glm5_port.errors import InputError, did_you_mean
from glm5_port.quant.int4 import Int4Rule

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one element of each safetensors dtype."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that will be written: its name, safetensors dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: Sequence[int]) -> OutputTensor:
        """One whose bytes follow from its shape."""
        return cls(name, dtype, tuple(shape), math.prod(shape) * ITEM_BYTES[dtype])


class Format(Protocol):
    """One format.

    Attributes:
        name: as given to `--format`.
        title: one line for people.
        row_blocks: whether rows can be encoded a block at a time, one block's bytes after the other's. Otherwise `encode` gets
            all rows of a weight at once.
    """

    name: str
    title: str
    row_blocks: bool

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Raises InputError when the format cannot hold this weight under this rule."""

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The tensors that stand for the weight `name` ("....weight") of a shape [out, in]."""

    def encode(self, name: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Rows of a weight as rows of its tensors, by tensor name.

        Args:
            name: of the weight.
            codes: [rows, in] int8, -8..7.
            scales: [rows, in / group].
        """

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of a weight that do not depend on its values."""

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> dict[str, Any]:
        """The quantization_config block.

        Args:
            rule: how weights were quantised.
            quantized: names of the quantised modules.
            kept: names of all other modules that a loader may take for quantised ones: those with a matrix as weight.
            mtp_layer: index of the MTP layer; None if there is none.
        """

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Names of the weights ("....weight") of which a checkpoint holds at least one tensor of this format."""

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """(codes [out, in] int8, scales [out, in / group]) of a weight from its tensors by name."""


def formats() -> dict[str, Format]:
    """Every format by name."""
    from glm5_port.quant.formats.compressed_tensors import CompressedTensors

    known: tuple[Format, ...] = (CompressedTensors(),)
    return {known_format.name: known_format for known_format in known}


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        InputError: unknown.
    """
    known = formats()
    if name not in known:
        raise InputError(f"format {name!r} is not known{did_you_mean(name, known)}\n  known: {', '.join(known)}")
    return known[name]
