"""ONNX graphs of INT4 weights, run by ONNX Runtime against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.operators.moe import expert_mlp, route_experts
from glm5_port.quant.export import export
from glm5_port.quant.formats.onnx import export_linear
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from glm5_port.quant.transcode import transcode
from tests.quant import exports


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    export(exports.write_source(root / "source"), root / "int4", exports.SMALL_SHARDS)
    return root / "int4"


@pytest.fixture(scope="module")
def stored(canonical: Path) -> dict[str, Tensor]:
    return exports.read_all(canonical)


@pytest.fixture(scope="module")
def graphs(canonical: Path) -> list[Path]:
    """Those of the routed experts."""
    transcode(canonical, canonical.parent / "graphs", Options(format="onnx"))
    return sorted((canonical.parent / "graphs").glob("layer_*.onnx"))


def unrounded(stored: dict[str, Tensor], name: str) -> Tensor:
    """q * s in float32."""
    codes, scales = unpack_int4(stored[f"{name}_packed"]).float(), stored[f"{name}_scale"].float()
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def computed(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_the_identity_shows_a_linear_bit_for_bit(canonical: Path, stored: Any, tmp_path: Path, projection: str) -> None:
    name = exports.expert(2, 3, projection)
    path = export_linear(canonical, name, tmp_path / "linear.onnx")
    weight = unrounded(stored, name)
    assert torch.equal(computed(path, torch.eye(weight.shape[1])).T, weight)
    data = (tmp_path / "linear.onnx.data").read_bytes()
    codes = stored[f"{name}_packed"].numpy().tobytes()
    assert data[: len(codes)] == codes, "our bytes as they are"


def test_a_layer_is_the_router_and_its_experts(canonical: Path, stored: Any, graphs: list[Path]) -> None:
    assert [graph.name for graph in graphs] == [f"layer_{layer}.onnx" for layer in (1, 2, 3, 4)]
    config = Glm5Config.from_json(canonical)
    hidden = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))
    for layer, graph in zip((1, 2, 3, 4), graphs, strict=True):
        prefix = f"model.layers.{layer}.mlp."
        weights, ids = route_experts.reference(
            hidden,
            stored[f"{prefix}gate.weight"].float(),
            stored[f"{prefix}gate.e_score_correction_bias"],
            top_k=config.num_experts_per_tok,
            groups=1,
            groups_kept=1,
            renormalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

        def of(layer: int, projection: str) -> Tensor:
            return torch.stack([unrounded(stored, exports.expert(layer, expert, projection)) for expert in range(4)])

        gate_up = torch.cat((of(layer, "gate"), of(layer, "up")), dim=1)
        right = expert_mlp.reference(hidden, weights, ids, gate_up, of(layer, "down"))
        shown = computed(graph, hidden)
        assert (shown - right).abs().max() < 2e-6 * right.abs().max()
        assert computed(graph, hidden[:0]).shape == (0, 64)


def test_graphs_are_small_and_checked_by_onnx(graphs: list[Path]) -> None:
    for graph in graphs:
        assert graph.stat().st_size < 4000
        onnx.checker.check_model(str(graph))
        kinds = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
        assert kinds == ["Cast", "Gemm", "Neg", "Exp", "Add", "Reciprocal", "Add", "QMoE", "Mul", "Identity"]


def test_a_flipped_byte_shows(graphs: list[Path], tmp_path: Path) -> None:
    """The comparison above would see wrong data."""
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    for file in (graphs[0], graphs[0].with_suffix(".data")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (codes,) = (
        weight for weight in onnx.load(graphs[0], load_external_data=False).graph.initializer if "gate_up.codes" in weight.name
    )
    place = {entry.key: entry.value for entry in codes.external_data}
    data = np.fromfile(tmp_path / "layer_1.data", dtype=np.uint8)
    data[int(place["offset"]) : int(place["offset"]) + int(place["length"])] ^= 0x10
    data.tofile(tmp_path / "layer_1.data")
    before, after = computed(graphs[0], hidden), computed(tmp_path / "layer_1.onnx", hidden)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_refusals(canonical: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no INT4 weight"):
        export_linear(canonical, "model.norm.weight", tmp_path / "x.onnx")
    export(exports.write_source(tmp_path / "source"), tmp_path / "eight", Options(rule=Int4Rule("amax7", 8)))
    with pytest.raises(InputError, match="has groups of 8; ONNX Runtime takes groups of 16"):
        export_linear(tmp_path / "eight", exports.expert(2, 1, "up"), tmp_path / "x.onnx")
    assert not list(tmp_path.glob("x.onnx*"))
