"""A canonical INT4 checkpoint as ONNX graphs with external data, for ONNX Runtime without torch.

    decoder.onnx     token ids, positions and caches in; logits, hidden states and caches out
    mtp.onnx         the MTP layer, where the checkpoint has one
    layer_<n>.onnx   the router and the routed experts of a layer alone, over the same bytes
    *.data           the weights: a file for each layer and one for what lies outside of them

`plan_onnx` works all of it out from names, shapes and dtypes: every file with its size and where each stored tensor goes, and a
function for each graph. Nothing is written by it. `export_onnx` is the plain writer, one tensor after the other.

INT4 weights compute in float32 with q * s, not bf16(q * s): routed experts by `QMoE`, others by `MatMulNBits`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.config_file import read_json
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import StoredTensor, StoredTensors, read_directory
from glm5_port.model.tensors import layer_prefix
from glm5_port.quant.config_text import KEY
from glm5_port.quant.files import PART, Reader, as_bytes, as_tensor, sync_directory, write_at, write_whole
from glm5_port.quant.formats.compressed_tensors import PACKED
from glm5_port.quant.formats.onnx_data import (
    CODES,
    DataFile,
    Described,
    all_layers,
    data_files,
    has_mtp,
    weight_file,
)
from glm5_port.quant.formats.onnx_decoder import decoder_graph, experts_graph, mtp_graph
from glm5_port.quant.formats.onnx_graph import Graph, onnx_module
from glm5_port.quant.writing import spread

DECODER, MTP = "decoder.onnx", "mtp.onnx"
DATA = ".data"
BLOCK_BYTES = 16 * 2**20
"""What is read and written at once, at least a row."""


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """What an ONNX export consists of.

    Attributes:
        files: the data files. Each `Part` says which stored tensor goes where, and what becomes of its rows on the way (only
            scales change: to float32 or float16); parts may be written in any order, some rows at a time.
        graphs: name of each graph -> makes its bytes. A graph belongs beside the data files, and is written after them.
    """

    files: tuple[DataFile, ...]
    graphs: Mapping[str, Callable[[], bytes]]


def plan_onnx(config: Glm5Config, tensors: Mapping[str, Described], *, scales: str = "float32") -> OnnxPlan:
    """Plans an export from headers; no weight is read.

    Args:
        config: of the model, with the latent-norm eps that the graphs shall compute with. Its `int4` is not looked at.
        tensors: name -> anything with `shape` and a safetensors `dtype`: the tensors of a canonical checkpoint. Weights may be
            INT4 ("..._packed" and "..._scale") or floats, each on its own; the routed experts of a layer must be alike. Other
            tensors ("..._shape", unknown ones) are not read. The MTP layer is taken along if it is there.
        scales: "float32", or "float16": half the bytes; refused while writing where it does not hold a scale exactly.

    Returns:
        The plan.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        InputError: a dtype or a group size that the graphs cannot take, other scales, or onnx is not installed.
    """
    onnx_module()
    files = data_files(config, tensors, scales=scales)
    graphs: dict[str, Callable[[], bytes]] = {DECODER: lambda: decoder_graph(config, files)}
    if has_mtp(config, tensors):
        graphs[MTP] = lambda: mtp_graph(config, files)
    for layer in all_layers(config, tensors):
        if f"{layer_prefix(layer)}mlp.experts.0.gate_proj.weight{PACKED}" in tensors:
            graphs[f"layer_{layer}.onnx"] = _experts_of(config, layer, files)
    return OnnxPlan(files, graphs)


def _experts_of(config: Glm5Config, layer: int, files: tuple[DataFile, ...]) -> Callable[[], bytes]:
    return lambda: experts_graph(config, layer, files)


def export_onnx(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    scales: str = "float32",
    latent_norm_eps: float | None = None,
) -> list[Path]:
    """Writes the graphs and the data files of a checkpoint.

    Args:
        source: directory of a checkpoint whose routed experts are compressed-tensors `pack-quantized`.
        destination: directory; made if it does not exist. Graphs appear after their data, each file whole.
        scales: as in `plan_onnx`.
        latent_norm_eps: eps of the two latent norms; None means rms_norm_eps, 1e-6 is what Hugging Face computes with.

    Returns:
        The graphs.

    Raises:
        As `plan_onnx`; InputError also for a checkpoint without INT4 experts.
    """
    directory, target = Path(source), Path(destination)
    config, stored = _opened(directory)
    config = replace(config, latent_norm_eps=latent_norm_eps or config.latent_norm_eps)
    if not any(name.endswith(PACKED) and ".mlp.experts." in name for name in stored.tensors):
        raise InputError(f"onnx: {directory} has no INT4 experts\n  Export it as compressed-tensors first.")
    plan = plan_onnx(config, stored.tensors, scales=scales)
    return write_onnx(plan, stored, directory, target)


def write_onnx(plan: OnnxPlan, stored: StoredTensors, source: Path, destination: Path) -> list[Path]:
    """Writes what was planned, one tensor after the other.

    Args:
        plan: of these tensors.
        stored: what the source holds.
        source: directory of the checkpoint.
        destination: directory; made if it does not exist.

    Returns:
        The graphs.

    Raises:
        InputError: a scale that float16 does not hold.
        CheckpointError, OSError: a file cannot be read or written; the files before it stay.
    """
    destination.mkdir(parents=True, exist_ok=True)
    with Reader(source) as reader:
        for file in plan.files:
            _write_data(destination / file.file, file, stored, reader)
    for name, made in plan.graphs.items():
        write_whole(destination / name, made())
    return [destination / name for name in plan.graphs]


def export_linear(source: str | PathLike[str], name: str, path: str | PathLike[str]) -> Path:
    """Writes one INT4 weight as a graph from "x" [rows, in] to "y" [rows, out], and its data file.

    Args:
        source: directory of a canonical checkpoint.
        name: of the weight, "....weight".
        path: of the graph.

    Raises:
        InputError: as `plan_onnx`, or no such INT4 weight.
    """
    directory, target = Path(source), Path(path)
    _, stored = _opened(directory)
    if name + PACKED not in stored.tensors:
        raise InputError(f"onnx: {directory} has no INT4 weight {name}")
    file = weight_file(target.name + DATA, name, stored.tensors)
    graph = Graph([file])
    rows, blocks, half = graph.shape_of(name + CODES)
    graph.output(graph.linear(graph.input("x", ["rows", 2 * half * blocks]), name), "y", ["rows", rows])
    with Reader(directory) as reader:
        _write_data(target.with_name(file.file), file, stored, reader)
    write_whole(target, graph.serialised("linear", {}))
    return target


def _opened(directory: Path) -> tuple[Glm5Config, StoredTensors]:
    """The config, and what is stored. Which weights are INT4 is told by their tensors, not by the quantization_config."""
    raw = read_json(directory)
    config, stored = Glm5Config.from_dict({key: value for key, value in raw.items() if key != KEY}), read_directory(directory)
    if stored.faults:
        raise CheckpointError("\n  ".join([f"{directory} cannot be written as ONNX", *stored.faults]))
    return config, stored


def _write_data(path: Path, file: DataFile, stored: StoredTensors, reader: Reader) -> None:
    """One data file, whole or not at all."""
    temporary = path.with_name(path.name + PART)
    try:
        with temporary.open("wb") as stream:
            stream.truncate(file.bytes)
            for part in file.parts:
                done = 0
                for rows in _row_blocks(stored.tensors[part.source], part.rows, reader):
                    data = as_bytes(rows if part.convert is None else part.convert(rows))
                    for some, place in spread(part.place, done, data):
                        write_at(stream.fileno(), some, place)
                    done += len(data)
                if done != part.rows * part.row:
                    raise CheckpointError(f"onnx: {part.source} gives {done:,} bytes instead of {part.rows * part.row:,}")
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _row_blocks(tensor: StoredTensor, rows: int, reader: Reader) -> Iterator[Tensor]:
    """A tensor, some rows at a time."""
    row_bytes = tensor.bytes // rows
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield as_tensor(
            reader.bytes(tensor, first * row_bytes, (end - first) * row_bytes), tensor.dtype, (end - first, *tensor.shape[1:])
        )
