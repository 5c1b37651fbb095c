"""A canonical INT4 checkpoint as ONNX graphs with external data, for ONNX Runtime without torch.

    decoder.onnx     token ids, positions and caches in; logits, hidden states and caches out
    mtp.onnx         the MTP layer, where the checkpoint has one
    layer_<n>.onnx   the router and the routed experts of a layer alone, over the same bytes
    *.data           the weights: a file for each layer and one for what lies outside of them

`plan_onnx` works all of it out from names, shapes and dtypes: every file with its size and where each stored tensor goes, and a
function for each graph. Nothing is written by it: `export` and `transcode` do that (onnx_format.py). `export_linear` writes one
weight.

INT4 weights compute in float32 with q * s, not bf16(q * s): routed experts by `QMoE`, others by `MatMulNBits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.stored_tensors import read_directory
from glm5_port.model.tensors import layer_prefix
from glm5_port.quant.files import Reader, as_bytes, write_whole
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE
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

DECODER, MTP = "decoder.onnx", "mtp.onnx"
DATA = ".data"


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """What an ONNX export consists of.

    Attributes:
        files: the data files. Each `Part` says where a stored tensor goes; parts may be written in any order, some rows at a
            time.
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
        scales: "float32", or "float16": half the bytes, where it holds every scale.

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


def export_linear(source: str | PathLike[str], name: str, path: str | PathLike[str]) -> Path:
    """Writes one INT4 weight as a graph from "x" [rows, in] to "y" [rows, out], and its data file.

    Args:
        source: directory of a canonical checkpoint.
        name: of the weight, "....weight".
        path: of the graph.

    Raises:
        InputError: as `plan_onnx`, or no such INT4 weight.
        CheckpointError: a file that cannot be read.
    """
    directory, target = Path(source), Path(path)
    stored = read_directory(directory)
    if name + PACKED not in stored.tensors:
        raise InputError(f"onnx: {directory} has no INT4 weight {name}")
    file = weight_file(target.name + DATA, name, stored.tensors)
    graph = Graph([file])
    rows, blocks, half = graph.shape_of(name + CODES)
    graph.output(graph.linear(graph.input("x", ["rows", 2 * half * blocks]), name), "y", ["rows", rows])
    data = bytearray(file.bytes)
    with Reader(directory) as reader:
        for part in file.parts:
            whole = reader.whole(stored.tensors[part.source])
            if part.source.endswith(SCALE):
                whole = whole.to(torch.float32).repeat_interleave(blocks // whole.shape[1], dim=1)
            made = as_bytes(whole)
            data[part.place.first : part.place.first + len(made)] = made
    write_whole(target.with_name(file.file), bytes(data))
    write_whole(target, graph.serialised("linear", {}))
    return target
