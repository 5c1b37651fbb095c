"""Addresses that 32 bits do not hold: caches, weights and rows that lie more than 2^31 numbers behind the first.

The tensors are as large as on a card, and hold nothing: the operating system gives memory to pages that are touched, and few are.
Each result is compared, bit by bit, with that of the same rows in a small tensor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.plugins import load_plugins
from glm5_port.registry import OPERATORS

load_plugins()

FAR = 2**31
PAGE, LATENT, ROPE, INDEX = 64, 512, 64, 128
LENGTH = 3 * PAGE - 5


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is not there until it is written."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"NOT TESTED: addresses beyond 32 bits; the system gives no address space ({error})")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def run(operator: str, *arguments: Any, **named: Any) -> Any:
    with torch.no_grad():
        return OPERATORS[operator].implementations["cuda/triton"].function(*arguments, **named)


def two_caches(fields: list[tuple[int, torch.dtype]]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(small cache, large one, block table of each): three pages, the first of the small one and the last of the large one, of
    which the first field reaches beyond 2^31 numbers."""
    pages = FAR // (PAGE * fields[0][0]) + 7
    small = [torch.zeros(3, PAGE, width, dtype=dtype) for width, dtype in fields]
    large = [untouched(pages, PAGE, width, dtype=dtype) for width, dtype in fields]
    for field in large:
        field[-3:] = 0
    first = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    return small, large, first, first + (pages - 3)


FORMATS = {"plain": [(LATENT, torch.bfloat16), (ROPE, torch.bfloat16)], "fp8": [(656, torch.uint8)]}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_latent_cache(cache_format: str) -> None:
    small, large, small_table, large_table = two_caches(FORMATS[cache_format])
    rows = [random(LENGTH, LATENT), random(LENGTH, ROPE)]
    place = torch.arange(LENGTH)
    for cache, table in ((small, small_table), (large, large_table)):
        slots = table[0].long()[place // PAGE] * PAGE + place % PAGE
        run("write_cache", rows, cache, slots, cache_format=cache_format)
    for mine, other in zip(small, large, strict=True):
        assert torch.equal(mine.view(torch.uint8), other[-3:].view(torch.uint8))
    assert any(field.view(torch.uint8).any() for field in small)
    query, query_rope = random(1, 2, LATENT), random(1, 2, ROPE)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([LENGTH], dtype=torch.int32)
    chosen = torch.tensor([[0, 70, 150, LENGTH - 1, -1]], dtype=torch.int32)
    options = {"scale": 0.05, "cache_format": cache_format}
    for operator, extra in (("sparse_mla_attention", [chosen]), ("mla_attention_absorbed", [])):
        results = [
            run(operator, query, query_rope, cache, *extra, table, starts, lengths, **options)
            for cache, table in ((small, small_table), (large, large_table))
        ]
        assert torch.equal(*results)
        assert results[0].float().abs().max() > 0.01


def test_index_cache() -> None:
    small, large, small_table, large_table = two_caches([(INDEX, torch.bfloat16)])
    keys, place = random(LENGTH, INDEX), torch.arange(LENGTH)
    results = []
    for cache, table in ((small, small_table), (large, large_table)):
        run("write_cache", [keys], cache, table[0].long()[place // PAGE] * PAGE + place % PAGE, cache_format="plain")
        results.append(
            run(
                "indexer_scores", random(1, 4, INDEX), random(1, 4, dtype=torch.float32), cache, table,
                torch.tensor([0, 1], dtype=torch.int32), torch.tensor([LENGTH], dtype=torch.int32), cache_format="plain",
            )
        )  # fmt: skip
    assert torch.equal(*results)


def far_apart(values: Tensor, *, stride: int) -> Tensor:
    """`values` with so many numbers between the entries of its first dimension."""
    memory = untouched((values.shape[0] - 1) * stride + values[0].numel(), dtype=values.dtype)
    spread = memory.as_strided(values.shape, (stride, *values.stride()[1:]))
    return spread.copy_(values)


APART = 2**30 + 2**29
"""Below 2^31, so that it is a 32-bit number; twice that is not."""


def test_rows_and_weights_of_products() -> None:
    x, weight = random(3, 40), random(3, 40)
    expected = run("linear", x, weight)
    assert torch.equal(run("linear", far_apart(x, stride=APART), weight), expected)
    assert torch.equal(run("linear", x, far_apart(weight, stride=APART)), expected)
    inputs_first = far_apart(random(3, 5), stride=APART)  # the key half of kv_b lies so
    assert torch.equal(run("linear", random(2, 3), inputs_first.T), run("linear", random(2, 3), random(3, 5).T))
    assert torch.equal(run("rms_norm", far_apart(x, stride=APART), random(40), 1e-5), run("rms_norm", x, random(40), 1e-5))


def test_weights_of_experts() -> None:
    hidden, ids = random(2, 32), torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    weights = torch.full((2, 2), 0.5)
    gate_up, down = random(3, 32, 32), random(3, 32, 16)
    expected = run("expert_mlp", hidden, weights, ids, gate_up, down)
    far = run("expert_mlp", hidden, weights, ids, far_apart(gate_up, stride=APART), far_apart(down, stride=APART))
    assert torch.equal(far, expected)


def test_weights_of_a_quantiser() -> None:
    weight = random(3, 64)
    for operator in ("int4_quantize", "int4_quantize_measured"):
        near = run(operator, weight, group_size=32, rule="amax7")
        far = run(operator, far_apart(weight, stride=APART), group_size=32, rule="amax7")
        assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
