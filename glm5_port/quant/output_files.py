"""The files of an output: which there are, what lies where in them, and from which tensor of the source each byte comes.

A worker takes one tensor of the source, makes its *pieces* a block of rows at a time, and writes each row at its place. A piece
is what one source tensor gives to one tensor of a file:

    safetensors   a whole tensor: `P.weight_packed`
    GGUF          one expert of a stack: `blk.3.ffn_gate_exps.weight[5]`
    ONNX          every other row of one expert, where gate and up are interleaved: `gate_up_codes[5].gate`

Piece names are unique in an output; the manifest, `verify` and `inspect` know pieces by them. Stacks, concatenations along any
dimension and interleaved rows are all a first byte, bytes of a row, and the distance from row to row (`Place`). So no piece
needs two source tensors, each is quantised once, and journal, resume, workers, memory bound, dry run, manifest and recomputation
are the same for every kind of file.

A format tells five things, and writes nothing itself:

    pieces      `Format.tensors` of a weight in INT4; `Container.kept` of any other tensor
    bytes       `Format.encode`: rows of codes and scales as rows of its pieces; `Kept.convert`: rows of values likewise
    files       `Container.lay_out`: the shards, each with the tensors it is made from, the places of their pieces, and the bytes
                that come from no tensor (headers, constants)
    texts       `Container.texts`: small files that follow from the plan alone (an index, ONNX graphs), written when all shards
                are there
    reading     `Container.read`: the pieces of a directory again, from its files alone; `Container.problems`: what the files say
                beside tensors (metadata, nodes of a graph) that is not what config.json says

Codes and scales come from the quantiser, or from an INT4 source bit for bit; a format does not see which.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.stored_tensors import StoredTensor, StoredTensors, read_directory
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
INDEX = ".safetensors.index.json"
"""Ending of the name of the index."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A piece that will be written: its name, safetensors dtype ("U8" for packed bytes), shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: Sequence[int]) -> OutputTensor:
        """One whose bytes follow from its shape."""
        return cls(name, dtype, tuple(shape), math.prod(shape) * ITEM_BYTES[dtype])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies in its file.

    Attributes:
        first: its first byte, counted from the beginning of the file.
        row: bytes of a row; 0 for a piece whose bytes follow each other without gaps.
        stride: bytes from the first byte of a row to that of the next; 0 likewise.
    """

    first: int
    row: int = 0
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """What becomes of a tensor that is not quantised.

    Attributes:
        outputs: its pieces.
        convert: rows of the tensor in its stored dtype (bfloat16 of block-FP8) -> rows of its pieces by name; None where its
            bytes are copied to the one piece. A vector has rows of one element.
        multiple: `convert` gets rows in multiples of this; 0: all rows at once, only for tensors that are small in every model.
    """

    outputs: tuple[OutputTensor, ...]
    convert: Callable[[Tensor], Mapping[str, Tensor]] | None = None
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A stored tensor and what becomes of it.

    Attributes:
        name: in the source.
        action: "int4", "repack", "int8", "bf16", "convert" or "carry".
        component: the part of the model it belongs to.
        mtp: whether it belongs to the MTP layer.
        source: where it lies; of a repacked weight the shape [out, in], and how many bytes its parts have.
        multipliers: where its block-FP8 multipliers lie, if it has any.
        outputs: the pieces that are written for it.
        parts: of a repacked weight, its stored tensors by name.
        kept: of a tensor that is not quantised, how its pieces come about.
    """

    name: str
    action: str
    component: str
    mtp: bool
    source: StoredTensor
    multipliers: StoredTensor | None
    outputs: tuple[OutputTensor, ...]
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    kept: Kept | None = None

    @property
    def layer(self) -> int | None:
        """Index of its layer; None outside of the layers."""
        found = re.search(r"\.layers\.(\d+)\.", f".{self.name}")
        return None if found is None else int(found[1])

    @property
    def copied(self) -> bool:
        """Whether its bytes are copied to its one piece as they are."""
        return self.kept is not None and self.kept.convert is None and self.multipliers is None

    @property
    def files(self) -> set[str]:
        """The files of the source that it lies in."""
        multipliers = [] if self.multipliers is None else [self.multipliers]
        return {stored.file for stored in (self.source, *multipliers, *self.parts.values())}

    @property
    def bytes(self) -> int:
        """Of its outputs."""
        return sum(output.bytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file that holds weights: the unit that the journal records, and that a resumed run keeps or writes again.

    Attributes:
        file: its name.
        tensors: what it is made from, in the order in which workers take them. All pieces of a tensor lie in one file.
        fixed: first byte -> bytes that come from no tensor. What neither these nor pieces cover is zero.
        places: piece -> where it lies.
        bytes: of the whole file.
    """

    file: str
    tensors: tuple[PlannedTensor, ...]
    fixed: Mapping[int, bytes]
    places: Mapping[str, Place]
    bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What files may depend on beside their tensors.

    Attributes:
        config: of the model, without its quantisation.
        rule: how weights are quantised.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        source: directory with the tokenizer; None when planned from a config.json alone.
    """

    config: Glm5Config
    rule: Int4Rule
    max_shard_bytes: int
    source: Path | None


class Container(Protocol):
    """One kind of file. See the head of this file."""

    def kept(self, name: str, stored: StoredTensor, config: Glm5Config) -> Kept:
        """What becomes of a tensor that is not quantised.

        Args:
            name: in the source.
            stored: its dtype, shape and bytes: "BF16" of block-FP8, which arrives multiplied out.
            config: of the model.

        Raises:
            InputError: these files cannot hold it.
        """

    def lay_out(self, tensors: Sequence[PlannedTensor], facts: Facts) -> tuple[Shard, ...]:
        """The files of weights. Pure: the same tensors and facts give the same files.

        Raises:
            InputError: a model that these files cannot hold.
        """

    def texts(self, shards: Sequence[Shard], facts: Facts) -> dict[str, bytes]:
        """Files that follow from the plan alone: name -> content."""

    def notes(self, facts: Facts) -> list[str]:
        """What is worth knowing about these files before they are written, one sentence each."""

    def read(self, directory: Path) -> StoredTensors:
        """The pieces that lie in a directory, by the names that `lay_out` gave them. Faults of single files are gathered in the
        result.

        Raises:
            CheckpointError: there is no such file at all.
        """

    def problems(self, directory: Path, stored: StoredTensors, facts: Facts) -> list[str]:
        """What the files say beside tensors that is not what config.json (`facts`) says."""

    def is_here(self, directory: Path) -> bool:
        """Whether a directory without manifest and quantization_config looks as if it held such files."""


class Safetensors:
    """Shards of safetensors and their index. Tensors that are not quantised keep name, dtype and bytes."""

    def __init__(self, stem: str = "model") -> None:
        """`stem`: what the names of the files begin with."""
        self.stem = stem

    def kept(self, name: str, stored: StoredTensor, config: Glm5Config) -> Kept:
        """Itself."""
        return Kept((OutputTensor(name, stored.dtype, stored.shape, stored.bytes),))

    def lay_out(self, tensors: Sequence[PlannedTensor], facts: Facts) -> tuple[Shard, ...]:
        """Fills shards in order; the tensors that stand for one weight stay together."""
        groups = fill([[tensor] for tensor in tensors], facts.max_shard_bytes)
        return tuple(
            self._shard(f"{self.stem}-{number:05}-of-{len(groups):05}.safetensors", group)
            for number, group in enumerate(groups, start=1)
        )

    def texts(self, shards: Sequence[Shard], facts: Facts) -> dict[str, bytes]:
        """The index: total_size counts the bytes of the tensors."""
        placed = {output.name: shard.file for shard in shards for tensor in shard.tensors for output in tensor.outputs}
        size = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        return {f"{self.stem}{INDEX}": (json.dumps(index, indent=2) + "\n").encode()}

    def notes(self, facts: Facts) -> list[str]:
        """None."""
        return []

    def read(self, directory: Path) -> StoredTensors:
        """The headers of all shards, compared with the index."""
        return read_directory(directory, f"{self.stem}{INDEX}")

    def problems(self, directory: Path, stored: StoredTensors, facts: Facts) -> list[str]:
        """None: headers say nothing but tensors."""
        return []

    def is_here(self, directory: Path) -> bool:
        """Any safetensors file."""
        return any(directory.glob("*.safetensors*"))

    def _shard(self, file: str, tensors: Sequence[PlannedTensor]) -> Shard:
        """Wider elements come first, so that every tensor is aligned to its element."""
        outputs = [output for tensor in tensors for output in tensor.outputs]
        outputs.sort(key=lambda output: -ITEM_BYTES.get(output.dtype, 1))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for output in outputs:
            entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [end, end + output.bytes]}
            starts[output.name] = end
            end += output.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        places = {name: Place(len(header) + start) for name, start in starts.items()}
        return Shard(file, tuple(tensors), {0: header}, places, len(header) + end)


def fill(groups: Sequence[Sequence[PlannedTensor]], most: int) -> list[list[PlannedTensor]]:
    """Groups of tensors, none torn apart, in files of at most `most` bytes; a larger group has a file of its own."""
    files: list[list[PlannedTensor]] = [[]]
    size = 0
    for group in groups:
        bytes_ = sum(tensor.bytes for tensor in group)
        if files[-1] and size + bytes_ > most:
            files.append([])
            size = 0
        files[-1].extend(group)
        size += bytes_
    return files
