"""INT4 weights of a canonical checkpoint as ONNX graphs with external data, for ONNX Runtime.

    linear   one weight: rows times W^T by `MatMulNBits`
    layer    the routed experts of a layer and their router: hidden state in, weighted sum of the experts out, by `QMoE`

Codes go in as the bytes they are (gate and up rows of an expert interleaved, as `QMoE` wants them), scales as float32, which
holds every bfloat16 number. The graphs compute in float32 with q * s, not bf16(q * s). Shared experts are not part of a layer's
graph.

Bytes are written to the data file as they are read, one expert at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.onnxruntime.int4 import GROUP_SIZES, interleaved, qmoe_node
from glm5_port.backends.onnxruntime.sessions import DOMAIN, IR_VERSION, MICROSOFT_OPSET, OPSET
from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.checkpoint_check import differences
from glm5_port.model.stored_tensors import StoredTensors, read_directory
from glm5_port.model.tensors import expected_tensors, layer_prefix
from glm5_port.quant.files import PART, Reader, as_bytes, sync_directory, write_whole
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE

DATA = ".data"
"""Ending of the file of bytes beside a graph."""
_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class _Weight:
    """An initializer: its shape, its ONNX type and its bytes, made when they are needed."""

    shape: tuple[int, ...]
    kind: int
    pieces: Iterable[Tensor]


def export_onnx(source: str | PathLike[str], destination: str | PathLike[str]) -> list[Path]:
    """Writes a graph and a data file for the routed experts of each layer with INT4 experts: layer_<number>.onnx.

    Args:
        source: directory of a checkpoint whose routed experts are compressed-tensors `pack-quantized`.
        destination: directory; made if it does not exist. A graph appears after its data, whole.

    Returns:
        The graphs, in the order of the layers.

    Raises:
        InputError: onnx is not installed, no INT4 experts, a group size that ONNX Runtime does not take, or groups of experts.
        CheckpointError: a checkpoint that is not whole.
    """
    directory, target = Path(source), Path(destination)
    config, stored = _opened(directory)
    if config.n_group != 1:
        raise InputError(f"onnx: n_group = {config.n_group}; QMoE chooses among all experts")
    layers = [layer for layer in _all_layers(config, stored) if config.has_int4_experts(layer)]
    target.mkdir(parents=True, exist_ok=True)
    with Reader(directory) as reader:
        return [_write_layer(target / f"layer_{layer}.onnx", config, layer, stored, reader) for layer in layers]


def export_linear(source: str | PathLike[str], name: str, path: str | PathLike[str]) -> Path:
    """Writes one INT4 weight as a graph from "x" [rows, in] to "y" [rows, out], and its data file.

    Args:
        source: directory of a canonical checkpoint.
        name: of the weight, "....weight".
        path: of the graph.

    Raises:
        InputError: as `export_onnx`, or no such INT4 weight.
    """
    onnx = _onnx()
    directory = Path(source)
    config, stored = _opened(directory)
    if name + PACKED not in stored.tensors:
        raise InputError(f"onnx: {directory} has no INT4 weight {name}")
    with Reader(directory) as reader:
        codes, scales = reader.whole(stored.tensors[name + PACKED]), reader.whole(stored.tensors[name + SCALE])
    size, (rows, width) = _group_size(config), (codes.shape[0], codes.shape[1] * 8)
    weights = {
        "codes": _Weight((rows, width // size, size // 2), onnx.TensorProto.UINT8, [codes]),
        "scales": _Weight((rows, width // size), onnx.TensorProto.FLOAT, [scales.to(torch.float32)]),
    }
    shape: dict[str, Any] = {"K": width, "N": rows, "bits": 4, "block_size": size, "accuracy_level": 0}
    node = onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain=DOMAIN, **shape)
    return _write(Path(path), [node], ("x", width), ("y", rows), weights)


# -- a layer -------------------------------------------------------------------------------------------------------------


def _write_layer(path: Path, config: Glm5Config, layer: int, stored: StoredTensors, reader: Reader) -> Path:
    onnx = _onnx()
    experts, dim, inner, size = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, _group_size(config)
    prefix = f"{layer_prefix(layer)}mlp."
    float32, byte = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8

    def floats(name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        tensor = reader.whole(stored.tensors[prefix + name]).to(torch.float32)
        yield tensor.t() if transpose else tensor

    def gate_up(part: str) -> Iterator[Tensor]:
        for expert in range(experts):
            names = [f"{prefix}experts.{expert}.{projection}_proj.weight{part}" for projection in ("gate", "up")]
            yield _as_stored(interleaved(torch.cat([reader.whole(stored.tensors[name]) for name in names])))

    def down(part: str) -> Iterator[Tensor]:
        for expert in range(experts):
            yield _as_stored(reader.whole(stored.tensors[f"{prefix}experts.{expert}.down_proj.weight{part}"]))

    weights = {
        "gate": _Weight((dim, experts), float32, floats("gate.weight", transpose=True)),
        "correction_bias": _Weight((experts,), float32, floats("gate.e_score_correction_bias")),
        "gate_up_codes": _Weight((experts, 2 * inner, dim // 2), byte, gate_up(PACKED)),
        "gate_up_scales": _Weight((experts, 2 * inner, dim // size), float32, gate_up(SCALE)),
        "down_codes": _Weight((experts, dim, inner // 2), byte, down(PACKED)),
        "down_scales": _Weight((experts, dim, inner // size), float32, down(SCALE)),
        "one": _Weight((1,), float32, [torch.ones(1)]),
        "scale": _Weight((1,), float32, [torch.tensor([config.routed_scaling_factor], dtype=torch.float32)]),
    }
    names = {"x": "hidden", "scores": "scores", "route_weights": "affinities"}
    names |= {name: name for name in ("gate_up_codes", "gate_up_scales", "down_codes", "down_scales")}
    choices = {"top_k": config.num_experts_per_tok, "group_size": size}
    nodes = [
        onnx.helper.make_node("MatMul", ["hidden", "gate"], ["logits"]),
        # Not `Sigmoid`: ONNX Runtime's is off by 1e-7 of one, which is much of a small affinity.
        onnx.helper.make_node("Neg", ["logits"], ["negative"]),
        onnx.helper.make_node("Exp", ["negative"], ["exponential"]),
        onnx.helper.make_node("Add", ["exponential", "one"], ["inverse"]),
        onnx.helper.make_node("Reciprocal", ["inverse"], ["affinities"]),
        onnx.helper.make_node("Add", ["affinities", "correction_bias"], ["scores"]),
        qmoe_node(names, "unscaled", renormalise=config.norm_topk_prob, **choices),
        onnx.helper.make_node("Mul", ["unscaled", "scale"], ["routed"]),
    ]
    return _write(path, nodes, ("hidden", dim), ("routed", dim), weights)


def _as_stored(tensor: Tensor) -> Tensor:
    """Codes as they are, scales in float32."""
    return tensor if tensor.dtype == torch.int32 else tensor.to(torch.float32)


# -- files ---------------------------------------------------------------------------------------------------------------


def _onnx() -> Any:
    try:
        import onnx
        import onnx.helper
    except ImportError as error:
        raise InputError("onnx is not installed: pip install 'glm5_port[onnx]'") from error
    return onnx


def _opened(directory: Path) -> tuple[Glm5Config, StoredTensors]:
    config, stored = Glm5Config.from_json(directory), read_directory(directory)
    _group_size(config)
    mtp = config.mtp_layer is not None and config.mtp_layer in _all_layers(config, stored)
    if found := differences(expected_tensors(config, mtp), stored, config):
        raise CheckpointError(f"{directory} cannot be written as ONNX\n" + "\n".join(found))
    return config, stored


def _all_layers(config: Glm5Config, stored: StoredTensors) -> tuple[int, ...]:
    last = config.mtp_layer
    there = last is not None and any(name.startswith(layer_prefix(last)) for name in stored.tensors)
    return (*config.layers, last) if there and last is not None else config.layers


def _group_size(config: Glm5Config) -> int:
    size = None if config.int4 is None else config.int4.group_size
    if size not in GROUP_SIZES:
        found = "no INT4 experts" if size is None else f"groups of {size}"
        raise InputError(f"onnx: this checkpoint has {found}; ONNX Runtime takes groups of {', '.join(map(str, GROUP_SIZES))}")
    return size


def _write(path: Path, nodes: list[Any], given: tuple[str, int], result: tuple[str, int], weights: Mapping[str, _Weight]) -> Path:
    """The data file, then the graph that names it."""
    onnx = _onnx()
    data = path.with_name(path.name + DATA)
    part = data.with_name(data.name + PART)
    initializers = []
    try:
        with part.open("wb") as stream:
            for name, weight in weights.items():
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                start = stream.tell()
                for piece in weight.pieces:
                    stream.write(as_bytes(piece))
                length = stream.tell() - start
                if length != math.prod(weight.shape) * (1 if weight.kind == onnx.TensorProto.UINT8 else 4):
                    raise CheckpointError(f"onnx: {name} has {length:,} bytes, and the shape {list(weight.shape)}")
                initializers.append(_initializer(onnx, name, weight, {"location": data.name, "offset": start, "length": length}))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, data)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["rows", width]) for n, width in (given, result)]
    graph = onnx.helper.make_graph(nodes, "glm5_port", ends[:1], ends[1:], initializers)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, MICROSOFT_OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="glm5_port")
    write_whole(path, model.SerializeToString())
    return path


def _initializer(onnx: Any, name: str, weight: _Weight, place: Mapping[str, Any]) -> Any:
    external = onnx.TensorProto.EXTERNAL
    declared = onnx.TensorProto(name=name, data_type=weight.kind, dims=list(weight.shape), data_location=external)
    for key, value in place.items():
        declared.external_data.add(key=key, value=str(value))
    return declared
