"""The data files of an ONNX export, worked out from names, shapes and dtypes before a weight is read.

    outer.data       embedding, final norm, head
    layer_<n>.data   everything of a layer; the routed experts stacked

Tensors keep their stored dtype and their bytes; the graph casts them to float32. INT4 codes keep their bytes too; their scales
are written as float32, which holds every bfloat16 number, or as float16. Every stored tensor has its place, row by row: what is
stacked or interleaved (gate and up rows of an expert, as `QMoE` wants them) is a first byte and a distance from row to row, so
that each can be written alone, in blocks of rows, in any order.

Shape legend: E experts; D hidden size; F intermediate size of one expert; B inputs that share a scale in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from glm5_port.backends.onnxruntime.int4 import GROUP_SIZES
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import FLOATS
from glm5_port.model.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors, layer_prefix
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE
from glm5_port.quant.output_files import ITEM_BYTES, Place
from glm5_port.quant.packing import CODES_PER_WORD

ALIGNMENT = 4096
"""Initializers begin at multiples of it, so that they can be mapped."""
OUTER = "outer.data"
CODES, SCALES = ".codes", ".scales"
"""Endings of the initializers that stand for an INT4 weight."""
NIBBLES = ".nibbles"
"""Ending of a second name for the bytes of codes, as UINT4: what standard operators decode."""
SCALE_DTYPES = {"float32": "F32", "float16": "F16"}
_LISTED = 10
"""Problems that an error lists."""


class Described(Protocol):
    """What is known of a stored tensor: its shape and its safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Initializer:
    """A tensor of a graph: its dtype ("F32", "F16", "BF16", "U8"), its shape, its file, and its first byte there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    first: int

    @property
    def bytes(self) -> int:
        """How many it has."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """What one stored tensor gives to a file: its name ("..._packed" and "..._scale" of an INT4 weight are two), and where its
    rows lie. Scales are written in the dtype of the initializer, once for every block of their group; all else byte for byte."""

    source: str
    place: Place


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: its name, its bytes, the initializers that lie in it, and the parts that fill them; what no part covers is zero.
    Parts of one expert follow each other."""

    file: str
    bytes: int
    initializers: tuple[Initializer, ...]
    parts: tuple[Part, ...]


def data_files(config: Glm5Config, tensors: Mapping[str, Described], *, scales: str = "float32") -> tuple[DataFile, ...]:
    """The data files of a checkpoint.

    Args:
        config: of the model; which weights are INT4 is told by `tensors`.
        tensors: what the checkpoint holds: floats under their names, INT4 weights as "....weight_packed" and "....weight_scale".
            The MTP layer is taken along if it is there.
        scales: "float32", or "float16", which does not hold every bfloat16 number.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        InputError: a dtype or a group size that the graphs cannot take, or another kind of scales.
    """
    if scales not in SCALE_DTYPES:
        raise InputError(f"onnx: scales = {scales!r} is not known; known are {', '.join(SCALE_DTYPES)}")
    shapes = {name: spec.shape for name, spec in expected_tensors(replace(config, int4=None), has_mtp(config, tensors)).items()}
    if problems := list(_problems(shapes, tensors)):
        raise CheckpointError("\n  ".join(["a checkpoint that is not whole cannot be written as ONNX", *problems[:_LISTED]]))
    files = [_data_file(OUTER, [EMBEDDING, FINAL_NORM, LM_HEAD], config, tensors, scales)]
    of_layers: dict[str, list[str]] = {layer_prefix(layer): [] for layer in all_layers(config, tensors)}
    for name in shapes:
        if (prefix := ".".join(name.split(".")[:3]) + ".") in of_layers:
            of_layers[prefix].append(name)
    for layer, names in zip(all_layers(config, tensors), of_layers.values(), strict=True):
        files.append(_data_file(f"layer_{layer}.data", names, config, tensors, scales))
    return tuple(files)


def weight_file(file: str, name: str, tensors: Mapping[str, Described]) -> DataFile:
    """A data file of one weight, with float32 scales if it is INT4."""
    layout = _Layout(file)
    parts = tuple(_matrix(name, layout, tensors, "float32"))
    return DataFile(file, layout.end, tuple(layout.initializers), parts)


def has_mtp(config: Glm5Config, tensors: Iterable[str]) -> bool:
    """Whether the MTP layer is among the tensors."""
    return config.mtp_layer is not None and any(name.startswith(layer_prefix(config.mtp_layer)) for name in tensors)


def all_layers(config: Glm5Config, tensors: Iterable[str]) -> tuple[int, ...]:
    """The layers of the trunk, and the MTP layer if it is there."""
    last = config.mtp_layer
    return (*config.layers, last) if last is not None and has_mtp(config, tensors) else config.layers


def _is_packed(name: str, tensors: Mapping[str, Described]) -> bool:
    return name + PACKED in tensors


