"""The formats that INT4 checkpoints are written in. A format says which tensors stand for a quantised weight, turns codes and
scales into their bytes and back, and writes its block of config.json. Everything else (streaming, shards, journal, manifest) is
the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, InputError, did_you_mean
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule
from glm5_port.quant.output_files import Container, OutputTensor

LISTED = 5
"""Scales that an error lists one by one."""


class Format(Protocol):
    """One format.

    Attributes:
        name: as given to `--format`.
        title: one line for people.
        row_blocks: whether rows can be encoded a block at a time, one block's bytes after the other's. Otherwise `encode` and
            `decode` get all rows of a weight at once.
        container: the kind of its files of weights.
        scale_dtype: what scales must be exact in.
        is_source: whether it can be transcoded into others.
        mtp: whether experts of the MTP layer are quantised as all others; otherwise that layer is always carried as it is.
    """

    name: str
    title: str
    row_blocks: bool
    container: Container
    scale_dtype: torch.dtype
    is_source: bool
    mtp: bool

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Raises InputError when the format cannot hold this weight under this rule."""

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The tensors that stand for the weight `name` ("....weight") of a shape [out, in]."""

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Rows of a weight as rows of its tensors, by tensor name.

        Args:
            name: of the weight.
            packed: [rows, in / 8] int32, canonical words of eight codes.
            scales: [rows, in / group].
        """

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of a weight that do not depend on its values."""

    def is_int8(self, name: str) -> bool:
        """Whether a projection outside of the MTP layer that is not quantised to INT4 is stored in INT8, a scale for each row."""

    def config(
        self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> dict[str, Any] | None:
        """The quantization_config block; None for a format whose config.json has none.

        Args:
            rule: how weights were quantised.
            quantized: names of the quantised modules.
            kept: names of all other modules that a loader may take for quantised ones: those with a matrix as weight.
            mtp_layer: index of the MTP layer; None if there is none.
        """

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """What a quantization_config says that is not what the tensors are; the arguments are those of `config`."""

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """Files beside the weights and config.json: name -> text.

        Args:
            block: what `config` gave.
            outputs: every written tensor -> what became of its source ("int4", "repack", "int8", "bf16" or "carry").
        """

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Names of the weights ("....weight") of which a checkpoint holds at least one tensor of this format."""

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """(weights of a group, groups of a row) of a stored weight by its shapes; None if its tensors do not tell."""

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """(canonical words [out, in / 8] int32, scales [out, in / group]) of a weight from its tensors by name."""


def int8_tensors(name: str, shape: Sequence[int]) -> tuple[OutputTensor, ...]:
    """The tensors that stand for an INT8 weight: codes, a scale for each row, and offsets, all zero."""
    column = (shape[0], 1)
    return (  # in the order in which they are written and read
        OutputTensor.of(name, "I8", shape),
        OutputTensor.of(name + "_scale", "F32", column),
        OutputTensor.of(name + "_offset", "F32", column),
    )


def exact_scales(scales: Tensor, dtype: torch.dtype, name: str, format_name: str, first: int = 0) -> Tensor:
    """The scales in another dtype, if it holds every one exactly.

    Args:
        scales: [out, groups].
        dtype: wanted.
        name: of the weight, for the error.
        format_name: of the format that has this dtype, or had the scales, for the error.
        first: row of the weight that the first of these is, for the error.

    Raises:
        InputError: some it does not hold; lists the first of them.
    """
    if scales.dtype == dtype:
        return scales
    narrow = scales.to(dtype)
    lost = (narrow.to(torch.float32) != scales.to(torch.float32)).nonzero()
    if len(lost):
        shown = ", ".join(f"[{first + row}, {group}] = {scales[row, group].item():.9g}" for row, group in lost[:LISTED].tolist())
        raise InputError(
            f"{name}: {len(lost):,} of {scales.numel():,} scales are not exact in {str(dtype).removeprefix('torch.')}: scale "
            f"[row, group] {shown}{', ...' if len(lost) > LISTED else ''}\n"
            f"  format {format_name}: scales are carried bit for bit or not at all. Export without this tensor (--exclude), "
            "or choose a format that holds them (compressed-tensors has bfloat16, modelslim float32)"
        )
    return narrow


@cache
def formats() -> Mapping[str, Format]:
    """Every format by name."""
    from glm5_port.quant.formats.awq import Awq
    from glm5_port.quant.formats.compressed_tensors import CompressedTensors
    from glm5_port.quant.formats.gguf import Gguf
    from glm5_port.quant.formats.gptq import Gptq
    from glm5_port.quant.formats.modelslim import ModelSlim
    from glm5_port.quant.formats.onnx_format import Onnx

    onnx = (Onnx(), Onnx("onnx-float16", torch.float16))
    known: tuple[Format, ...] = (CompressedTensors(), Gptq(), Awq(), ModelSlim(), Gguf(), *onnx)
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


def format_of(block: Any, manifest: Mapping[str, Any] | None, directory: Path | None = None) -> Format:
    """The format of an INT4 checkpoint: what its manifest says, else its quantization_config, else the first one whose files lie
    in the directory, else the canonical one.

    Raises:
        CheckpointError: a quantization that is not INT4 in a format known here.
    """
    if manifest is not None:
        return find_format(str(manifest.get("format")))
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    known = {name: known_format for name, known_format in formats().items() if known_format.is_source}
    if method is not None and method not in known:
        raise CheckpointError(f"quantization_config.quant_method = {method!r} is no INT4 format known here: {', '.join(known)}")
    if method is None and directory is not None:
        here = (known_format for known_format in formats().values() if known_format.container.is_here(directory))
        return next(here, known["compressed-tensors"])
    return known[method or "compressed-tensors"]


def stored_group_size(output_format: Format, tensors: Mapping[str, StoredTensor], default: int = 32) -> int:
    """The group size that most stored weights have; `PER_CHANNEL` when every weight has one scale a row and widths differ."""
    found = [size for name in output_format.weights(tensors) if (size := output_format.group_size(tensors, name)) is not None]
    sizes = Counter(size for size, _ in found)
    if len(sizes) > 1 and all(groups == 1 for _, groups in found):
        return PER_CHANNEL
    return sizes.most_common(1)[0][0] if sizes else default
