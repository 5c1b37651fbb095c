"""route_experts and expert_mlp: the contract's sentences, and both held against plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.backends.torch import chunks
from glm5_port.errors import InputError
from glm5_port.operators.linear import gated_mlp
from glm5_port.operators.moe import expert_mlp, route_experts
from glm5_port.testing.cases import Make
from tests.operators.contract import bind, check_compiles, check_traces, portable, trace_on

routers = pytest.mark.parametrize("route", portable(route_experts))
mixtures = pytest.mark.parametrize("mixture", portable(expert_mlp))


# -- routing -----------------------------------------------------------------------------------------------------------


def routing(tokens: int = 5, experts: int = 12, **more: Any) -> dict[str, Any]:
    return {
        "hidden": torch.randn(tokens, 8),
        "gate": torch.randn(experts, 8),
        "correction_bias": torch.randn(experts),
        "top_k": 3, "groups": 1, "groups_kept": 1, "renormalise": True, "scale": 2.5,
    } | more  # fmt: skip


def route_by_hand(
    hidden: Tensor, gate: Tensor, correction_bias: Tensor, top_k: int, groups: int, groups_kept: int
) -> list[list[int]]:
    """The ids, by sorting Python numbers."""
    found = []
    for scores in (torch.sigmoid(hidden.float() @ gate.float().T) + correction_bias).tolist():
        size = len(scores) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        rated = [sum(sorted((scores[e] for e in m), reverse=True)[:2]) for m in members]
        kept = sorted(range(groups), key=lambda g: (-rated[g], g))[:groups_kept]
        allowed = [e for g in kept for e in members[g]]
        found.append(sorted(allowed, key=lambda e: (-scores[e], e))[:top_k])
    return found


@routers
def test_routing_follows_the_tie_rule(route: Callable[..., tuple[Tensor, Tensor]]) -> None:
    draw = random.Random(1)
    for trial in range(60):
        groups = draw.choice((1, 2, 4))
        arguments = routing(groups=groups, groups_kept=draw.randint(1, groups))
        if trial % 2:  # scores that are equal exactly
            make = Make(f"ties {trial}", torch.float32)
            arguments["hidden"] = make.integers(5, 8, low=0, high=2) * (torch.arange(8) == 0)
            arguments["gate"], arguments["correction_bias"] = (
                make.integers(12, 8, low=-1, high=2),
                make.integers(12, low=0, high=2),
            )
        _, ids = route(**arguments)
        asked = {name: arguments[name] for name in ("hidden", "gate", "correction_bias", "top_k", "groups", "groups_kept")}
        assert ids.tolist() == route_by_hand(**asked)
        assert ids.dtype == torch.int32


@routers
def test_the_bias_chooses_and_does_not_weigh(route: Callable[..., tuple[Tensor, Tensor]]) -> None:
    arguments = routing(correction_bias=torch.arange(12.0), renormalise=False, scale=1.0)
    weights, ids = route(**arguments)
    assert ids.tolist() == [[11, 10, 9]] * 5
    torch.testing.assert_close(weights, torch.sigmoid(arguments["hidden"] @ arguments["gate"].T)[:, [11, 10, 9]])


@routers
def test_renormalised_weights_sum_to_the_scale(route: Callable[..., tuple[Tensor, Tensor]]) -> None:
    weights, _ = route(**routing(scale=2.5))
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 2.5))


@routers
def test_routing_is_float32_throughout(route: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Biases that bfloat16 cannot tell apart decide."""
    arguments = routing(gate=torch.zeros(12, 8).bfloat16(), correction_bias=8 + torch.arange(12.0) * 1e-3)
    weights, ids = route(**{**arguments, "hidden": arguments["hidden"].bfloat16()})
    assert ids.tolist() == [[11, 10, 9]] * 5
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"groups": 5}, {"groups": 12}, {"groups": 0}, {"groups": 4, "groups_kept": 5}, {"groups_kept": 0}, {"top_k": 0},
              {"top_k": 13}, {"groups": 4, "groups_kept": 1, "top_k": 4}],
)  # fmt: skip
@routers
def test_routing_refuses_what_cannot_be_chosen(route: Callable[..., tuple[Tensor, Tensor]], wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="route_experts: top_k="):
        route(**routing(**wrong))


# -- experts -----------------------------------------------------------------------------------------------------------


def mixing(tokens: int = 11, experts: int = 6, choices: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden": torch.randn(tokens, 16, dtype=dtype),
        "route_weights": torch.rand(tokens, choices, dtype=torch.promote_types(dtype, torch.float32)),
        "ids": torch.randint(-2, experts + 2, (tokens, choices), dtype=torch.int32),
        "gate_up": torch.randn(experts, 16, 16, dtype=dtype) / 4,
        "down": torch.randn(experts, 16, 8, dtype=dtype) / 3,
    }


