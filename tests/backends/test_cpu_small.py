"""Native normalisation, rotation and routing, each instruction set here: tails, strides, threads, single rows, ties."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.backends.cpu.norm import normalise
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.moe import route_experts
from glm5_port.operators.norm import add_rms_norm, rms_norm
from glm5_port.operators.rope import rotary_angles, rotate
from glm5_port.testing.cases import Make

HERE = [isa for isa in extension.VECTOR if not extension.isa_missing(isa)]
pytestmark = pytest.mark.skipif(not HERE, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")
isas = pytest.mark.parametrize("isa", HERE)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[..., Any]]]:
    """Binds an operator for a call under GLM5_PORT_CPU_ISA, and holds that the kernel of this set is what runs."""

    def bind(operator: Operator, isa: str, arguments: dict[str, Any]) -> Callable[..., Any]:
        monkeypatch.setenv(flags.CPU_ISA.name, isa)
        monkeypatch.setenv(f"GLM5_PORT_OP_{operator.name.upper()}", f"cpu/{isa}")  # by rank, avx512 may come before avx512_bf16
        flags.reset()
        found = operator.bind(**operator.facts_of(arguments))
        assert found.implementation.id == f"cpu/{isa}"
        return found

    yield bind
    torch.set_num_threads(1)
    monkeypatch.undo()
    flags.reset()


def spread(x: Tensor) -> Tensor:
    """The same numbers at odd addresses, with room between rows."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 3).narrow(-1, 1, x.shape[-1]).copy_(x)


def near(ours: Tensor, exact: Tensor) -> None:
    """Within rounding to the dtype of `ours` and some errors of float32 sums."""
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(ours.dtype).eps + 1e-6, atol=1e-6)


# -- normalisation -----------------------------------------------------------------------------------------------------


@isas
@dtypes
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 127, 128, 129, 300, 6144])
def test_norms_of_every_width(bound: Callable[..., Any], isa: str, dtype: torch.dtype, width: int) -> None:
    make = Make("norms", dtype)
    x, residual, weight = make.normal(5, width), make.normal(5, width, std=3.0), make.normal(width, mean=1.0)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    norm = bound(rms_norm, isa, {"x": x, "weight": weight, "eps": 1e-5})
    near(norm(x, weight, 1e-5), exact)
    assert torch.equal(norm(spread(x), weight, 1e-5), norm(x, weight, 1e-5))
    assert torch.equal(norm(x.t().contiguous().t(), weight.float(), 1e-5), norm(x, weight, 1e-5))
    y, total = bound(add_rms_norm, isa, {"x": x, "residual": residual, "weight": weight, "eps": 1e-5})(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm(total, weight, 1e-5))


@isas
@dtypes
@pytest.mark.parametrize("width", [1, 7, 128, 130])
def test_a_bias_makes_it_a_layer_norm(isa: str, dtype: torch.dtype, width: int) -> None:
    make = Make("layer norm", dtype)
    x, weight, bias = make.normal(4, width, mean=2.0), make.normal(width, mean=1.0), make.normal(width)
    y, _ = normalise(extension.ISAS.index(isa), x, weight, 1e-3, bias=bias)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-3)
    torch.testing.assert_close(y.double(), exact, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-5)


@isas
@dtypes
def test_norms_do_not_depend_on_threads_or_neighbours(bound: Callable[..., Any], isa: str, dtype: torch.dtype) -> None:
    make = Make("neighbours", dtype)
    x, weight = make.normal(400, 333), make.normal(333)
    norm = bound(rms_norm, isa, {"x": x, "weight": weight, "eps": 1e-5})
    expected = norm(x, weight, 1e-5)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(norm(x, weight, 1e-5), expected)
    assert all(torch.equal(norm(x[row], weight, 1e-5), expected[row]) for row in (0, 17, 399))
    assert norm(x[:0], weight, 1e-5).shape == (0, 333)
    with pytest.raises(RuntimeError):
        norm(x, weight[:5], 1e-5)


@isas
def test_what_is_not_finite_stays_in_its_row(bound: Callable[..., Any], isa: str) -> None:
    x, weight = Make("finite", torch.float32).normal(4, 40), torch.ones(40)
    x[1, 3], x[2, 39] = math.nan, math.nan
    y = bound(rms_norm, isa, {"x": x, "weight": weight, "eps": 1e-5})(x, weight, 1e-5)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()


# -- rotation ----------------------------------------------------------------------------------------------------------


@isas
@dtypes
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("width", "dims", "start"), [(2, 2, 0), (22, 6, 3), (64, 64, 0), (128, 64, 0), (100, 34, 66), (200, 130, 5)]
)
def test_rotation_has_the_bits_of_the_definition(
    bound: Callable[..., Any], isa: str, dtype: torch.dtype, interleaved: bool, width: int, dims: int, start: int
) -> None:
    """Products and sums are rounded one by one in both."""
    x = Make("rotation", dtype).normal(3, 4, width)
    cos, sin = rotary_angles(torch.tensor([0, 5, 900]), 1e4, dims)
    options = {"interleaved": interleaved, "start": start}
    turn = bound(rotate, isa, {"x": x, "cos": cos, "sin": sin, **options})
    for given in (x, spread(x), x.transpose(0, 1).contiguous().transpose(0, 1), x.flip(2).flip(2)[:, :, :]):
        assert torch.equal(turn(given, cos, sin, **options), rotate.reference(given, cos, sin, **options))
    assert turn(x[:0], cos[:0], sin[:0], **options).shape == (0, 4, width)