def _problems(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Described]) -> Iterator[str]:
    """What is missing, or has another shape or a dtype that no graph takes."""
    for name, shape in shapes.items():
        packed = _is_packed(name, tensors)
        parts = (name + PACKED, name + SCALE) if packed else (name,)
        missing = [part for part in parts if part not in tensors]
        yield from (f"{part} is missing" for part in missing)
        if missing:
            continue
        stored, expected = tensors[parts[0]], (shape[0], shape[1] // CODES_PER_WORD) if packed else shape
        if stored.shape != expected:
            yield f"{parts[0]} has the shape {list(stored.shape)}, expected {list(expected)}"
        if not packed and stored.dtype not in FLOATS:
            yield f"{name} is stored as {stored.dtype}, expected {', '.join(FLOATS)}: export it as compressed-tensors first"


# -- one file ------------------------------------------------------------------------------------------------------------


class _Layout:
    """Places initializers one after the other."""

    def __init__(self, file: str) -> None:
        self.file, self.end = file, 0
        self.initializers: list[Initializer] = []

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> Initializer:
        added = Initializer(name, dtype, shape, self.file, self.end + -self.end % ALIGNMENT)
        self.initializers.append(added)
        self.end = added.first + added.bytes
        return added


def _data_file(file: str, names: list[str], config: Glm5Config, tensors: Mapping[str, Described], scales: str) -> DataFile:
    layout, parts = _Layout(file), list[Part]()
    experts = next((name for name in names if _EXPERTS in name), None)
    for name in names:
        if _EXPERTS not in name:
            parts += _matrix(name, layout, tensors, scales)
    if experts is not None:
        prefix = experts.partition(_EXPERTS)[0] + _EXPERTS
        stacked = _packed_experts if _is_packed(experts, tensors) else _float_experts
        parts += stacked(prefix, config.n_routed_experts, layout, tensors, scales)
    return DataFile(file, layout.end, tuple(layout.initializers), tuple(parts))


def _matrix(name: str, layout: _Layout, tensors: Mapping[str, Described], scales: str) -> Iterator[Part]:
    """A weight outside of the experts: as it is, or codes and scales."""
    if not _is_packed(name, tensors):
        stored = tensors[name]
        yield _rows(name, stored.shape[0], layout.add(name, stored.dtype, stored.shape))
        return
    packed = _Packed.of(name, tensors)
    codes = layout.add(name + CODES, "U8", (packed.rows, packed.blocks, packed.block // 2))
    yield _rows(name + PACKED, packed.rows, codes)
    yield _rows(name + SCALE, packed.rows, layout.add(name + SCALES, SCALE_DTYPES[scales], (packed.rows, packed.blocks)))


def _rows(source: str, rows: int, whole: Initializer, *, of: int = 0, first: int = 0, apart: int = 1) -> Part:
    """Rows of a tensor as every `apart`-th of the `of` rows of an initializer, from row `first` on; by default as all of it."""
    row = whole.bytes // (of or rows)
    return Part(source, Place(whole.first + first * row, *((row, apart * row) if apart > 1 else (0, 0))))


# -- experts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Packed:
    """The size of one stored INT4 weight, and the inputs that share a scale in the graph."""

    rows: int
    width: int
    block: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Described]) -> _Packed:
        (rows, words), (_, groups) = tensors[name + PACKED].shape, tensors[name + SCALE].shape
        width = words * CODES_PER_WORD
        group = width // groups
        fitting = [size for size in GROUP_SIZES if group % size == 0]
        if not fitting:
            raise InputError(
                f"onnx: {name} has groups of {group}; ONNX Runtime takes groups of {', '.join(map(str, GROUP_SIZES))} and whole "
                "multiples of them"
            )
        return cls(rows, width, fitting[-1])

    @property
    def blocks(self) -> int:
        """Scales of a row in the graph."""
        return self.width // self.block


def _packed_experts(prefix: str, experts: int, layout: _Layout, tensors: Mapping[str, Described], scales: str) -> Iterator[Part]:
    """gate_up codes [E, 2F, D / 2] and scales [E, 2F, D / B], down codes [E, D, F / 2] and scales [E, D, F / B]."""
    places = {}
    for stack, projections in _STACKS.items():
        names = [f"{prefix}{expert}.{projection}_proj.weight" for expert in range(experts) for projection in projections]
        one = _Packed.of(names[0], tensors)
        if other := next((name for name in names if _Packed.of(name, tensors) != one), None):
            raise CheckpointError(f"onnx: {other} differs from {names[0]} in its shape or its groups")
        rows = one.rows * len(projections)
        codes = layout.add(f"{prefix}{stack}{CODES}", "U8", (experts, rows, one.width // 2))
        row_scales = layout.add(f"{prefix}{stack}{SCALES}", SCALE_DTYPES[scales], (experts, rows, one.blocks))
        places[stack] = names, one.rows, codes, row_scales
    for expert in range(experts):
        for stack, (names, rows, codes, row_scales) in places.items():
            apart = len(_STACKS[stack])
            for number in range(apart):
                name, first = names[expert * apart + number], expert * apart * rows + number
                yield _rows(name + PACKED, rows, codes, of=len(names) * rows, first=first, apart=apart)
                yield _rows(name + SCALE, rows, row_scales, of=len(names) * rows, first=first, apart=apart)


def _float_experts(prefix: str, experts: int, layout: _Layout, tensors: Mapping[str, Described], scales: str) -> Iterator[Part]:
    """gate and up [E, F, D] and down [E, D, F] as they are stored."""
    for projection in ("gate", "up", "down"):
        names = [f"{prefix}{expert}.{projection}_proj.weight" for expert in range(experts)]
        kinds = {tensors[name].dtype if name in tensors else "INT4" for name in names}
        if len(kinds) > 1:
            raise CheckpointError(
                f"onnx: {names[0]} and its kin are stored as {', '.join(sorted(kinds))}; one tensor holds them all"
            )
        rows, width = tensors[names[0]].shape
        whole = layout.add(prefix + projection, kinds.pop(), (experts, rows, width))
        yield from (_rows(name, rows, whole, of=experts * rows, first=expert * rows) for expert, name in enumerate(names))


_EXPERTS = ".mlp.experts."
_STACKS = {"gate_up": ("gate", "up"), "down": ("down",)}
"""Initializers of the stacked INT4 experts, and whose rows alternate in each."""
