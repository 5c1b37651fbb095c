"""INT4-aware training: what is exported is what was computed with, bit for bit; gradients against explicit formulas."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from glm5_port.errors import InputError
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.build import random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant import Int4Rule, quantize
from glm5_port.quant import fake_quantize as fake_module
from glm5_port.quant.export import export
from glm5_port.quant.plan import Options
from glm5_port.quant.qat import (
    FakeQuantize,
    canonical_tensors,
    prepare_qat,
    quantised_state,
    remove_qat,
    requantise,
    scale_parameters,
)
from glm5_port.testing.hugging_face import write_checkpoint
from glm5_port.testing.tiny import TINY
from tests.quant.qat_models import EXPERTS, ROWS, SMALL, decoded, logits_of, loss_of, ours, same_bits, small_config, train

# -- what is exported is what was computed with ------------------------------------------------------------------------------


@contextmanager
def operator_arguments(model: Glm5Model) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Layer name -> weights of its latest operator call, taken where the operator is called."""
    seen: dict[str, dict[str, Tensor]] = {}
    originals = []
    for name, layer in model.named_modules():
        if isinstance(layer, BoundLayer):
            original = layer.bound.function
            originals.append((layer.bound, original))

            def watch(*args: Any, _name: str = name, _call: Callable[..., Any] = original, **kwargs: Any) -> Any:
                seen[_name] = {key: value.detach().clone() for key, value in kwargs.items() if isinstance(value, Tensor)}
                return _call(*args, **kwargs)

            layer.bound.function = watch
    yield seen
    for bound, original in originals:
        bound.function = original


