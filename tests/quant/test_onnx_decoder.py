"""The decoder as an ONNX graph: run by onnxruntime without torch, it is the model that `glm5_port.load` gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.config import Glm5Config, released
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.cache import Span
from glm5_port.model.stored_tensors import read_directory
from glm5_port.operators.rope import rotary_angles
from glm5_port.quant.export import export
from glm5_port.quant.formats import onnx_decoder
from glm5_port.quant.formats.onnx import DECODER, plan_onnx
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.plan import Options
from glm5_port.quant.transcode import transcode
from tests import tiny_code
from tests.model.models import prompt
from tests.quant import exports, onnx_runner
from tests.quant.onnx_models import GLM_5, GLM_52, unrounded, write_float, write_int4

TOKENS, PROMPT = 40, 17
"""Of a sequence, and of the prompt that it begins with: both beyond index_topk, which is 4."""
ONNX = Options(format="onnx")
NEAR = 1e-5
"""Of the largest logit: two float32 programs that add in another order."""
ROUNDED = 5e-4
"""Of the largest logit, on average: the graph computes with q * s, and `glm5_port.load` with bf16(q * s)."""


def logits_of(checkpoint: Path, tokens: list[int], **options: Any) -> Tensor:
    """[N, vocabulary] of the torch model in float32."""
    return glm5_port.load(checkpoint, dtype="float32", backend="cpu", **options).forward(torch.tensor([tokens]))[0]


def apart(shown: Any, right: Tensor) -> float:
    """The largest difference, in parts of the largest logit."""
    return float((torch.as_tensor(shown) - right).abs().max() / right.abs().max())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(checkpoint, directory of its graphs) of a model with changes; each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(options: Options | None = None, **changes: Any) -> tuple[Path, Path]:
        key = repr((options, changes))
        if key not in made:
            root = tmp_path_factory.mktemp("onnx")
            checkpoint = write_int4(root, options=options, **changes)
            transcode(checkpoint, root / "graphs", ONNX)
            made[key] = checkpoint, root / "graphs"
        return made[key]

    return of


def without_torch(graphs: Path, tokens: list[int], given: int, folder: Path) -> dict[str, np.ndarray]:
    """What `onnx_runner` says in a process of its own, where torch cannot be imported."""
    np.savez(folder / "job.npz", tokens=np.array(tokens), prompt=given)
    command = [sys.executable, onnx_runner.__file__, graphs / "decoder.onnx", folder / "job.npz", folder / "results.npz"]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    with np.load(folder / "results.npz") as results:
        return dict(results)


def other_graph(checkpoint: Path, graphs: Path, folder: Path, **changes: Any) -> None:
    """Another decoder over the same data files."""
    for file in graphs.glob("*.data"):
        shutil.copy(file, folder)  # onnxruntime refuses links that lead elsewhere
    config = replace(Glm5Config.from_json(checkpoint), **changes)
    (folder / DECODER).write_bytes(plan_onnx(config, read_directory(checkpoint).tensors).graphs[DECODER]())


# -- against the torch model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [GLM_5, GLM_52], ids=["GLM-5", "GLM-5.2"])
def test_without_torch_it_is_the_model(model: Any, tmp_path: Path, family: dict[str, Any]) -> None:
    checkpoint, graphs = model(**family)
    tokens = prompt(TOKENS, vocabulary=90)
    torch_model = glm5_port.load(checkpoint, dtype="float32", backend="cpu")
    right = torch_model.forward(torch.tensor([tokens]))[0]
    shown = without_torch(graphs, tokens, PROMPT, tmp_path)
    for way in ("whole", "chunks", "steps"):
        assert apart(shown[way], right) < NEAR, way
    generated = torch_model.generate([tokens[:PROMPT]], max_new_tokens=TOKENS - PROMPT, stop_ids=[])[0]
    assert shown["greedy"].tolist() == generated


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_interleave": False},
        {"indexer_rope_interleave": False},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        {"n_shared_experts": 2, "first_k_dense_replace": 3},
        {"index_topk": 512},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_config_may_say(model: Any, changes: dict[str, Any]) -> None:
    checkpoint, graphs = model(**changes)
    tokens = prompt(TOKENS, vocabulary=90)
    assert apart(onnx_runner.steps(graphs / "decoder.onnx", np.array(tokens), [25, 15]), logits_of(checkpoint, tokens)) < NEAR


@pytest.mark.parametrize("size", [16, 96, -1])
def test_groups_are_as_the_kernels_take_them_or_cut_into_such(model: Any, size: int) -> None:
    """96 and whole rows of 64 and 96 become blocks of 32, their scales repeated."""
    widths = {"hidden_size": 192, "moe_intermediate_size": 96}
    checkpoint, graphs = model(Options(rule=Int4Rule("amax7", size)), **widths)
    tokens = prompt(12, vocabulary=90)
    assert apart(onnx_runner.steps(graphs / "decoder.onnx", np.array(tokens), [12]), logits_of(checkpoint, tokens)) < NEAR


def test_the_eps_of_the_latent_norms_can_be_that_of_hugging_face(model: Any, tmp_path: Path) -> None:
    checkpoint, graphs = model(rms_norm_eps=1e-2)
    other_graph(checkpoint, graphs, tmp_path, latent_norm_eps=1e-6)
    tokens = prompt(12, vocabulary=90)
    right = logits_of(checkpoint, tokens, latent_norm_eps=1e-6)
    assert apart(onnx_runner.steps(tmp_path / "decoder.onnx", np.array(tokens), [12]), right) < NEAR
    assert apart(onnx_runner.steps(graphs / "decoder.onnx", np.array(tokens), [12]), right) > 100 * NEAR


@pytest.mark.parametrize("release", ["GLM-5", "GLM-5.2"])
def test_angles_are_those_of_the_model_at_any_position(release: str) -> None:
    config, positions = released(release), torch.tensor([[0, 1, 2047, 99_999, 202_751, 524_289, 1_048_575]])
    graph = onnx_decoder._Decoder(config, [])
    for value, name in zip(graph._angles(graph.input("positions", [1, 7], integers=True)), ("cos", "sin"), strict=True):
        graph.output(value, name, [1, 7, 1, 32])
    session = onnxruntime.InferenceSession(graph.serialised("angles", {}), providers=["CPUExecutionProvider"])
    shown = session.run(None, {"positions": positions.numpy()})
    for one, right in zip(shown, rotary_angles(positions[0], config.rope_theta, 64), strict=True):
        assert (torch.from_numpy(one)[0, :, 0] - right).abs().max() < 2e-7


def test_sequences_of_a_batch_are_alone(model: Any) -> None:
    _, graphs = model(**GLM_52)
    tokens = np.array([prompt(20, seed=seed, vocabulary=90) for seed in (1, 2, 3)])
    together = onnx_runner.Runner(graphs / "decoder.onnx", batch=3)
    shown = np.concatenate((together.step(tokens[:, :11]), together.step(tokens[:, 11:])), axis=1)
    for row, alone in zip(shown, tokens, strict=True):
        assert apart(row, torch.from_numpy(onnx_runner.steps(graphs / "decoder.onnx", alone, [11, 9]))) < NEAR


def test_float16_scales_change_nothing_where_they_hold(model: Any, tmp_path: Path) -> None:
    checkpoint, graphs = model(**GLM_52)
    transcode(checkpoint, tmp_path, Options(format="onnx-float16"))
    tokens = np.array(prompt(12, vocabulary=90))
    wide, narrow = (onnx_runner.steps(folder / "decoder.onnx", tokens, [12]) for folder in (graphs, tmp_path))
    assert (wide == narrow).all()
    assert (tmp_path / "layer_1.data").stat().st_size < (graphs / "layer_1.data").stat().st_size


# -- the selection -------------------------------------------------------------------------------------------------------


def test_the_selection_matters(model: Any, tmp_path: Path) -> None:
    """The same data files under a graph that selects everything give other logits."""
    checkpoint, graphs = model(**GLM_52)
    other_graph(checkpoint, graphs, tmp_path, index_topk=TOKENS)
    tokens = np.array(prompt(TOKENS, vocabulary=90))
    few, all_ = (onnx_runner.steps(folder / "decoder.onnx", tokens, [TOKENS]) for folder in (graphs, tmp_path))
    assert apart(few[:4], torch.from_numpy(all_[:4])) < NEAR
    assert apart(few, torch.from_numpy(all_)) > 1000 * NEAR


def test_equal_scores_go_to_the_lowest_positions(tmp_path: Path) -> None:
    """Head weights of zero: every key scores zero, and only the tie rule selects."""
    checkpoint = write_int4(tmp_path, **GLM_52)

    def flatten(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("indexer.weights_proj.weight"):
                tensors[name].zero_()

    exports.change(checkpoint, flatten)
    transcode(checkpoint, tmp_path / "graphs", ONNX)
    tokens = prompt(TOKENS, vocabulary=90)
    graph = tmp_path / "graphs" / "decoder.onnx"
    assert apart(onnx_runner.steps(graph, np.array(tokens), [25, *[1] * 15]), logits_of(checkpoint, tokens)) < NEAR
    changed = [*tokens[:30], *[(token + 1) % 90 for token in tokens[30:-1]], tokens[-1]]
    last = [onnx_runner.steps(graph, np.array(some), [TOKENS])[-1] for some in (tokens, changed)]
    assert apart(last[0], torch.from_numpy(last[1])) < NEAR, "the last token reads positions 0 to 3"


# -- the MTP layer -------------------------------------------------------------------------------------------------------


def test_the_draft_layer_is_a_graph_of_its_own(model: Any) -> None:
    checkpoint, graphs = model(**GLM_52)
    tokens = prompt(20, vocabulary=90)
    torch_model = glm5_port.load(checkpoint, dtype="float32", backend="cpu", mtp=True)
    cache = torch_model.new_cache([20])
    batch = cache.batch([Span(cache.open(), 0, 19)])
    with torch.no_grad():
        hidden = torch_model.step(torch.tensor(tokens[:19]), batch, cache)
        embedded = torch_model.embed(torch.tensor(tokens[1:]))
        assert torch_model.mtp is not None
        drafted, _ = torch_model.mtp(hidden, embedded, torch_model.locate(batch), cache.layers[-1], None)
        right = torch_model.logits(drafted)
    trunk, mtp = onnx_runner.Runner(graphs / "decoder.onnx"), onnx_runner.Runner(graphs / "mtp.onnx")
    shown = []
    for first, end in ((0, 12), (12, 19)):
        trunk.step(np.array([tokens[first:end]]))
        previous = trunk.results["hidden_states"]
        assert apart(previous[0], hidden[first:end]) < NEAR
        shown.append(mtp.step(np.array([tokens[first + 1 : end + 1]]), previous_hidden_states=previous)[0])
    assert apart(np.concatenate(shown), right) < NEAR
    assert apart(mtp.results["hidden_states"][0], drafted[12:]) < NEAR


def test_a_checkpoint_without_the_layer_has_no_such_graph(model: Any) -> None:
    _, graphs = model(num_nextn_predict_layers=0)
    assert not (graphs / "mtp.onnx").exists()
    assert {file.name for file in graphs.glob("*.data")} == {"outer.data", *(f"layer_{layer}.data" for layer in range(4))}


# -- what is not INT4 ----------------------------------------------------------------------------------------------------


def test_linear_weights_in_int4(tmp_path: Path) -> None:
    """`MatMulNBits` for every projection, and kv_b_proj decoded, which is multiplied head by head."""
    widths = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "intermediate_size": 64}
    options = Options(include=(r"self_attn\.[a-z_]*proj", r"indexer\.w", r"mlp\.(shared_experts\.)?(gate|up|down)_proj"))
    checkpoint = write_int4(tmp_path, options=options, **GLM_52, **widths)
    transcode(checkpoint, tmp_path / "graphs", ONNX)
    nodes = onnx.load(tmp_path / "graphs" / "decoder.onnx", load_external_data=False).graph.node
    by_kind = Counter(node.op_type for node in nodes)
    assert by_kind["MatMulNBits"] == 4 * 4 + 2 * 2 + 3 * 4, "attention, two indexers, one dense and three shared MLPs"
    assert by_kind["Gemm"] == 2 + 3 + 1, "the indexers' head weights, routers and the head stay as they are"
    tokens = prompt(TOKENS, vocabulary=90)
    shown = onnx_runner.steps(tmp_path / "graphs" / "decoder.onnx", np.array(tokens), [25, 15])
    assert apart(shown, logits_of(checkpoint, tokens)) < NEAR


def test_experts_in_floating_point_compute_too_and_stay_as_they_are_stored(tmp_path: Path) -> None:
    """The MTP layer in bf16, as `--mtp bf16` leaves it: its graph has no QMoE."""
    export(write_float(tmp_path / "float"), tmp_path / "int4", Options(mtp="bf16"))
    exports.change(tmp_path / "int4", lambda tensors: None)
    transcode(tmp_path / "int4", tmp_path / "graphs", ONNX)
    graphs = ["decoder.onnx", "layer_1.onnx", "layer_2.onnx", "layer_3.onnx", "mtp.onnx"]
    assert sorted(path.name for path in (tmp_path / "graphs").glob("*.onnx")) == graphs
    kinds = {node.op_type for node in onnx.load(tmp_path / "graphs" / "mtp.onnx", load_external_data=False).graph.node}
    assert "QMoE" not in kinds
    runner = onnx_runner.Runner(tmp_path / "graphs" / "mtp.onnx")
    hidden = np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float32)
    shown = runner.step(np.array([prompt(9, vocabulary=90)]), previous_hidden_states=hidden)
    torch_model = glm5_port.load(tmp_path / "int4", dtype="float32", backend="cpu", mtp=True)
    cache = torch_model.new_cache([9])
    batch = cache.batch([Span(cache.open(), 0, 9)])
    with torch.no_grad():
        assert torch_model.mtp is not None
        embedded = torch_model.embed(torch.tensor(prompt(9, vocabulary=90)))
        drafted, _ = torch_model.mtp(torch.from_numpy(hidden[0]), embedded, torch_model.locate(batch), cache.layers[-1], None)
        assert apart(shown[0], torch_model.logits(drafted)) < NEAR


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_refusals(model: Any, tmp_path: Path) -> None:
    checkpoint, _ = model(**GLM_52)
    config, tensors = Glm5Config.from_json(checkpoint), read_directory(checkpoint).tensors
    with pytest.raises(InputError, match=r"scales = 'bfloat16' is not known; known are float32, float16"):
        plan_onnx(config, tensors, scales="bfloat16")
    name = "model.layers.2.self_attn.o_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        plan_onnx(config, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=r"o_proj.weight is stored as F8_E4M3, expected BF16, F16, F32"):
        plan_onnx(config, tensors | {name: replace(tensors[name], dtype="F8_E4M3")})
    with pytest.raises(CheckpointError, match=r"o_proj.weight has the shape \[64, 21\], expected \[64, 20\]"):
        plan_onnx(config, tensors | {name: replace(tensors[name], shape=(64, 21))})
    one = exports.expert(2, 1, "down")
    packed = tensors[f"{one}_scale"]
    with pytest.raises(CheckpointError, match="differs from .* in its shape or its groups"):
        plan_onnx(config, tensors | {f"{one}_scale": replace(packed, shape=(64, 6))})


# -- the trained model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """glm5-tiny-code in INT4, and its graphs."""
    root = tmp_path_factory.mktemp("trained")
    export(tiny_code.CHECKPOINT, root / "int4")
    transcode(root / "int4", root / "graphs", ONNX)
    return root / "int4", root / "graphs"


def test_the_trained_model(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """On 160 bytes of held-out text, index_topk 64."""
    checkpoint, graphs = trained
    tokens = tiny_code.held_out_prompt(160)[0].tolist()
    torch_model = glm5_port.load(checkpoint, dtype="float32", backend="cpu")
    given = torch.tensor([tokens])
    rounded, exact = torch_model.forward(given)[0], unrounded(checkpoint).forward(given)[0]
    shown = without_torch(graphs, tokens, 120, tmp_path)
    for way in ("whole", "chunks", "steps"):
        assert apart(shown[way], exact) < NEAR, way
        assert float((torch.from_numpy(shown[way]) - rounded).abs().mean() / rounded.abs().max()) < ROUNDED
    generated = torch_model.generate([tokens[:120]], max_new_tokens=40, stop_ids=[])[0]
    assert shown["greedy"].tolist() == generated


def test_the_example_of_the_docs(trained: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, graphs = trained
    lines = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text().partition("```python\n")[2].partition("```")[0]
    blocked = "import sys\nsys.modules['torch'] = sys.modules['glm5_port'] = None\n"
    (tmp_path / "example.py").write_text(blocked + lines)
    text = bytes(tiny_code.held_out_prompt(100)[0].tolist()).decode()
    command = [sys.executable, tmp_path / "example.py", graphs, text]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    torch_model = glm5_port.load(checkpoint, dtype="float32", backend="cpu")
    tokens = torch_model.generate([list(text.encode())], max_new_tokens=60, stop_ids=[])[0]
    assert printed == bytes(token for token in tokens if token < 256).decode(errors="replace") + "\n"
