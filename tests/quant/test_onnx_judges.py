"""Judges of what ONNX makes of our codes and scales: onnx's own reference evaluator, and onnxruntime."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from glm5_port.backends.onnxruntime.sessions import IR_VERSION, OPSET
from glm5_port.config import Glm5Config
from glm5_port.model.stored_tensors import read_directory
from glm5_port.operators.indexer import select_top_k
from glm5_port.quant.export import export
from glm5_port.quant.files import Reader, as_bytes
from glm5_port.quant.formats.onnx import DECODER, export_linear, plan_onnx
from glm5_port.quant.formats.onnx_data import weight_file
from glm5_port.quant.formats.onnx_graph import Graph
from glm5_port.quant.int4 import dequantize
from glm5_port.quant.packing import pack_int4, unpack_int4
from tests.model.models import prompt
from tests.quant import exports
from tests.quant.onnx_models import GLM_52, unrounded, write_float

GROUP = 32


def every_code_and_mantissa() -> tuple[Tensor, Tensor]:
    """Codes [2048, 32] in our words and scales [2048, 1]: all 16 codes by all 128 mantissas, at small, middle and large sizes and
    in both signs."""
    mantissas = torch.arange(128, dtype=torch.int16)
    scales = torch.cat([((exponent << 7) + mantissas).view(torch.bfloat16) for exponent in (1, 17, 60, 110, 120, 127, 200, 250)])
    scales = torch.cat((scales, -scales)).unsqueeze(1)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(scales.shape[0], GROUP // 16)
    return pack_int4(codes), scales


def dequantize_linear(packed: Tensor, scales: Tensor, kind: int, opset: int) -> onnx.ModelProto:
    """A graph of one `DequantizeLinear` over INT4: our bytes with the highest bit of each nibble turned."""
    rows, width = packed.shape[0], packed.shape[1] * 8
    bytes_ = (packed.contiguous().view(torch.uint8) ^ 0x88).numpy().tobytes()
    stored = scales.view(torch.int16).numpy().tobytes() if kind == TensorProto.BFLOAT16 else scales.float().numpy().tobytes()
    weights = [
        helper.make_tensor("codes", TensorProto.INT4, [rows, width], bytes_, raw=True),
        helper.make_tensor("scales", kind, list(scales.shape), stored, raw=True),
    ]
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=1, block_size=GROUP)
    graph = helper.make_graph([node], "decode", [], [helper.make_tensor_value_info("y", kind, [rows, width])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def unrounded_values(packed: Tensor, scales: Tensor) -> Tensor:
    """q * s in float32."""
    codes = unpack_int4(packed).float().unflatten(-1, (scales.shape[-1], -1))
    return (codes * scales.float().unsqueeze(-1)).flatten(-2)


# -- our bytes by the standard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_the_reference_evaluator_decodes_our_codes_in_both_types(opset: int) -> None:
    """float32 scales give q * s, bfloat16 scales bf16(q * s): the numbers of our dequantiser, bit for bit."""
    packed, scales = every_code_and_mantissa()
    (wide,) = ReferenceEvaluator(dequantize_linear(packed, scales, TensorProto.FLOAT, opset)).run(None, {})
    assert wide.dtype == np.float32
    assert torch.equal(torch.from_numpy(wide).view(torch.int32), unrounded_values(packed, scales).view(torch.int32))
    (narrow,) = ReferenceEvaluator(dequantize_linear(packed, scales, TensorProto.BFLOAT16, opset)).run(None, {})
    assert narrow.dtype == ml_dtypes.bfloat16
    right = dequantize(unpack_int4(packed), scales)
    assert torch.equal(torch.from_numpy(narrow.view(np.int16)), right.view(torch.int16))


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_onnxruntime_decodes_our_codes_by_the_standard_operator(opset: int) -> None:
    packed, scales = every_code_and_mantissa()
    model = dequantize_linear(packed, scales, TensorProto.FLOAT, opset).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    shown = torch.from_numpy(session.run(None, {})[0])
    assert torch.equal(shown.view(torch.int32), unrounded_values(packed, scales).view(torch.int32))


# -- our files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judges")
    export(exports.write_source(root / "source"), root / "int4", exports.SMALL_SHARDS)
    return root / "int4"


def test_a_written_weight_as_uint4_in_both_engines(canonical: Path, tmp_path: Path) -> None:
    """The decoded form, which needs standard operators only, on the bytes that `MatMulNBits` reads too."""
    name = exports.expert(2, 3, "down")
    export_linear(canonical, name, tmp_path / "linear.onnx")
    stored = read_directory(canonical).tensors
    graph = Graph([weight_file("linear.onnx.data", name, stored)])
    graph.output(graph.weight(name), "w", [64, 96])
    path = tmp_path / "decoded.onnx"
    path.write_bytes(graph.serialised("decoded", {}))
    with Reader(canonical) as reader:
        right = unrounded_values(reader.whole(stored[f"{name}_packed"]), reader.whole(stored[f"{name}_scale"]))
    (reference,) = ReferenceEvaluator(str(path)).run(None, {})
    (runtime,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})
    identity = onnxruntime.InferenceSession(tmp_path / "linear.onnx", providers=["CPUExecutionProvider"])
    (product,) = identity.run(None, {"x": np.eye(96, dtype=np.float32)})
    for shown in (reference, runtime, product.T):
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(shown)), right)


def write_plainly(checkpoint: Path, folder: Path) -> None:
    """Decoder and data files of a checkpoint without INT4, which `export` does not write."""
    plan = plan_onnx(Glm5Config.from_json(checkpoint), read_directory(checkpoint).tensors)
    for file in plan.files:
        data = bytearray(file.bytes)
        for part in file.parts:
            made = as_bytes(exports.read_all(checkpoint)[part.source])
            data[part.place.first : part.place.first + len(made)] = made
        (folder / file.file).write_bytes(data)
    (folder / DECODER).write_bytes(plan.graphs[DECODER]())


def test_the_reference_evaluator_runs_a_whole_decoder(tmp_path: Path) -> None:
    """With experts in floating point a decoder has standard operators only."""
    checkpoint = write_float(tmp_path / "float", **GLM_52)
    write_plainly(checkpoint, tmp_path)
    onnx.checker.check_model(str(tmp_path / "decoder.onnx"), full_check=True)
    model = onnx.load(tmp_path / "decoder.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    evaluator, tokens = ReferenceEvaluator(model), prompt(12, vocabulary=90)
    past = {put.name: [1, 0, put.type.tensor_type.shape.dim[2].dim_value] for put in model.graph.input if "past" in put.name}
    fed = {name: np.zeros(shape, np.float32) for name, shape in past.items()}
    shown = []
    for first, end in ((0, 7), (7, 12)):
        ids, positions = np.array([tokens[first:end]]), np.arange(first, end)[None]
        results = dict(
            zip(evaluator.output_names, evaluator.run(None, {"input_ids": ids, "position_ids": positions, **fed}), strict=True)
        )
        shown.append(torch.from_numpy(results["logits"][0]))
        fed = {name: results[name.replace("past", "present")] for name in fed}
    right = unrounded(checkpoint).forward(torch.tensor([tokens]))[0]
    assert float((torch.cat(shown) - right).abs().max() / right.abs().max()) < 1e-5


# -- the tie rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
@pytest.mark.parametrize("top_k", [1, 4, 63, 300])
def test_the_best_of_equals_are_the_lowest_positions(engine: str, top_k: int) -> None:
    """`TopK` on plateaus: zeros of both signs, a few values many times, and -inf where a position may not be selected."""
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randint(-2, 3, (9, 300), generator=generator).float()
    scores[scores == 0] *= torch.randint(0, 2, (int((scores == 0).sum()),), generator=generator) * 2.0 - 1
    scores[scores == -2] = -torch.inf
    scores[7], scores[8] = 0.0, -torch.inf
    scores[8, 5] = -3.0
    put = helper.make_tensor_value_info("x", TensorProto.FLOAT, [9, 300])
    ends = [helper.make_tensor_value_info("at", TensorProto.INT64, [9, top_k])]
    kept = helper.make_tensor("k", TensorProto.INT64, [1], [top_k])
    graph = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["best", "at"])], "best", [put], ends, [kept])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    if engine == "reference":
        runner = ReferenceEvaluator(model)
    else:
        runner = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (shown,) = runner.run(["at"], {"x": scores.numpy()})
    assert (np.take_along_axis(scores.numpy(), shown, 1) == scores.sort(dim=1, descending=True).values[:, :top_k].numpy()).all()
    ours = select_top_k.reference(scores, top_k=top_k)
    for row, at in enumerate(torch.from_numpy(shown)):
        assert at[scores[row, at] > -torch.inf].sort().values.tolist() == ours[row][ours[row] >= 0].tolist()
