"""ONNX graphs over data files of one layer each, for ONNX Runtime: the format layer of `export` and `transcode`.

`onnx.py` says which graphs and data files there are and where each tensor of the source goes; here that becomes pieces, and is
read back from graphs. Pieces have the names of their source:

    P.weight.codes    uint8 [out, in / 2]        the canonical bytes
    P.weight.scales   float32 [out, in / block]  or float16; a scale of a larger group is repeated for every block
    P                 any other tensor as it is

Scales must be exact in the type that they are written in: float32 always is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.onnxruntime.int4 import GROUP_SIZES
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, Glm5PortError, InputError
from glm5_port.model.stored_tensors import FLOATS, StoredTensor, StoredTensors
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant.files import SpreadTensor
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE
from glm5_port.quant.formats.onnx import DECODER, MTP, OnnxPlan, plan_onnx
from glm5_port.quant.formats.onnx_data import CODES, NIBBLES, SCALES
from glm5_port.quant.formats.onnx_graph import onnx_module
from glm5_port.quant.int4 import Int4Rule, groups_of
from glm5_port.quant.output_files import Container, Facts, Kept, OutputTensor, PlannedTensor, Shard
from glm5_port.quant.packing import CODES_PER_WORD

_STACK = re.compile(r"(.*\.mlp\.experts\.)(gate_up|gate|up|down)(\.codes|\.scales|)")
_PROJECTIONS = {"gate_up": ("gate", "up"), "gate": ("gate",), "up": ("up",), "down": ("down",)}


class OnnxFiles:
    """Data files, and the graphs that name them."""

    def __init__(self, scales: str) -> None:
        """`scales`: what they are written in, "float32" or "float16"."""
        self._scales = scales

    def kept(self, name: str, stored: StoredTensor, config: Glm5Config) -> Kept:
        """Itself; graphs cast it to float32.

        Raises:
            InputError: the graphs have no such tensor, or not of this dtype.
        """
        if name not in _known(config):
            raise InputError(
                f"onnx: {name} is in none of the graphs, and nothing is dropped unsaid\n"
                "  Use a format that carries every tensor, or remove it from the source"
            )
        if stored.dtype not in FLOATS:
            raise InputError(f"onnx: {name} is stored as {stored.dtype}; expected {', '.join(FLOATS)}")
        return Kept((OutputTensor(name, stored.dtype, stored.shape, stored.bytes),))

    def lay_out(self, tensors: Sequence[PlannedTensor], facts: Facts) -> tuple[Shard, ...]:
        """A file for each layer, and one for what lies outside of them; their size follows from the model alone."""
        _check_stacks(tensors)
        planned, shards = {tensor.name: tensor for tensor in tensors}, []
        for file in self._plan({o.name: o for t in tensors for o in t.outputs}, facts.config).files:
            places = {_piece(part.source): part.place for part in file.parts}
            owners = dict.fromkeys(_owner(piece) for piece in places)
            shards.append(Shard(file.file, tuple(planned[owner] for owner in owners), {}, places, file.bytes))
        return tuple(shards)

    def texts(self, shards: Sequence[Shard], facts: Facts) -> dict[str, bytes]:
        """The graphs."""
        pieces = {output.name: output for shard in shards for tensor in shard.tensors for output in tensor.outputs}
        return {name: made() for name, made in self._plan(pieces, facts.config).graphs.items()}

    def notes(self, facts: Facts) -> list[str]:
        """None."""
        return []

    def read(self, directory: Path) -> StoredTensors:
        """The pieces that the decoder and the MTP layer name."""
        onnx = onnx_module()
        graphs = [directory / name for name in (DECODER, MTP) if (directory / name).exists()]
        if not graphs:
            raise CheckpointError(f"{directory} holds no weights\n  expected: {DECODER} and its data files")
        stored = StoredTensors()
        ends: dict[str, int] = {}
        for path in graphs:
            try:
                initializers = onnx.load(path, load_external_data=False).graph.initializer
            except Exception as error:  # the parser has errors of its own
                stored.faults.append(f"{path.name} is no ONNX graph: {error!r}")
                continue
            for tensor in initializers:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    whole = _stored(onnx, tensor)
                    ends[whole.file] = max(ends.get(whole.file, 0), whole.start + whole.bytes)
                    name = tensor.name.removesuffix(NIBBLES) + CODES if tensor.name.endswith(NIBBLES) else tensor.name
                    _add(stored, name, whole, path.name)
        stored.files = tuple(sorted(ends))
        for file, end in sorted(ends.items()):
            size = (directory / file).stat().st_size if (directory / file).exists() else None
            if size != end:
                state = "missing" if size is None else "truncated" if size < end else "longer than it should be"
                stored.faults.append(f"{file} is {state}: {size or 0:,} bytes, the graphs describe {end:,}")
        return stored

    def problems(self, directory: Path, stored: StoredTensors, facts: Facts) -> list[str]:
        """Graphs that are not those of config.json over these tensors."""
        try:
            graphs = self._plan(stored.tensors, facts.config).graphs
        except Glm5PortError as error:
            return [f"graphs were not compared: {str(error).splitlines()[0]}"]
        problems = []
        for name, made in graphs.items():
            if not (directory / name).exists():
                problems.append(f"{name} is missing")
            elif (directory / name).read_bytes() != made():
                problems.append(f"{name} is not the graph that config.json and the tensors give")
        return problems

    def is_here(self, directory: Path) -> bool:
        """A decoder."""
        return (directory / DECODER).exists()

    def _plan(self, pieces: Mapping[str, OutputTensor] | Mapping[str, StoredTensor], config: Glm5Config) -> OnnxPlan:
        """The plan for pieces, described as the canonical tensors that they stand for."""
        described = {}
        for name, piece in pieces.items():
            if name.endswith(CODES):
                shape = (piece.shape[0], piece.shape[1] * 2 // CODES_PER_WORD)
                described[name.removesuffix(CODES) + PACKED] = OutputTensor.of(name, "I32", shape)
            elif name.endswith(SCALES):
                described[name.removesuffix(SCALES) + SCALE] = OutputTensor.of(name, "BF16", piece.shape)
            else:
                described[name] = OutputTensor.of(name, piece.dtype, piece.shape)
        return plan_onnx(config, described, scales=self._scales)


class Onnx:
    """The format layer."""

    row_blocks = True
    is_source = False
    mtp = True

    def __init__(self, name: str = "onnx", scales: torch.dtype = torch.float32) -> None:
        """`scales`: what they are written in, float32 or float16."""
        kind = str(scales).removeprefix("torch.")
        self.name = name
        self.title = f"ONNX graphs, INT4 as MatMulNBits and QMoE, scales in {kind}: ONNX Runtime"
        self.scale_dtype = scales
        self.container: Container = OnnxFiles(kind)

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses what is no matrix, and groups that hold no whole block."""
        if len(shape) != 2:
            raise InputError(f"{name} {list(shape)} is no matrix [out, in], so it cannot be quantised: exclude it")
        _block(name, shape[1], rule.group_size)

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """Codes and scales."""
        rows, columns = shape
        dtype = "F32" if self.scale_dtype == torch.float32 else "F16"
        return (
            OutputTensor.of(name + CODES, "U8", (rows, columns // 2)),
            OutputTensor.of(name + SCALES, dtype, (rows, columns // _block(name, columns, rule.group_size))),
        )

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Rows of both."""
        columns = packed.shape[1] * CODES_PER_WORD
        group = columns // scales.shape[1]
        repeated = scales.repeat_interleave(group // _block(name, columns, group), dim=1)
        return {name + CODES: packed.view(torch.uint8), name + SCALES: repeated}

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None."""
        return {}

    def is_int8(self, name: str) -> bool:
        """None is."""
        return False

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> None:
        """None: config.json lies beside the graphs for `verify` and for people."""

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """There must be no quantization_config: it would speak of other files."""
        return [] if block is None else ["config.json has a quantization_config, and ONNX graphs have none"]

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """None."""
        return {}

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """The weights that have codes or scales."""
        return list(dict.fromkeys(_owner(name) for name in tensors if name.endswith((CODES, SCALES))))

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """That of a block. Larger groups show only in scales that repeat."""
        codes, scales = tensors.get(name + CODES), tensors.get(name + SCALES)
        if codes is None or scales is None or not scales.shape[-1]:
            return None
        return codes.shape[-1] * 2 // scales.shape[-1], scales.shape[-1]

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and scales of a weight."""
        return read[name + CODES].contiguous().view(torch.int32), read[name + SCALES]


def _block(name: str, columns: int, group_size: int) -> int:
    """The largest block of ONNX Runtime that a group holds whole."""
    _, size = groups_of(columns, group_size, name=name)
    if fitting := [block for block in GROUP_SIZES if size % block == 0]:
        return fitting[-1]
    raise InputError(
        f"{name}: groups of {size}; ONNX Runtime takes groups of {', '.join(map(str, GROUP_SIZES))} and whole multiples of them\n"
        "  Use --group-size 32"
    )


def _check_stacks(tensors: Sequence[PlannedTensor]) -> None:
    """Refuses a layer whose experts are not all quantised, or all stored alike."""
    kinds: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        if ".mlp.experts." in tensor.name:
            kind = "INT4" if tensor.outputs[0].name.endswith(CODES) else tensor.outputs[0].dtype
            kinds.setdefault(tensor.name.partition("experts.")[0], {})[kind] = tensor.name
    for prefix, found in kinds.items():
        if len(found) > 1:
            raise InputError(
                f"onnx: {prefix}experts would be stored in {', '.join(sorted(found))}; all of a layer are alike\n"
                "  Quantise all experts of a layer, or none"
            )


def _piece(source: str) -> str:
    """The piece that a canonical tensor becomes."""
    for canonical, ending in ((PACKED, CODES), (SCALE, SCALES)):
        if source.endswith(f".weight{canonical}"):
            return source.removesuffix(canonical) + ending
    return source


def _owner(piece: str) -> str:
    """The weight that a piece belongs to."""
    return piece.removesuffix(CODES).removesuffix(SCALES)


@cache
def _known(config: Glm5Config) -> frozenset[str]:
    """Every tensor that the graphs of a model take."""
    return frozenset(expected_tensors(config, mtp=config.mtp_layer is not None))


# -- reading -------------------------------------------------------------------------------------------------------------


def _stored(onnx: Any, tensor: Any) -> StoredTensor:
    """An initializer with external data."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    kinds = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.FLOAT16: "F16", onnx.TensorProto.BFLOAT16: "BF16"}
    dtype = kinds.get(tensor.data_type, "U8")
    return StoredTensor(tuple(tensor.dims), dtype, place["location"], int(place["length"]), int(place.get("offset", 0)))


def _add(stored: StoredTensors, name: str, whole: StoredTensor, graph: str) -> None:
    """The pieces of an initializer."""
    for piece, tensor in _pieces(name, whole).items():
        if stored.tensors.setdefault(piece, tensor) != tensor:
            stored.faults.append(f"{graph} has {piece} at another place than {DECODER}")


def _pieces(name: str, whole: StoredTensor) -> dict[str, StoredTensor]:
    found, file = _STACK.fullmatch(name), whole.file
    if found is None:
        shape = (whole.shape[0], whole.bytes // max(whole.shape[0], 1)) if name.endswith(CODES) else whole.shape
        return {name: StoredTensor(shape, whole.dtype, file, whole.bytes, whole.start)}
    prefix, stack, ending = found.groups()
    projections, (experts, rows_of_all, width) = _PROJECTIONS[stack], whole.shape
    apart = len(projections)
    rows, row = rows_of_all // apart, whole.bytes // max(experts * rows_of_all, 1)
    pieces: dict[str, StoredTensor] = {}
    for expert in range(experts):
        for number, projection in enumerate(projections):
            first, size = whole.start + (expert * rows_of_all + number) * row, rows * row
            piece = f"{prefix}{expert}.{projection}_proj.weight{ending}"
            pieces[piece] = (
                StoredTensor((rows, width), whole.dtype, file, size, first)
                if apart == 1
                else SpreadTensor((rows, width), whole.dtype, file, size, first, row, apart * row)
            )
    return pieces
