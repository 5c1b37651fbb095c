"""GGUF of architecture glm-dsa, for llama.cpp: quantised weights in Q4_0.

Codes and scales become Q4_0 by moving bits: value = d * (n - 8) with the same codes, and d the scale in float16, which must hold
it exactly. All other tensors keep their values. llama.cpp multiplies by d * q, not by bf16(d * q).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.formats.gguf_model import is_wide, piece_of, source_of
from glm5_port.quant.formats.gguf_parts import PACKED_DTYPE, GgufParts
from glm5_port.quant.int4 import Int4Rule, groups_of
from glm5_port.quant.layouts import Q4_0_BLOCK, Q4_0_BYTES, from_q4_0, to_q4_0
from glm5_port.quant.output_files import Container, OutputTensor
from glm5_port.quant.packing import pack_int4, unpack_int4


class Gguf:
    """The format layer of GGUF."""

    name = "gguf"
    title = "GGUF, architecture glm-dsa, quantised weights in Q4_0: llama.cpp"
    row_blocks = True
    container: Container = GgufParts()
    scale_dtype = torch.float16
    is_source = False
    mtp = True

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses a weight that has no tensor of its own in glm-dsa, or whose groups are not whole blocks."""
        piece = piece_of(name)
        if piece is None or is_wide(piece, shape) or len(shape) != 2:
            raise InputError(
                f"{name} {list(shape)}: format {self.name} has no tensor in Q4_0 for it\n"
                "  Export the original weights with an --include that does not find it, or with --exclude"
            )
        _, size = groups_of(shape[1], rule.group_size, name=name)
        if size % Q4_0_BLOCK:
            raise InputError(
                f"{name}: groups of {size}; a block of Q4_0 has {Q4_0_BLOCK} weights, and groups must be whole blocks\n"
                f"  Use --group-size {Q4_0_BLOCK}"
            )

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """One piece of blocks."""
        rows, columns = shape
        return (OutputTensor.of(_piece(name), PACKED_DTYPE, (rows, columns // Q4_0_BLOCK * Q4_0_BYTES)),)

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Rows of blocks."""
        return {_piece(name): to_q4_0(unpack_int4(packed), scales, name=name)}

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None."""
        return {}

    def is_int8(self, name: str) -> bool:
        """None is."""
        return False

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> None:
        """None: config.json lies beside the files for `verify` and for people."""

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """There must be no quantization_config: it would speak of other files."""
        return [] if block is None else ["config.json has a quantization_config, and GGUF files have none"]

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """None."""
        return {}

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """The weights whose pieces are in Q4_0."""
        packed = [name for name, stored in tensors.items() if getattr(stored, "dtype", None) == PACKED_DTYPE]
        return [source_of(name) or name for name in packed]

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """That of a block. Larger groups show only in scales that repeat."""
        piece = tensors.get(_piece(name))
        return None if piece is None else (Q4_0_BLOCK, piece.shape[-1] // Q4_0_BYTES)

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and scales of a weight."""
        codes, scales = from_q4_0(read[_piece(name)])
        return pack_int4(codes), scales


def _piece(name: str) -> str:
    return piece_of(name) or name