def mix_by_hand(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    total = torch.zeros_like(hidden)
    for token, row in enumerate(ids.tolist()):
        for choice, expert in enumerate(row):
            if 0 <= expert < len(gate_up):
                result = gated_mlp.reference(hidden[token], gate_up[expert], down[expert])
                total[token] += route_weights[token, choice] * result
    return total


@mixtures
def test_experts_by_hand(mixture: Callable[..., Tensor]) -> None:
    for tokens, experts in ((0, 4), (1, 4), (3, 64), (40, 2), (11, 6)):
        arguments = mixing(tokens, experts)
        torch.testing.assert_close(mixture(**arguments), mix_by_hand(**arguments))


@mixtures
def test_terms_are_summed_in_routing_order_in_float32(mixture: Callable[..., Tensor]) -> None:
    arguments = mixing(2, 3)
    arguments["hidden"][1] = arguments["hidden"][0]
    for name in ("gate_up", "down"):
        arguments[name][:] = arguments[name][0]  # every expert gives the same result
    arguments["ids"] = torch.tensor([[2, 0, 1], [0, 1, 2]], dtype=torch.int32)
    huge = 2.0**26
    arguments["route_weights"] = torch.tensor([[huge, 1.0, -huge], [huge, -huge, 1.0]])
    lost, kept = mixture(**arguments)
    assert (lost == 0).all()
    assert (kept != 0).all()


@mixtures
def test_tokens_without_an_expert_here_give_zeros(mixture: Callable[..., Tensor]) -> None:
    arguments = mixing(4)
    arguments["ids"] = torch.tensor([[-1, 6, 7]] * 3 + [[0, -1, 9]], dtype=torch.int32)
    arguments["route_weights"][:3] = float("nan")  # is not read
    y = mixture(**arguments)
    assert (y[:3] == 0).all()
    assert (y[3] != 0).any()


@mixtures
def test_a_rank_for_each_half_of_the_experts_adds_up(mixture: Callable[..., Tensor]) -> None:
    arguments = mixing(9)
    first = {name: value[:3] if name in ("gate_up", "down") else value for name, value in arguments.items()}
    second = {name: value[3:] if name in ("gate_up", "down") else value for name, value in arguments.items()}
    second["ids"] = arguments["ids"] - 3
    torch.testing.assert_close(mixture(**first) + mixture(**second), mixture(**arguments))


@pytest.mark.parametrize("workspace", [2**28, 5000])
@mixtures
def test_gradients_are_the_references(mixture: Callable[..., Tensor], workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    arguments = mixing()
    names = ("hidden", "route_weights", "gate_up", "down")

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        mine = {n: v.detach().to(dtype).requires_grad_() if n in names else v for n, v in arguments.items()}
        return list(torch.autograd.grad(function(**mine).sin().sum(), [mine[name] for name in names]))

    for ours, gold in zip(gradients(mixture, torch.float32), gradients(expert_mlp.reference, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), gold, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_grouped_and_odd_widths_say_why_not(set_flags: Callable[..., None]) -> None:
    set_flags(GLM5_PORT_OP_EXPERT_MLP="torch")  # chips with kernels of their own prefer those
    arguments = mixing(dtype=torch.bfloat16)
    assert bind(expert_mlp, arguments).implementation.id == "torch/grouped_mm"
    assert bind(expert_mlp, mixing()).implementation.id == "torch/eager"
    record = str(bind(expert_mlp, arguments, width=15).selection)
    assert "15" in record
    assert "multiples of 8" in record


@pytest.mark.parametrize("tokens", [2, 100])
def test_copies_of_experts_keep_to_the_workspace(tokens: int) -> None:
    """At GLM-5 widths, where a copy of all experts would take 19 GB."""
    arguments = {
        "hidden": torch.empty(tokens, 6144, dtype=torch.bfloat16, device="meta"),
        "route_weights": torch.empty(tokens, 8, device="meta"),
        "ids": torch.empty(tokens, 8, dtype=torch.int32, device="meta"),
        "gate_up": torch.empty(256, 4096, 6144, dtype=torch.bfloat16, device="meta"),
        "down": torch.empty(256, 6144, 2048, dtype=torch.bfloat16, device="meta"),
    }
    for sizes in trace_on("cuda", expert_mlp, arguments):
        assert 0 < sizes.largest <= chunks.WORKSPACE_BYTES


def test_both_doors() -> None:
    for arguments in (mixing(), mixing(dtype=torch.bfloat16), mixing(0)):
        check_compiles(expert_mlp, arguments)
    check_traces(expert_mlp, mixing(dtype=torch.bfloat16), ("torch/grouped_mm", "torch/eager"))
    check_compiles(route_experts, routing())
    check_traces(route_experts, routing(groups=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_keeps_gradients(dtype: torch.dtype) -> None:
    arguments = mixing(dtype=dtype)
    bound = bind(expert_mlp, arguments, needs_grad=True)
    torch._dynamo.reset()
    weight = arguments["gate_up"].requires_grad_()
    compiled = torch.compile(lambda values: bound(**values), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(arguments).float().sum(), weight)
    (theirs,) = torch.autograd.grad(bound(**arguments).float().sum(), weight)
    torch.testing.assert_close(ours, theirs)
