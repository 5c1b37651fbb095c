"""What the parity cases of linear and linear_per_head do not hold: more rows than segments have programs of their own for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5_port.backends.cuda.linear import linear_per_head_triton, linear_triton
from glm5_port.backends.cuda.matmul import FEW_ROWS
from glm5_port.backends.cuda.triton_support import assume

ROWS = FEW_ROWS + 6


def whole_numbers(*shape: int) -> Tensor:
    """Small enough for every sum to be exact."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


@pytest.mark.parametrize("card", [(8, 0), (9, 0)])
def test_many_rows_sum_all_segments(card: tuple[int, int]) -> None:
    x, weight = whole_numbers(ROWS, 200), whole_numbers(70, 200)
    with assume(card):
        y = linear_triton(x, weight)
        assert torch.equal(y, (x.double() @ weight.double().T).to(torch.bfloat16))
        assert torch.equal(linear_triton(x[:3], weight), y[:3])


def test_many_rows_of_heads() -> None:
    x, weight = whole_numbers(ROWS, 3, 136), whole_numbers(3, 136, 20).transpose(1, 2)
    expected = torch.einsum("thi,hoi->tho", x.double(), weight.double()).to(torch.bfloat16)
    assert torch.equal(linear_per_head_triton(x, weight), expected)
