"""transformers 5.23 as a judge of exports: it loads them, its expert matrices are ours bit for bit, and its logits are those of
this library's model. In float32 with the decoded weights everywhere; in bfloat16 only where index_topk covers the context,
because beyond it a key that rounding moves over the edge of the selection makes another context.

Not a judge of whether a checkpoint is whole: it loads one with a scale missing (`tests/quant/test_verify.py` is).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.quant.export import export
from glm5_port.quant.int4 import dequantize
from glm5_port.quant.packing import unpack_int4
from tests.model import hugging_face
from tests.quant.exports import change, expert, read_all

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "models" / "glm5-tiny-code"
LATENT_EPS = 1e-6
"""Of transformers' two latent norms."""


@dataclass(frozen=True)
class Exported:
    """An export and tokens to read with it; `spread` is what 1e-5 is measured in, 1 for logits of order one."""

    directory: Path
    tokens: Tensor
    spread: float

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "config.json").read_text()))


def random_bf16(directory: Path) -> Path:
    """A random checkpoint of transformers in bfloat16, router biases in float32: rounded ones would route tokens elsewhere."""
    model = hugging_face.make(directory / "float32", seed=7)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name in biases:
            buffer.data = biases[name]
    model.save_pretrained(directory / "bf16")
    return directory / "bf16"


@pytest.fixture(scope="module", params=["trained", "random"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        export(TRAINED, root / "int4")
        return Exported(root / "int4", torch.tensor([list((ROOT / "LICENSE").read_bytes()[:200])]), spread=6.0)
    export(random_bf16(root), root / "int4")
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))
    return Exported(root / "int4", tokens, spread=1.0)


def theirs(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' model. It decodes experts to bfloat16 whatever dtype is asked for, so that float32 is made of that."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager")
    return torch.nn.Module.to(model, dtype).eval()


def ours(directory: Path, dtype: torch.dtype) -> glm5_port.Glm5Model:
    return glm5_port.load(directory, backend="cpu", dtype=dtype, latent_norm_eps=LATENT_EPS)


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    result = model(tokens)
    return (result if isinstance(result, Tensor) else result.logits).float()


def test_expert_matrices_are_equal_bit_for_bit(exported: Exported) -> None:
    config, written = exported.config, read_all(exported.directory)

    def value(layer: int, number: int, projection: str) -> Tensor:
        name = expert(layer, number, projection)
        return dequantize(unpack_int4(written[f"{name}_packed"]), written[f"{name}_scale"])

    model = theirs(exported.directory, torch.bfloat16)
    compared = 0
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        experts = model.model.layers[layer].mlp.experts
        for number in range(config["n_routed_experts"]):
            gate_up = torch.cat([value(layer, number, "gate"), value(layer, number, "up")])
            assert torch.equal(experts.gate_up_proj[number], gate_up)
            assert torch.equal(experts.down_proj[number], value(layer, number, "down"))
            compared += 3
    assert compared == 3 * 16 * (config["num_hidden_layers"] - config["first_k_dense_replace"]) > 0


def test_logits_with_decoded_weights_in_float32(exported: Exported) -> None:
    assert exported.tokens.shape[1] > 2 * exported.config["index_topk"], "the indexer would have nothing to select"
    expected = logits(theirs(exported.directory, torch.float32), exported.tokens)
    found = logits(ours(exported.directory, torch.float32), exported.tokens)
    assert float((found - expected).abs().max()) < 1e-5 * exported.spread
    assert 0.3 * exported.spread < float(expected.std()), "logits too flat to prove anything"


@pytest.mark.parametrize("exported", ["trained"], indirect=True)
def test_bfloat16_logits_where_index_topk_covers_the_context(exported: Exported) -> None:
    """Two ways of rounding differ by no more than twice what rounding costs. Over many texts, because one token that rounding
    sends to another expert outweighs a window. Of random weights the routers tie so often that even the sum says nothing."""
    text, length = list((ROOT / "LICENSE").read_bytes()), exported.config["index_topk"]
    tokens = torch.tensor([text[start : start + length] for start in range(0, len(text) - length, 10 * length)])
    assert len(tokens) > 15
    gold = logits(theirs(exported.directory, torch.float32), tokens)
    expected = logits(theirs(exported.directory, torch.bfloat16), tokens)
    found = logits(ours(exported.directory, torch.bfloat16), tokens)
    rounding = float((expected - gold).norm())
    assert 0 < rounding < 0.01 * float(gold.norm())
    assert float((found - expected).norm()) < 2 * rounding


def test_a_wrong_layout_is_seen(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "copy")
    layer = exported.config["num_hidden_layers"] - 1
    gate, up = expert(layer, 3, "gate"), expert(layer, 3, "up")

    def exchange(tensors: dict[str, Tensor]) -> None:
        for part in ("_packed", "_scale"):
            tensors[gate + part], tensors[up + part] = tensors[up + part], tensors[gate + part]

    change(tmp_path / "copy", exchange)
    expected = logits(theirs(tmp_path / "copy", torch.float32), exported.tokens)
    found = logits(ours(exported.directory, torch.float32), exported.tokens)
    assert float((found - expected).abs().max()) > 1e-3 * exported.spread
