"""What a model binds: the facts it states, the decisions it lists, and changing them afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glm5_port.dispatch import Operator
from glm5_port.errors import FlagError, GradientError, InputError, SelectionError
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.facts import operator_facts
from glm5_port.operators import gated_mlp, lightning_indexer, linear
from glm5_port.registry import COMMON_FACTS, OPERATORS
from tests.model.models import difference, prompt, quick_config, quick_model

TOKENS = torch.tensor([prompt(12)])


@pytest.fixture
def model() -> Glm5Model:
    return quick_model(block_size=5)


def chosen(model: Glm5Model) -> dict[str, set[str]]:
    """operator -> implementations of its bindings."""
    found: dict[str, set[str]] = {}
    for bound in model.binder.bindings:
        found.setdefault(bound.selection.operator, set()).add(bound.implementation.id)
    return found


# -- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mtp": True}, {"max_context": 4}, {"block_size": 64, "dtype": torch.float32}])
def test_the_facts_of_every_binding_are_those_of_its_calls(options: dict[str, Any]) -> None:
    """A binding states its facts before any tensor exists; each call must have the same ones."""
    model = quick_model(quick_config(n_group=2, topk_group=1, n_shared_experts=2), **options)
    called: set[int] = set()

    def check(number: int, bound: Any, inner: Any) -> Any:
        operator = bound.implementation.operator

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(operator.parameters, args, strict=False)) | kwargs
            actual, stated = operator.facts_of(arguments), bound.selection.facts
            for name in (*operator.facts, "device_type", "dtype"):
                assert actual[name] == stated[name], f"{operator.name}: {name} is {actual[name]!r}, bound for {stated[name]!r}"
            assert stated["max_tokens"] == 2048
            assert stated["max_context"] == model.max_context
            called.add(number)
            return inner(*args, **kwargs)

        return call

    for number, bound in enumerate(model.binder.bindings):
        bound.function = check(number, bound, bound.function)
    length = 2 if model.dense_attention else 6
    model.generate([prompt(length), [5]], max_new_tokens=2, stop_ids=())
    if model.mtp is not None:
        model.generate([prompt(length)], max_new_tokens=6, stop_ids=(), draft_tokens=3)
    missing = [bound for number, bound in enumerate(model.binder.bindings) if number not in called]
    assert missing == [], "every binding is called"


def test_facts_are_complete_for_every_operator() -> None:
    facts = operator_facts(quick_config(), cache_format="plain", page_size=64)
    assert set(facts) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        assert set(facts[name]) == set(operator.facts)


def test_phases_are_bound_separately(model: Glm5Model) -> None:
    phases = [b.selection.facts["phase"] for b in model.binder.bindings if b.selection.operator == "lightning_indexer"]
    assert phases == ["prefill", "decode"] * 3


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_decisions_list_every_operator_once_for_each_set_of_facts(model: Glm5Model) -> None:
    decisions = model.decisions()
    assert {s.operator for s in decisions} == {bound.selection.operator for bound in model.binder.bindings}
    assert len(decisions) < len(model.binder.bindings)
    keys = [(s.operator, tuple(s.facts.values())) for s in decisions]
    assert (
        len(set(keys))
        == len(keys)
        == len({(b.selection.operator, tuple(b.selection.facts.values())) for b in model.binder.bindings})
    )
    widths = [s.facts["width_between"] for s in decisions if s.operator == "gated_mlp"]
    assert widths == [48, 16], "dense layers, then shared experts"
    for selection in decisions:
        assert selection.chosen is not None
        assert f"-> {selection.chosen.id}" in str(selection)


def test_bindings_made_for_inference_refuse_gradients(model: Glm5Model) -> None:
    layer = next(module for module in model.modules() if isinstance(module, BoundLayer))
    x = torch.zeros(1, 32, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradientError, match=r"add_rms_norm was bound for inference .*\n  Build the model with trainable=True"):
        layer(x=x, residual=x, eps=1e-5)
    with torch.no_grad():
        layer(x=x, residual=x, eps=1e-5)
    assert model.embedding is not None
    model.embedding.requires_grad_()
    with pytest.raises(GradientError):
        model(TOKENS)


# -- rebinding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def variant() -> Iterator[None]:
    """gated_mlp "torch/shouting" (result times two) and linear "torch/narrow", gone after the test."""
    gated_mlp.implement("torch", variant="shouting", rank=900)(lambda x, gate_up, down: 2 * gated_mlp.reference(x, gate_up, down))
    linear.implement("torch", variant="narrow", rank=900, not_supported=lambda **f: ["too wide"] if f["width_out"] > 32 else [])(
        lambda x, weight: linear.reference(x, weight)
    )
    yield
    for operator, name in ((gated_mlp, "torch/shouting"), (linear, "torch/narrow")):
        remove(operator, name)


def remove(operator: Operator, name: str) -> None:
    del operator.implementations[name]
    operator._memo.clear()


@pytest.mark.usefixtures("variant")
def test_rebind_one_operator(model: Glm5Model) -> None:
    before = model(TOKENS)
    assert model.rebind("gated_mlp", "torch/shouting") == 5
    assert chosen(model)["gated_mlp"] == {"torch/shouting"}
    assert difference(model(TOKENS), before) > 1e-3
    assert {s.chosen.id for s in model.decisions() if s.operator == "gated_mlp" and s.chosen} == {"torch/shouting"}
    assert "rebind" in str(next(s for s in model.decisions() if s.operator == "gated_mlp"))
    assert model.rebind("gated_mlp", "torch/eager") == 5
    assert torch.equal(model(TOKENS), before)


def test_rebind_all(model: Glm5Model) -> None:
    before = model(TOKENS)
    assert model.rebind("*", "reference") == len(model.binder.bindings)
    assert set().union(*chosen(model).values()) == {"reference"}
    assert 0 < difference(model(TOKENS), before) < 1e-10
    model.rebind("*", "torch")
    assert torch.equal(model(TOKENS), before)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("operator", "implementation", "error", "message"),
    [
        (
            "sparse_mla_atention",
            "reference",
            InputError,
            r"no such operator; did you mean sparse_mla_attention\?\n  used here: add_rms_norm",
        ),
        ("mla_attention_absorbed", "reference", InputError, "not used by this model\n  used here: "),
        ("gated_mlp", "torch/eagre", FlagError, r"no such implementation; did you mean torch/eager\?"),
        ("*", "torch/shouting", FlagError, "no such implementation"),
        ("linear", "torch/narrow", SelectionError, "too wide"),
    ],
)
def test_a_rebind_that_fails_changes_nothing(
    model: Glm5Model, operator: str, implementation: str, error: type[Exception], message: str
) -> None:
    before, functions = chosen(model), [bound.function for bound in model.binder.bindings]
    with pytest.raises(error, match=message):
        model.rebind(operator, implementation)
    assert chosen(model) == before
    assert [bound.function for bound in model.binder.bindings] == functions


def test_a_forward_only_implementation_cannot_be_rebound_for_training() -> None:
    lightning_indexer.implement("torch", variant="forward", rank=900)(lightning_indexer.reference)
    try:
        model = quick_model(trainable=True)
        with pytest.raises(SelectionError, match="forward only, and a gradient is asked for"):
            model.rebind("lightning_indexer", "torch/forward")
        assert quick_model().rebind("lightning_indexer", "torch/forward") == 6
    finally:
        remove(lightning_indexer, "torch/forward")


class Doubled:
    """Keeps `down` doubled, as a layout of its own, and says the factor."""

    def __init__(self, facts: Any) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, part: int | None, tensors: Any) -> None:
        assert part is None
        self.tensors = {
            "both": torch.cat([tensors["gate_up"].flatten(), 2 * tensors["down"].flatten()]),
            "rows": len(tensors["gate_up"]),
        }

    def finish(self) -> dict[str, Any]:
        return self.tensors


def test_prepared_weights_in_a_model() -> None:
    """They are registered as buffers, called with, and cannot be rebound to an implementation that wants the canonical ones."""
    expected = quick_model()(TOKENS)

    def both_in_one(x: torch.Tensor, both: torch.Tensor, rows: int) -> torch.Tensor:
        gate_up = both[: rows * x.shape[-1]].view(rows, x.shape[-1])
        return gated_mlp.reference(x, gate_up, both[gate_up.numel() :].view(x.shape[-1], rows // 2) / 2)

    gated_mlp.implement("torch", variant="both", rank=1, prepare=Doubled, fake=lambda x, both, rows: torch.empty_like(x))(
        both_in_one
    )
    try:
        model = quick_model()
        assert chosen(model)["gated_mlp"] == {"torch/both"}
        assert difference(model(TOKENS), expected) < 1e-10
        layer = model.layers[0].mlp.mlp
        assert [name for name, _ in layer.named_buffers()] == ["both"]
        assert not list(layer.parameters())
        assert layer.arguments["rows"] == 96
        with pytest.raises(
            InputError, match=r"keep their weights in different layouts\n  Load the model again with GLM5_PORT_OP_GATED_MLP"
        ):
            model.rebind("gated_mlp", "torch/eager")
        assert chosen(model)["gated_mlp"] == {"torch/both"}
        assert model.rebind("gated_mlp", "torch/both") == 5
    finally:
        remove(gated_mlp, "torch/both")


def test_common_facts_are_stated(model: Glm5Model) -> None:
    for selection in model.decisions():
        assert set(COMMON_FACTS) <= set(selection.facts)
        assert (selection.facts["device_type"], selection.facts["dtype"], selection.facts["needs_grad"]) == (
            "cpu",
            torch.float64,
            False,
        )


def test_a_pin_flag_holds_for_a_model(set_flags: Any) -> None:
    set_flags(GLM5_PORT_OP_SPARSE_MLA_ATTENTION="reference")
    config = quick_config()
    weights = random_weights(config, dtype=torch.float64)
    model = build(config, weights, dtype=torch.float64)
    assert chosen(model)["sparse_mla_attention"] == {"reference"}
    assert chosen(model)["lightning_indexer"] == {"torch/eager"}
    assert difference(model(TOKENS), quick_model()(TOKENS)) < 1e-10
    pinned = build(config, weights, backend="cpu", dtype=torch.float64)
    assert chosen(pinned)["sparse_mla_attention"] == {"torch/eager"}, "the argument is the stronger request"
    record = next(s for s in pinned.decisions() if s.operator == "sparse_mla_attention")
    assert "overrides GLM5_PORT_OP_SPARSE_MLA_ATTENTION=reference" in str(record)


# -- transforms --------------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def test_a_weight_may_pass_through_a_module_on_its_way_to_the_operator() -> None:
    model = quick_model(trainable=True)
    head, names = model.head, set(model.state_dict())
    x = torch.randn(3, 32, dtype=torch.float64)
    right = head(x)
    transform = Scaled()
    head.transform("weight", transform)
    assert torch.equal(head(x), 2 * right)
    assert set(model.state_dict()) - names == {"head.weight_transform.factor"}
    head(x).sum().backward()
    assert transform.factor.grad is not None
    assert head.arguments["weight"].grad is not None
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.transforms["weight"].factor.fill_(4.0)
    assert torch.equal(twin(x), 4 * right)
    assert torch.equal(head(x), 2 * right)
    head.transform("weight", None)
    assert torch.equal(head(x), right)
    assert set(model.state_dict()) == names
    with pytest.raises(InputError, match="'wieght' is no canonical weight of it .those are: weight"):
        head.transform("wieght", transform)
