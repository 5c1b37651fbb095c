"""Operators, implementations and bindings: what is checked at registration, the two doors, gradients, prepared weights."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from glm5_port import dispatch, registry
from glm5_port.dispatch import Bound, trace_through
from glm5_port.errors import GradientError, InputError, SelectionError
from glm5_port.preparation import CanonicalWeights
from glm5_port.registry import PORTABLE, REFERENCE


def scaled(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """y = factor * x * weight."""
    return x * weight * factor


def scaled_other_way(x, weight, factor):  # without annotations: the schema is the declaration's
    return (x * factor) * weight


WIDTH_FACT = {"width": lambda x, **_: x.shape[-1]}
FACTS = {"device_type": "cpu", "dtype": torch.float32, "width": 4}


def fresh():
    """The reference as a function of its own, since `declare` renames it."""

    def scaled(x: Tensor, weight: Tensor, factor: float) -> Tensor:
        return x * weight * factor

    return scaled


@pytest.fixture
def scale(declare, set_flags):
    operator = declare(fresh(), facts=WIDTH_FACT, fake=lambda x, weight, factor: torch.empty_like(x), weights=("weight",))
    operator.implement(PORTABLE, variant="eager", differentiable=True)(scaled_other_way)
    return operator


@pytest.fixture
def forward_only(scale):
    """A preferred implementation whose result is off by one, so that a test can see that it ran; no gradients."""

    def off_by_one(x, weight, factor):
        with torch.no_grad():
            return x * weight * factor + 1

    scale.implement(PORTABLE, variant="fast", rank=1)(off_by_one)
    return scale


# -- registration ------------------------------------------------------------------------------------------------------


def test_parameter_names_are_checked(scale):
    with pytest.raises(InputError, match=r"parameters \(x, w, factor\) differ from the declaration \(x, weight, factor\)"):
        scale.implement("cpu", variant="wrong")(lambda x, w, factor: x)
    with pytest.raises(InputError, match="differ from the declaration"):
        scale.implement("cpu", variant="wrong")(lambda x, weight: x)
    assert set(scale.implementations) == {REFERENCE, "torch/eager"}


def test_an_id_is_taken_once(scale):
    with pytest.raises(InputError, match="torch/eager is registered twice"):
        scale.implement(PORTABLE, variant="eager")(scaled_other_way)


def test_an_operator_is_declared_once(scale):
    again = fresh()
    again.__name__ = scale.name
    with pytest.raises(InputError, match=f"operator {scale.name} is declared twice"):
        dispatch.operator()(again)
    assert registry.OPERATORS[scale.name] is scale


def test_unknown_promise(scale):
    with pytest.raises(InputError, match=r"unknown promise \['fast'\] \(known: deterministic"):
        scale.implement("cpu", variant="x", promises=("fast",))(scaled_other_way)


@pytest.mark.parametrize("name", ["auto", "torch", "reference", "cpu"])
def test_backend_names_that_are_taken(name):
    with pytest.raises(InputError, match=f"backend name '{name}' is taken"):
        registry.register_backend(registry.Backend(name, "", "cpu", None, "gloo", 1, lambda: registry.Probe(None)))


def test_facts_are_complete_and_known(scale):
    with pytest.raises(InputError, match="facts missing: dtype, width"):
        scale.select(device_type="cpu")
    with pytest.raises(InputError, match=r"unknown fact 'widht'; did you mean width\?"):
        scale.select(**FACTS, widht=4)
    assert scale.complete_facts(FACTS)["needs_grad"] is False


def test_facts_of_a_call(scale):
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    facts = scale.facts_of({"x": x, "weight": x[0].clone().requires_grad_(), "factor": 2.0})
    assert (facts["device_type"], facts["dtype"], facts["width"], facts["needs_grad"]) == ("cpu", torch.bfloat16, 4, True)
    with torch.no_grad():
        assert scale.facts_of({"x": x, "weight": x[0].clone().requires_grad_(), "factor": 2.0})["needs_grad"] is False


# -- calling -----------------------------------------------------------------------------------------------------------


def test_a_direct_call_and_a_binding_give_the_reference(scale):
    x, weight = torch.randn(3, 4), torch.randn(4)
    expected = scaled(x, weight, 2.0)
    torch.testing.assert_close(scale(x, weight, 2.0), expected)
    torch.testing.assert_close(scale(x, weight=weight, factor=2.0), expected)
    bound = scale.bind(**FACTS)
    assert bound.implementation.id == "torch/eager"
    torch.testing.assert_close(bound(x, weight, 2.0), expected)


def test_a_new_implementation_is_seen_by_direct_calls(scale):
    x = torch.ones(1, 4)
    assert scale(x, x[0], 1.0).sum() == 4
    scale.implement(PORTABLE, variant="fast", rank=1)(lambda x, weight, factor: x * 10)
    assert scale(x, x[0], 1.0).sum() == 40


def test_direct_calls_follow_new_flags(forward_only, set_flags):
    x = torch.ones(1, 4)
    for _ in range(20):  # a memo keyed on the address of the flags would hit a stale choice sooner or later
        set_flags(**{f"GLM5_PORT_OP_{forward_only.name.upper()}": "fast"})
        assert forward_only(x, x[0], 1.0).sum() == 8
        set_flags(**{f"GLM5_PORT_OP_{forward_only.name.upper()}": "eager"})
        assert forward_only(x, x[0], 1.0).sum() == 4


def test_an_exception_of_the_chosen_implementation_is_the_callers(scale):
    def broken(x, weight, factor):
        raise ArithmeticError("no such kernel")

    scale.implement(PORTABLE, variant="broken", rank=1)(broken)
    x = torch.ones(1, 4)
    for call in (scale, scale.bind(**FACTS)):
        with pytest.raises(ArithmeticError, match="no such kernel"):
            call(x, x[0], 1.0)


def test_rebind(forward_only):
    x = torch.ones(1, 4)
    bound = forward_only.bind(**FACTS)
    assert bound(x, x[0], 1.0).sum() == 8
    bound.rebind(forward_only.bind(**FACTS, needs_grad=True).selection)
    assert bound.implementation.id == "torch/eager"
    assert bound(x, x[0], 1.0).sum() == 4


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_an_inference_binding_refuses_gradients(scale):
    bound = scale.bind(**FACTS)
    x = torch.ones(1, 4, requires_grad=True)
    with pytest.raises(GradientError, match="bound for inference"):
        bound(x, torch.ones(4), 1.0)
    with torch.no_grad():
        assert bound(x, torch.ones(4), 1.0).sum() == 4


def test_forward_only_is_declined_when_a_gradient_is_asked_for(forward_only):
    selection = forward_only.select(**FACTS, needs_grad=True)
    assert selection.chosen.id == "torch/eager"
    reasons = {c.id: c.reasons for c in selection.candidates}
    assert reasons["torch/fast"] == ("forward only, and a gradient is asked for",)


def test_eager_gradients(forward_only):
    x = torch.ones(1, 4, requires_grad=True)
    forward_only(x, torch.full((4,), 3.0), 2.0).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4), 6.0))


@pytest.mark.parametrize("door", ["direct", "bound"])
def test_gradients_survive_compilation(forward_only, door):
    call = forward_only if door == "direct" else forward_only.bind(**FACTS, needs_grad=True)
    compiled = torch.compile(lambda x, w: call(x, w, 2.0), backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 4, requires_grad=True)
    compiled(x, torch.full((4,), 3.0)).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4), 6.0))


# -- two doors ---------------------------------------------------------------------------------------------------------


def doubled(call):
    return lambda x, weight: call(x, weight, 2.0)


def graph_ops(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_fake_tensors_go_through_the_opaque_op(scale):
    bound = scale.bind(**FACTS)
    with FakeTensorMode():
        x = torch.empty(3, 4)
        for call in (scale, bound):
            assert call(x, x[0], 1.0).shape == (3, 4)


def test_make_fx_names_the_operator_or_the_implementation(scale):
    x, weight = torch.ones(2, 4), torch.ones(4)
    direct = make_fx(lambda x, w: scale(x, w, 2.0))(x, weight)
    assert graph_ops(direct.graph) == [f"glm5_port.{scale.name}.default"]
    bound = scale.bind(**FACTS)
    traced = make_fx(lambda x, w: bound(x, w, 2.0))(x, weight)
    assert graph_ops(traced.graph) == [f"glm5_port.{scale.name}__torch_eager.default"]
    assert torch.equal(traced(x, weight), bound(x, weight, 2.0))


def test_trace_through_shows_the_body(scale):
    bound = scale.bind(**FACTS)
    x, weight = torch.ones(2, 4), torch.ones(4)
    with trace_through():
        for call in (scale, bound):
            traced = make_fx(doubled(call))(x, weight)
            assert graph_ops(traced.graph) == ["aten.mul.Tensor", "aten.mul.Tensor"]


class Layer(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call
        self.weight = torch.nn.Parameter(torch.full((4,), 3.0), requires_grad=False)

    def forward(self, x):
        return self.call(x, self.weight, 2.0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("door", ["direct", "bound"])
def test_export_names_what_will_run(scale, strict, door):
    call, name = (scale, scale.name) if door == "direct" else (scale.bind(**FACTS), f"{scale.name}__torch_eager")
    program = torch.export.export(Layer(call), (torch.ones(2, 4),), strict=strict)
    assert f"glm5_port.{name}.default" in graph_ops(program.graph)
    assert program.module()(torch.ones(2, 4)).sum() == 48


def test_compilation_without_gradients_keeps_the_opaque_op(scale):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    bound = scale.bind(**FACTS)
    compiled = torch.compile(lambda x, w: bound(x, w, 2.0) + scale(x, w, 1.0), backend=keep, fullgraph=True)
    assert compiled(torch.ones(2, 4), torch.ones(4)).sum() == 24
    names = " ".join(graph_ops(graphs[0].graph))
    assert f"glm5_port.{scale.name}__torch_eager" in names
    assert f"glm5_port.{scale.name}.default" in names


def test_mutation_is_declared_to_torch(declare, set_flags):
    def fill_rows(rows: list[Tensor], cache: list[Tensor], slots: Tensor) -> None:
        for row, field in zip(rows, cache, strict=True):
            field[slots] = row

    operator = declare(fill_rows, mutates=("cache",), fake=lambda rows, cache, slots: None)
    operator.implement(PORTABLE, variant="eager")(
        lambda rows, cache, slots: [f.index_copy_(0, slots, r) for r, f in zip(rows, cache, strict=True)] and None
    )
    bound = operator.bind(device_type="cpu", dtype=torch.float32)

    def write_and_read(row, field, slots):
        bound([row], [field], slots)
        return field * 2

    field, slots = torch.zeros(3, 2), torch.tensor([1])
    compiled = torch.compile(write_and_read, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, 2), field, slots), torch.tensor([[0.0, 0], [2, 2], [0, 0]]))
    assert torch.equal(field, torch.tensor([[0.0, 0], [1, 1], [0, 0]]))


# -- prepared weights --------------------------------------------------------------------------------------------------


class Halved:
    """Stores each expert transposed and halved, so that its layout is visibly not the canonical one."""

    def __init__(self, facts):
        self.parts = {}
        self.experts = facts["experts"]

    def add(self, part, tensors):
        self.parts[part] = (tensors["table"].T * 0.5).contiguous()

    def finish(self):
        if missing := set(range(self.experts)) - set(self.parts):
            raise InputError(f"experts missing: {sorted(missing)}")
        return {"packed": torch.stack([self.parts[e] for e in range(self.experts)]), "scale": 2}


@pytest.fixture
def expert_operator(declare, set_flags):
    def expert(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        return x @ table[0]

    operator = declare(
        expert,
        weights=("table",),
        facts={"experts": lambda table, **_: table.shape[0]},
        fake=lambda x, ids, **_: torch.empty_like(x),
    )

    def packed_matmul(x: Tensor, ids: Tensor, packed: Tensor, scale: int) -> Tensor:
        return x @ packed[0].T * scale

    operator.implement(PORTABLE, variant="packed", rank=1, prepare=Halved)(packed_matmul)
    operator.implement(PORTABLE, variant="eager")(lambda x, ids, table: x @ table[0])
    return operator


EXPERT_FACTS = {"device_type": "cpu", "dtype": torch.float32, "experts": 2}


def test_prepared_weights_stream_in_and_run(expert_operator):
    bound = expert_operator.bind(**EXPERT_FACTS)
    assert bound.implementation.id == "torch/packed"
    table, x, ids = torch.randn(2, 4, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    preparation = bound.prepare()
    for part in range(2):
        preparation.add(part, {"table": table[part]})
    weights = preparation.finish()
    assert set(weights) == {"packed", "scale"}
    torch.testing.assert_close(bound(x, ids, **weights), x @ table[0])
    traced = make_fx(lambda x: bound(x, ids, **weights))(x)
    assert f"glm5_port.{expert_operator.name}__torch_packed.default" in graph_ops(traced.graph)


def test_a_direct_call_takes_what_wants_no_preparation(expert_operator):
    call = (torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(2, 4, 4))
    torch.testing.assert_close(expert_operator(*call), call[0] @ call[2][0])
    bound = next(iter(expert_operator._memo.values()))
    assert bound.implementation.id == "torch/eager"
    assert "wants its weights prepared, which a direct call cannot do" in str(bound.selection)


def test_a_direct_call_of_a_pinned_one_that_prepares_is_refused(expert_operator, set_flags):
    set_flags(**{f"GLM5_PORT_OP_{expert_operator.name.upper()}": "torch/packed"})
    with pytest.raises(SelectionError, match="torch/packed +wants its weights prepared"):
        expert_operator(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(2, 4, 4))


def test_prepared_functions_begin_with_the_other_parameters(expert_operator):
    with pytest.raises(InputError, match=r"then the prepared weights\)"):
        expert_operator.implement("cpu", variant="x", prepare=Halved)(lambda ids, x, packed: x)


def test_missing_experts_are_named(expert_operator):
    for variant in ("packed", "eager"):
        chosen = expert_operator.select(**EXPERT_FACTS).candidates
        assert any(c.id == f"torch/{variant}" for c in chosen)
    canonical = CanonicalWeights(("table",), parts=3)
    canonical.add(1, {"table": torch.ones(4, 4)})
    half = CanonicalWeights(("gate_up", "down"), parts=1)
    half.add(0, {"gate_up": torch.ones(4, 4)})
    with pytest.raises(InputError, match="weights missing: down"):
        half.finish()
    for preparation, absent in ((canonical, r"\[0, 2\]"), (Halved({"experts": 2}), r"\[0, 1\]")):
        with pytest.raises(InputError, match=f"experts missing: {absent}"):
            preparation.finish()


def test_canonical_weights():
    stacked = CanonicalWeights(("gate_up", "down"), parts=2)
    for part in (1, 0):
        stacked.add(part, {"gate_up": torch.full((4, 2), float(part)), "down": torch.full((2, 2), float(part))})
    weights = stacked.finish()
    assert weights["gate_up"].shape == (2, 4, 2)
    assert weights["gate_up"][:, 0, 0].tolist() == [0.0, 1.0]

    for part, shape in ((2, (4, 2)), (-1, (4, 2)), (1, (1, 2))):
        with pytest.raises(InputError, match=rf"gate_up: part {part} of shape .* expected parts 0 to 1 of shape \(4, 2\)"):
            stacked.add(part, {"gate_up": torch.ones(shape)})

    whole = CanonicalWeights(("weight",), parts=None)
    tensor = torch.ones(2)
    with pytest.raises(InputError, match="weights missing: weight"):
        whole.finish()
    with pytest.raises(InputError, match="takes its weights whole"):
        whole.add(0, {"weight": tensor})
    whole.add(None, {"weight": tensor})
    assert whole.finish()["weight"] is tensor


def test_adding_a_part_frees_it_for_the_caller(expert_operator):
    """A preparation keeps its own copy: the canonical tensor may be freed as it is consumed."""
    for preparation in (Halved({"experts": 1}), CanonicalWeights(("table",), parts=1)):
        table = torch.ones(4, 4)
        gone = weakref.ref(table)
        preparation.add(0, {"table": table})
        del table
        assert gone() is None


def test_an_empty_selection_cannot_be_bound(scale):
    selection = scale.select(**FACTS)
    with pytest.raises(InputError, match="cannot bind an empty selection"):
        Bound(dataclasses.replace(selection, chosen=None))
