"""rms_norm and add_rms_norm: the contract's sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glm5_port.operators.norm import add_rms_norm, rms_norm
from tests.operators.contract import check_compiles, check_traces, portable

norms = pytest.mark.parametrize("norm", portable(rms_norm))


@norms
def test_rows_have_unit_root_mean_square(norm: Callable[..., Tensor]) -> None:
    x = torch.randn(5, 77, dtype=torch.float64) * 7
    y = norm(x, torch.ones(77, dtype=torch.float64), 0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(y / x, (y / x)[:, :1].expand_as(x))


@norms
def test_eps_is_added_to_the_mean_square(norm: Callable[..., Tensor]) -> None:
    x = torch.full((1, 4), 2.0)
    torch.testing.assert_close(norm(x, torch.ones(4), 12.0), torch.full((1, 4), 0.5))


@norms
def test_is_rounded_once(norm: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    exact = norm(x.double(), weight.double(), 1e-5)
    once = exact.to(torch.bfloat16)
    assert (norm(x, weight, 1e-5) == once).float().mean() > 0.999
    twice = ((exact / weight.double()).to(torch.bfloat16) * weight).to(torch.bfloat16)
    assert (twice == once).float().mean() < 0.95, "the test would not notice a second rounding"


@norms
def test_rows_are_independent(norm: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(4, 32), torch.ones(32)
    x[1], x[2, 3], x[3, 4] = 0.0, float("nan"), float("inf")
    y = norm(x, weight, 1e-5)
    assert torch.equal(y[0], norm(x[:1], weight, 1e-5)[0])
    assert y[0].isfinite().all()
    assert (y[1] == 0).all()
    assert y[2].isnan().all()
    assert y[3].isnan().any()


@pytest.mark.parametrize("norm", portable(add_rms_norm))
def test_add_normalises_the_rounded_sum(norm: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, residual, weight = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16() * 30, torch.randn(64).bfloat16()
    y, total = norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, rms_norm.reference(x + residual, weight, 1e-5))


def test_both_doors() -> None:
    one = {"x": torch.randn(3, 64), "weight": torch.randn(64), "eps": 1e-5}
    two = {"x": torch.randn(3, 64), "residual": torch.randn(3, 64), "weight": torch.randn(64), "eps": 1e-5}
    for operator, arguments in ((rms_norm, one), (add_rms_norm, two)):
        check_compiles(operator, arguments)
        check_traces(operator, arguments)