@isas
def test_rotation_does_not_depend_on_threads(bound: Callable[..., Any], isa: str) -> None:
    x = Make("threads", torch.bfloat16).normal(300, 32, 128)
    cos, sin = rotary_angles(torch.arange(300), 1e6, 64)
    turn = bound(rotate, isa, {"x": x, "cos": cos, "sin": sin, "interleaved": True, "start": 0})
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        expected = rotate.reference(x, cos, sin, interleaved=True, start=0)
        assert torch.equal(turn(x, cos, sin, interleaved=True, start=0), expected)


@isas
def test_rotation_refuses_angles_that_do_not_fit(bound: Callable[..., Any], isa: str) -> None:
    x, (cos, sin) = torch.zeros(2, 1, 8), rotary_angles(torch.arange(2), 1e4, 8)
    turn = bound(rotate, isa, {"x": x, "cos": cos, "sin": sin, "interleaved": True, "start": 0})
    with pytest.raises(InputError, match="do not fit"):
        turn(x, cos, sin, interleaved=True, start=2)


# -- routing -----------------------------------------------------------------------------------------------------------


def routing(
    make: Make, tokens: int, experts: int, width: int, top_k: int, groups: int = 1, groups_kept: int = 1
) -> dict[str, Any]:
    """Logits are small integers, so that experts share scores exactly."""
    return {
        "hidden": make.integers(tokens, width, low=-1, high=2) * (torch.arange(width) % max(1, width // 5) == 0),
        "gate": make.integers(experts, width, low=-1, high=2),
        "correction_bias": make.integers(experts, low=0, high=2, dtype=torch.float32),
        "top_k": top_k, "groups": groups, "groups_kept": groups_kept, "renormalise": True, "scale": 2.5,
    }  # fmt: skip


@isas
@dtypes
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "options"),
    [
        (1, 2, 1, (2,)),
        (5, 16, 17, (4,)),
        (7, 50, 63, (50,)),
        (37, 49, 130, (6, 7, 3)),
        (70, 256, 64, (8, 8, 4)),
        (3, 12, 9, (3, 6, 2)),
    ],
)
def test_ties_go_to_the_lower_id(
    bound: Callable[..., Any], isa: str, dtype: torch.dtype, tokens: int, experts: int, width: int, options: tuple[int, ...]
) -> None:
    made = routing(Make("ties", dtype), tokens, experts, width, *options)
    route = bound(route_experts, isa, made)
    wide = {name: made[name].double() for name in ("hidden", "gate", "correction_bias")}
    exact_weights, exact_ids = route_experts.reference(**made | wide)
    weights, ids = route(**made)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-6, atol=0)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    strided = made | {"hidden": spread(made["hidden"]), "gate": spread(made["gate"])}
    assert all(torch.equal(a, b) for a, b in zip(route(**strided), (weights, ids), strict=True))


@isas
@dtypes
def test_routing_does_not_depend_on_threads_or_neighbours(bound: Callable[..., Any], isa: str, dtype: torch.dtype) -> None:
    make = Make("neighbours", dtype)
    made = routing(make, 67, 100, 77, 8) | {"hidden": make.normal(67, 77), "gate": make.normal(100, 77)}
    route = bound(route_experts, isa, made)
    expected = route(**made)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(route(**made), expected, strict=True))
    for row in (0, 33, 66):
        alone = route(**made | {"hidden": made["hidden"][row : row + 1]})
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, expected, strict=True))
    assert route(**made | {"hidden": made["hidden"][:0]})[1].shape == (0, 8)


@isas
def test_what_is_not_a_number_ranks_first(bound: Callable[..., Any], isa: str) -> None:
    made = routing(Make("nan", torch.float32), 3, 32, 20, 4, 4, 2)
    made["correction_bias"][9] = math.nan
    made["correction_bias"][12:16] = -math.inf
    made["hidden"][1, 0] = math.nan
    made["renormalise"] = False
    weights, ids = bound(route_experts, isa, made)(**made)
    expected_weights, expected_ids = route_experts.reference(**made)
    assert torch.equal(ids, expected_ids)
    assert ids[0, 0] == 9
    assert torch.equal(weights.isnan(), expected_weights.isnan())


@isas
def test_routing_refuses_what_does_not_fit(bound: Callable[..., Any], isa: str) -> None:
    made = routing(Make("refused", torch.float32), 2, 8, 6, 2)
    route = bound(route_experts, isa, made)
    with pytest.raises(InputError, match="gate"):
        route(**made | {"gate": made["gate"][:, :3]})
    with pytest.raises(InputError, match="divide into groups"):
        route(**made | {"groups": 3})