class SeenWeights(TorchFunctionMode):
    """The weights that transformers' layers compute with, as bytes -> how often: second arguments of linear, and the fused
    tensors that an expert is taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bytes, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self._count(args[1])
        elif func is Tensor.__getitem__ and args[0].dim() == 3 and args[0].is_floating_point():
            self._count(args[0])
        return func(*args, **(kwargs or {}))

    def _count(self, weight: Tensor) -> None:
        data = weight.detach().float().contiguous().view(torch.uint8).numpy().tobytes()
        self.seen[data] = self.seen.get(data, 0) + 1

    def times(self, weight: Tensor) -> int:
        return self.seen.get(weight.float().contiguous().view(torch.uint8).numpy().tobytes(), 0)


@pytest.mark.parametrize("learned", [False, True], ids=["amax7", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_what_the_last_forward_of_our_model_used(learned: bool, dtype: torch.dtype) -> None:
    model = ours(dtype)
    prepare_qat(model, learned_scales=learned, convert_masters=dtype == torch.bfloat16)
    before = decoded(model)
    with operator_arguments(model) as seen:
        train(model, 4)
    exported = decoded(model)
    assert len(exported) == EXPERTS
    for layer in (1, 2):
        used = seen[f"layers.{layer}.mlp.experts"]
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            assert used["gate_up"].dtype == used["down"].dtype == dtype
            assert same_bits(used["gate_up"][expert, :32], exported[prefix + "gate_proj.weight"])
            assert same_bits(used["gate_up"][expert, 32:], exported[prefix + "up_proj.weight"])
            assert same_bits(used["down"][expert], exported[prefix + "down_proj.weight"])
    assert any(not torch.equal(before[name], exported[name]) for name in before), "nothing was trained"
    requantise(model)
    assert any(not torch.equal(exported[name], weight) for name, weight in decoded(model).items()), "the last step is too small"


@pytest.mark.parametrize("learned", [False, True], ids=["amax7", "learned"])
def test_export_is_what_the_last_forward_of_transformers_used(theirs: Any, learned: bool) -> None:
    names = set(theirs.state_dict())
    prepare_qat(theirs, learned_scales=learned)
    assert names <= set(theirs.state_dict())
    assert learned == (names != set(theirs.state_dict()))
    theirs.train()
    train(theirs, 3)
    watch = SeenWeights()
    with watch:
        train(theirs, 1)
    exported = decoded(theirs)
    assert len(exported) == EXPERTS
    by_expert = []
    for layer in (1, 2):
        gate, up, down = (
            torch.stack([exported[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        gate_up = torch.cat([gate, up], dim=1)
        by_expert += [(watch.times(a), watch.times(b)) for a, b in zip(gate_up, down, strict=True)]
        assert watch.times(gate_up) == watch.times(down) == sum(a for a, _ in by_expert[-4:])
    assert all(a == b <= 1 for a, b in by_expert), "an expert computes once, with what is exported, where it is routed to"
    assert sum(a for a, _ in by_expert) >= 6


@pytest.mark.parametrize("kind", ["ours", "ours dense", "theirs"])
def test_everything_by_pattern(kind: str, theirs: Any) -> None:
    """All projections: fused gate_up, the two halves of kv_b_proj, the indexer; in both forms of attention."""
    model = theirs if kind == "theirs" else ours(max_context=4 if kind == "ours dense" else None, mtp=True, index_topk=16)
    patterns = ["self_attn", "shared_experts", r"mlp\.(gate|up|down)_proj"]
    report = prepare_qat(model, patterns=patterns, rule=Int4Rule(group_size=16))
    expected = {
        name: spec.shape
        for name, spec in expected_tensors(small_config(), mtp=kind != "theirs").items()
        if spec.kind == "projection" and not (kind == "ours dense" and ".indexer." in name)
    }
    exported = decoded(model)
    assert {name: tuple(weight.shape) for name, weight in exported.items()} == expected
    assert set(report.weights) == set(expected)
    assert sum(report.components.values()) == len(expected)
    assert report.elements == sum(math.prod(shape) for shape in expected.values())
    if kind != "theirs":
        source = random_weights(small_config(), dtype=torch.float32, mtp=True)
        for name, weight in exported.items():
            codes = quantize(source(name), Int4Rule(group_size=16))
            assert same_bits(weight, codes.dequantize()), name
        return
    watch = SeenWeights()
    with watch:
        loss_of(model)
    for name in expected:
        if ".experts." not in name:
            assert watch.times(exported[name]) == 1, name


def test_our_model_and_transformers_train_alike(tmp_path: Any) -> None:
    """The same weights, the same batch (the context fits into index_topk): the same loss and codes after a step."""
    import glm5_port

    theirs = write_checkpoint(tmp_path, {**TINY, **SMALL, "index_topk": 16})
    model = glm5_port.load(tmp_path, backend="cpu", trainable=True)
    prepare_qat(model)
    prepare_qat(theirs)
    assert loss_of(model).item() == pytest.approx(loss_of(theirs).item(), rel=1e-5)
    ours_state, their_state = dict(canonical_tensors(model)), dict(canonical_tensors(theirs))
    assert set(ours_state) == set(their_state)
    assert all(torch.equal(tensor, their_state[name]) for name, tensor in ours_state.items())
    gradient = dict(theirs.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
    loss_of(model).backward()
    loss_of(theirs).backward()
    found = dict(model.named_parameters())["layers.1.mlp.experts.gate_up"].grad
    assert found is not None
    assert gradient.grad is not None
    assert (found - gradient.grad).abs().max() <= 1e-4 * gradient.grad.abs().max()


def test_an_export_of_the_masters_has_the_same_bytes(theirs: Any, tmp_path: Any) -> None:
    """By a rule, codes follow from masters: the exporter finds in the float32 checkpoint what training computed with."""
    prepare_qat(theirs, patterns=["shared_experts"], rule=Int4Rule(group_size=16))
    train(theirs, 4)
    evaluated = loss_of(theirs).item()
    theirs.save_pretrained(tmp_path / "masters")
    options = Options(rule=Int4Rule(group_size=16), include=("shared_experts",))
    export(tmp_path / "masters", tmp_path / "int4", options)
    stored: dict[str, Tensor] = {}
    for file in (tmp_path / "int4").glob("*.safetensors"):
        stored |= load_file(file)
    expected = dict(canonical_tensors(theirs))
    assert len(expected) == 3 * (EXPERTS + 2 * 3)
    assert set(expected) == {name for name in stored if name.endswith(("_packed", "_scale", "_shape"))}
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    assert loss_of(theirs).item() == evaluated


def test_the_documented_way_works(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the first block of docs/qat.md as it stands."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("checkpoint", {**TINY, **SMALL})
    text = (Path(__file__).parents[2] / "docs" / "qat.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    batches = [ROWS] * 3
    names: dict[str, Any] = {"batches": batches}
    exec(block[1], names)
    assert len(names["shipped"]) == 3 * EXPERTS
    assert names["loss"].item() > 0


# -- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["amax7", "learned"])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_loss_goes_down_and_masters_move(kind: str, learned: bool, theirs: Any) -> None:
    model = ours() if kind == "ours" else theirs
    prepare_qat(model, learned_scales=learned)
    masters = {n: p.detach().clone() for n, p in model.named_parameters() if "experts" in n and p.dim() == 3}
    assert len(masters) == (8 if learned else 4), "masters, and their scales"
    losses = train(model, 12)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in masters:
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, masters[name]), name
    if not learned:
        assert not scale_parameters(model)
        return
    assert len(scale_parameters(model)) == 4
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            master = dict(model.named_parameters())[module.name]
            assert module.scales is not None
            assert not torch.equal(module.scales.bfloat16(), quantize(master).scales)


def test_nothing_else_is_quantised() -> None:
    model, plain = ours(), ours()
    prepare_qat(model)
    with operator_arguments(model) as seen, operator_arguments(plain) as right:
        logits_of(model)
        logits_of(plain)
    first = next(iter(right))
    assert torch.equal(seen[first]["x"], right[first]["x"]), "the embedding"
    weights = {name: tuple(layer.arguments) for name, layer in plain.named_modules() if isinstance(layer, BoundLayer)}
    for name, found in seen.items():
        for weight in weights[name]:
            assert torch.equal(found[weight], right[name][weight]) != name.endswith("mlp.experts"), (name, weight)


def test_parameters_keep_names_and_state_dicts_go_both_ways() -> None:
    model, plain = ours(), ours()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    prepare_qat(model)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    train(model, 1)
    plain.load_state_dict(model.state_dict())
    prepare_qat(plain)
    requantise(model)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(canonical_tensors(model), canonical_tensors(plain), strict=True))


def test_removing_gives_the_masters_back(theirs: Any) -> None:
    for model in (ours(), theirs):
        with torch.no_grad():
            right = logits_of(model)
            report = prepare_qat(model)
            wrong = logits_of(model)
            state = remove_qat(model)
            assert torch.equal(logits_of(model), right)
        assert not torch.equal(wrong, right)
        assert set(state) == set(report.weights)
        assert not any(isinstance(module, FakeQuantize) for module in model.modules())
        with pytest.raises(InputError, match="not prepared"):
            quantised_state(model)
        prepare_qat(model)
    assert type(theirs.model.layers[1].mlp.experts).__name__ == "GlmMoeDsaExperts"


def test_converted_masters_become_bfloat16_again() -> None:
    model = ours(torch.bfloat16)
    prepare_qat(model, convert_masters=True)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith(("experts.gate_up", "experts.down"))} == {torch.float32}
    assert model.embedding is not None
    assert model.embedding.dtype == torch.bfloat16
    remove_qat(model)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if not n.endswith("bias"))
    logits_of(model)


def test_a_copy_keeps_records_of_its_own(theirs: Any) -> None:
    for model in (ours(), theirs):
        prepare_qat(model)
        loss_of(model)
        kept = dict(canonical_tensors(model))
        twin = copy.deepcopy(model)
        train(twin, 3, lr=1e-2)
        assert all(torch.equal(kept[name], tensor) for name, tensor in canonical_tensors(model))
        assert any(not torch.equal(kept[name], tensor) for name, tensor in canonical_tensors(twin))


# -- computed once a step ----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were quantised."""
    names: list[str] = []
    original = fake_module.record_of

    def count(master: Tensor, scales: Tensor | None, rule: Int4Rule, name: str) -> Any:
        names.append(name)
        return original(master, scales, rule, name)

    monkeypatch.setattr(fake_module, "record_of", count)
    return names


