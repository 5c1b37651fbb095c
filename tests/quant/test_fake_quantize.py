"""The fake quantiser itself: values, gradients, learned scales, compilation; what is refused; the loss to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5_port.errors import InputError
from glm5_port.model.build import build, random_weights
from glm5_port.quant import PER_CHANNEL, Int4Rule, quantize
from glm5_port.quant import fake_quantize as fake_module
from glm5_port.quant.qat import (
    FakeQuantize,
    fake_quantize,
    kl_to_teacher,
    prepare_qat,
    scale_parameters,
)
from tests.quant.qat_models import loss_of, ours, same_bits, small_config

# -- the function ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 64), (3, 4, 64)])
@pytest.mark.parametrize("rule", [Int4Rule(), Int4Rule("signed8", 16), Int4Rule("mse", PER_CHANNEL)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient(shape: tuple[int, ...], rule: Int4Rule, dtype: torch.dtype) -> None:
    master = torch.randn(shape, requires_grad=True)
    value = fake_quantize(master, rule, dtype=dtype)
    assert value.dtype == dtype
    assert same_bits(value, quantize(master.detach(), rule).dequantize())
    weighting = torch.randn(shape, dtype=dtype)
    (value * weighting).sum().backward()
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad, weighting.float())


def written_out(master: Tensor, scales: Tensor, size: int) -> Tensor:
    """LSQ in plain torch operations with straight-through roundings: value and gradients by autograd."""

    def through(exact: Tensor, rounded: Tensor) -> Tensor:
        return exact + (rounded - exact).detach()

    factor = (7 * size) ** -0.5
    scales = (scales - scales * factor).detach() + scales * factor  # the value as it is, the gradient scaled
    scales = through(scales, scales.clamp(min=2.0**-113).bfloat16().double()).unsqueeze(-1)
    quotients = through(master, master.bfloat16().double()).unflatten(-1, (-1, size)) / scales
    values = through(quotients.clamp(-7, 7), quotients.round().clamp(-7, 7)) * scales
    return through(values, values.bfloat16().double()).flatten(-2)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_learned_scales_against_the_formula(size: int) -> None:
    torch.manual_seed(1)
    master = torch.randn(3, 5, 64)
    rule = Int4Rule(group_size=size)
    scales = quantize(master, rule).scales.float() * torch.rand(3, 5, 64 // size).add(0.4)  # some clip, some do not
    weighting = torch.randn(3, 5, 64)
    results = []
    for function, dtype in ((lambda m, s: fake_quantize(m, rule, s), torch.float32), (written_out, torch.float64)):
        m, s = (tensor.detach().clone().to(dtype).requires_grad_() for tensor in (master, scales))
        value = function(m, s) if dtype == torch.float32 else written_out(m, s, size)
        (value * weighting).sum().backward()
        assert m.grad is not None
        assert s.grad is not None
        results.append((value.detach(), m.grad, s.grad))
    (value, of_master, of_scales), (right_value, right_of_master, right_of_scales) = results
    assert torch.equal(value.double(), right_value)
    assert torch.equal(of_master.double(), right_of_master)
    assert (of_master == 0).any()
    assert (of_master != 0).any()
    torch.testing.assert_close(of_scales.double(), right_of_scales, rtol=1e-4, atol=1e-5)


def test_a_learned_scale_below_zero_computes_as_the_smallest_and_comes_back() -> None:
    master = torch.ones(1, 8, requires_grad=True)
    scales = torch.tensor([[-0.5]], requires_grad=True)
    value = fake_quantize(master, Int4Rule(group_size=8), scales)
    assert torch.equal(value, torch.full((1, 8), 7 * 2.0**-113))
    (value - 1).square().sum().backward()
    assert scales.grad is not None
    assert scales.grad < 0


@pytest.mark.parametrize("learned", [False, True], ids=["amax7", "learned"])
def test_compiled_in_one_graph(learned: bool) -> None:
    master = torch.randn(4, 64, requires_grad=True)
    scales = (quantize(master.detach()).scales.float() * 0.8).requires_grad_() if learned else None
    x = torch.randn(3, 64)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(x, master, scales)
        wanted = [master] if scales is None else [master, scales]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

    def layer(x: Tensor, master: Tensor, scales: Tensor | None) -> Tensor:
        return F.linear(x, fake_quantize(master, scales=scales))

    for got, right in zip(run(torch.compile(layer, backend="aot_eager", fullgraph=True)), run(layer), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "bound"])
def test_compiled_layers_follow_their_masters(kind: str) -> None:
    """The layer's class that transformers' modules get, and this project's bound layer; through a fused optimizer too."""
    if kind == "linear":
        from glm5_port.quant.qat import _attach

        layer: Any = nn.Linear(64, 8, bias=False)
        record = fake_module.record_of(layer.weight, None, Int4Rule(), "weight")
        _attach(layer, "weight", FakeQuantize("weight", Int4Rule(), torch.float32, (), record, False))
        master = layer.weight
    else:
        model = ours()
        prepare_qat(model, patterns=["shared_experts"])
        layer = model.layers[1].mlp.shared
        master = layer.gate_up
    x = torch.randn(3, master.shape[-1])
    compiled = torch.compile(layer if kind == "linear" else lambda x: layer(x), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW([master], lr=1e-2, fused=True)
    for step in range(3):
        out = compiled(x)
        torch.testing.assert_close(out, layer(x), rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        out.square().sum().backward()
        assert master.grad is not None
        optimizer.step()
        before = out.detach()
        assert not torch.equal(compiled(x), before), step
    with torch.no_grad():
        master.zero_()
        assert compiled(x).abs().max() == 0


# -- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_bad_masters_are_refused_by_name_and_index(kind: str, theirs: Any) -> None:
    model = ours() if kind == "ours" else theirs
    name = "layers.2.mlp.experts.down" if kind == "ours" else "model.layers.2.mlp.experts.down_proj"
    master = dict(model.named_parameters())[name]
    with torch.no_grad():
        master[3, 5, 17] = float("nan")
    with pytest.raises(InputError, match=rf"{name}: element \[3, 5, 17\] is nan"):
        prepare_qat(model)
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())
    with torch.no_grad():
        master[3, 5, 17] = 0
    prepare_qat(model, learned_scales=True)
    with torch.no_grad():
        master[3, 5, 17] = float("inf")
    with pytest.raises(InputError, match=rf"{name}: element \[3, 5, 17\] is inf"):
        loss_of(model)
    with torch.no_grad():
        master[3, 5, 17] = 0
        scale_parameters(model)[-1][1, 2, 0] = float("nan")
    with pytest.raises(InputError, match=rf"{name}: learned scale \[1, 2, 0\] is nan"):
        loss_of(model)


def test_other_dtypes_are_refused(theirs: Any) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(InputError, match=r"layers.1.mlp.experts.gate_up: masters are float32, this one is torch."):
            prepare_qat(ours(dtype))
        with pytest.raises(InputError, match="proj: masters are float32"):
            fake_quantize(torch.zeros(1, 32, dtype=dtype), name="proj")
    with pytest.raises(InputError, match=r"float16 were asked for"):
        fake_quantize(torch.zeros(1, 32), dtype=torch.float16)
    prepare_qat(theirs)
    theirs.to(torch.bfloat16)
    with pytest.raises(InputError, match="experts.gate_up_proj: masters are float32"):
        loss_of(theirs)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = ours()
    for options, message in (
        ({"rule": Int4Rule(group_size=48)}, r"layers.1.mlp.experts.gate_up: rows of 32 weights .* groups of 48"),
        ({"patterns": ["no_such"]}, "'no_such' finds no projection"),
        ({"patterns": ["("]}, "no regular expression"),
        ({"patterns": ["lm_head"]}, "finds no projection"),
        ({"patterns": ["weights_proj"]}, "finds no projection"),
        ({"patterns": [r"shared_experts\.gate_proj"]}, "only some of the weights in layers.1.mlp.shared.gate_up"),
        ({"experts": False}, "nothing would be quantised: experts=False"),
        ({"rule": Int4Rule("signed8"), "learned_scales": True}, "signed8"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_qat(model, **options)
        assert not any(isinstance(module, FakeQuantize) for module in model.modules())
    with pytest.raises(InputError, match="this model has no routed experts"):
        prepare_qat(ours(first_k_dense_replace=3))
    with pytest.raises(InputError, match="Linear is not known here"):
        prepare_qat(nn.Linear(32, 32))
    config = small_config()
    inference = build(config, random_weights(config, dtype=torch.float32), backend="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match="built for inference"):
        prepare_qat(inference)
    prepare_qat(model)
    with pytest.raises(InputError, match="prepared already"):
        prepare_qat(model)
    with pytest.raises(InputError, match="learned scales of shape"):
        fake_quantize(torch.zeros(2, 32), scales=torch.zeros(2, 2))


def test_the_report_says_what_was_prepared() -> None:
    report = prepare_qat(ours(), patterns=["shared_experts"])
    assert report.components == {"routed experts": 24, "shared experts": 6}
    assert str(report) == (
        "INT4-aware training of 30 matrices (24 of the routed experts, 6 of the shared experts) in 8 parameters, "
        "30,720 weights: amax7 v1, groups of 32, scales by the rule"
    )


# -- the loss ----------------------------------------------------------------------------------------------------------------


def test_kl_to_teacher() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    p = torch.distributions.Categorical(logits=teacher.double() / 2)
    q = torch.distributions.Categorical(logits=student.double() / 2)
    expected = 4 * torch.distributions.kl_divergence(p, q)[mask].mean()
    loss = kl_to_teacher(student, teacher, 2.0, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0, 0].double(), 2 * (q.probs - p.probs)[0, 0].detach() / 4, rtol=1e-4, atol=1e-7)
    assert student.grad[~mask].abs().max() == 0
    spoilt = student.detach().clone()
    spoilt[0, 1] = float("nan")
    assert kl_to_teacher(spoilt, teacher, 2.0, mask).item() == loss.item()
    impossible = teacher.detach().clone()
    impossible[..., 3] = -float("inf")
    assert torch.isfinite(kl_to_teacher(student, impossible))
    assert kl_to_teacher(teacher, teacher).item() == 0
    assert kl_to_teacher(student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool)).item() == 0
    assert kl_to_teacher(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    for arguments in ((student, teacher[:1]), (student, teacher, 0.0), (student, teacher, 1.0, mask[:1])):
        with pytest.raises(InputError):
            kl_to_teacher(*arguments)
