"""linear and gated_mlp: the contract's sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glm5_port.errors import GradientError
from glm5_port.operators.linear import gated_mlp, linear
from tests.operators.contract import bind, check_compiles, check_traces, portable

linears = pytest.mark.parametrize("function", portable(linear))
mlps = pytest.mark.parametrize("function", portable(gated_mlp))


@linears
def test_linear_is_rounded_once(function: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(16, 512).bfloat16(), torch.randn(32, 512).bfloat16()
    exact = (x.double() @ weight.double().T).to(torch.bfloat16)
    assert (function(x, weight) == exact).float().mean() > 0.99
    in_bfloat16 = torch.zeros(16, 32, dtype=torch.bfloat16)
    for channel in range(512):
        in_bfloat16 += x[:, channel, None] * weight[:, channel]
    assert (in_bfloat16 == exact).float().mean() < 0.9, "the test would not notice a narrow accumulator"


@linears
def test_linear_keeps_a_bad_row_to_itself(function: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    x[1, 2] = float("nan")
    y = function(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 16), (16,), (2, 0, 16), (2, 3, 16)])
@linears
def test_linear_takes_any_leading_dimensions(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    assert function(torch.randn(shape), torch.randn(5, 16)).shape == (*shape[:-1], 5)


@mlps
def test_gated_mlp_by_hand(function: Callable[..., Tensor]) -> None:
    """One channel: gate 2, up 3, down 5."""
    y = function(torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0]]), torch.tensor([[5.0]]))
    sigmoid = 1 / (1 + torch.exp(torch.tensor(-2.0)))
    torch.testing.assert_close(y, (5 * 3 * 2 * sigmoid).view(1, 1))


@mlps
def test_gated_mlp_passes_gradients(function: Callable[..., Tensor]) -> None:
    tensors = (torch.randn(3, 4), torch.randn(6, 4), torch.randn(4, 3))
    assert torch.autograd.gradcheck(function, [t.double().requires_grad_() for t in tensors])


def test_bound_for_inference_refuses_gradients() -> None:
    arguments = {"x": torch.randn(2, 4), "weight": torch.randn(3, 4)}
    bound = bind(linear, arguments)
    bound(**arguments)
    with pytest.raises(GradientError, match="trainable=True"):
        bound(arguments["x"].requires_grad_(), arguments["weight"])


def test_both_doors() -> None:
    one = {"x": torch.randn(3, 64), "weight": torch.randn(5, 64)}
    two = {"x": torch.randn(3, 64), "gate_up": torch.randn(48, 64), "down": torch.randn(64, 24)}
    for operator, arguments in ((linear, one), (gated_mlp, two)):
        check_compiles(operator, arguments)
        check_traces(operator, arguments)