@pytest.mark.parametrize("learned", [False, True], ids=["amax7", "learned"])
def test_recomputed_activations_do_not_quantise_again(theirs: Any, computed: list[str], learned: bool) -> None:
    prepare_qat(theirs, learned_scales=learned)
    theirs.train()
    expected = copy.deepcopy(theirs)
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    computed.clear()
    train(theirs, 2)
    assert len(computed) == 2 * 4
    assert len(set(computed)) == 4
    train(expected, 2)
    for (name, a), b in zip(theirs.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=["foreach", "fused", "loop"])
def test_an_optimizer_step_is_seen(options: dict[str, bool]) -> None:
    """Fused optimizers do not count up torch's version of a parameter."""
    model = ours()
    prepare_qat(model)
    train(model, 1, lr=1e-2, **options)
    with torch.no_grad():
        logits = logits_of(model)
        used = decoded(model)
        requantise(model)
        assert torch.equal(logits_of(model), logits)
    assert all(torch.equal(used[name], weight) for name, weight in decoded(model).items())


def test_writes_are_seen(computed: list[str]) -> None:
    model = ours()
    prepare_qat(model)
    master = dict(model.named_parameters())["layers.1.mlp.experts.down"]
    with torch.no_grad():
        logits_of(model)
        computed.clear()
        logits_of(model)
        assert not computed
        master.mul_(2)
        logits_of(model)
        assert computed == ["layers.1.mlp.experts.down"]
        master.data = master.data * 2
        logits_of(model)
        assert len(computed) == 2
        model.load_state_dict(model.state_dict())
        logits_of(model)
        assert len(computed) == 2 + 4
