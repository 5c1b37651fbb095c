"""The indexer: the contract's sentences, and scores and selection held against plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.backends.torch import chunks
from glm5_port.backends.torch import indexer as portable_indexer
from glm5_port.errors import InputError
from glm5_port.operators.cache import INDEX, cache_layout
from glm5_port.operators.cases.indexer import paged
from glm5_port.operators.indexer import indexer_prologue, indexer_scores, lightning_indexer, select_top_k
from glm5_port.operators.rope import rotary_angles
from glm5_port.testing.cases import Make
from tests.operators.contract import check_compiles, check_traces, portable, trace_on

prologues = pytest.mark.parametrize("prologue", portable(indexer_prologue))
scorers = pytest.mark.parametrize("score", portable(indexer_scores))
selectors = pytest.mark.parametrize("select", portable(select_top_k))
indexers = pytest.mark.parametrize("index", portable(lightning_indexer))


@pytest.fixture(params=[None, (3000, 5), (40_000, 8)], ids=["whole", "one_row_blocks_of_5", "blocks_of_8"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default memory budget, and two so small that tiles, chunks and blocks all split."""
    if request.param is not None:
        budget, block = request.param
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", budget)
        monkeypatch.setattr(portable_indexer, "WORKSPACE_BYTES", budget)
        monkeypatch.setattr(portable_indexer, "SHORTEST_BLOCK", block)


def call(seed: str, new: list[int], lengths: list[int], **options: Any) -> dict[str, Any]:
    """A call whose scores are small integers, so that they are exact and collide."""
    return paged(Make(seed, torch.float32), new, lengths, integers=True, **options)


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


# -- selection ---------------------------------------------------------------------------------------------------------


def select_by_hand(scores: Tensor, top_k: int) -> list[list[int]]:
    """Highest score, then lowest position, by sorting Python numbers."""
    found = []
    for row in scores.tolist():
        allowed = [u for u, score in enumerate(row) if score != -math.inf]
        best = sorted(allowed, key=lambda u: (not math.isnan(row[u]), 0 if math.isnan(row[u]) else -row[u], u))[:top_k]
        found.append(sorted(best) + [-1] * (top_k - len(best)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@selectors
def test_selection_by_hand(select: Callable[..., Tensor], dtype: torch.dtype, workspace: None) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan], dtype=dtype)
    make = Make("selection by hand", dtype)
    for trial in range(60):
        rows, columns, top_k = (int(make.integers(1, low=low, high=high)) for low, high in ((0, 6), (0, 20), (1, 24)))
        some = values[: 5 if trial % 2 else 8]
        scores = some[make.integers(rows, columns, low=0, high=len(some), dtype=torch.int64)]
        indices = select(scores, top_k=top_k)
        assert indices.dtype == torch.int32
        assert indices.shape == (rows, top_k)
        assert indices.tolist() == select_by_hand(scores, top_k)


@selectors
def test_zero_beats_negative_scores_and_the_plateau_fills_from_the_left(select: Callable[..., Tensor]) -> None:
    scores = torch.tensor([[-1.0, 0.0, -3.0, 0.0, 5.0, -0.0, 0.0, -2.0]])
    assert select(scores, top_k=3).tolist() == [[1, 3, 4]]
    assert select(scores, top_k=7).tolist() == [[0, 1, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("top_k", [0, -1])
@selectors
def test_selection_refuses_no_top_k(select: Callable[..., Tensor], top_k: int) -> None:
    with pytest.raises(InputError, match="top_k"):
        select(torch.zeros(1, 4), top_k=top_k)


# -- scores ------------------------------------------------------------------------------------------------------------


def scores_by_hand(
    index_query: Tensor, head_weights: Tensor, keys: Tensor, block_table: Tensor, query_starts: Tensor, lengths: Tensor
) -> Tensor:
    """The formula, number by number. `keys` [pages, page_size, X]."""
    page_size = keys.shape[1]
    found = torch.full((len(index_query), block_table.shape[1] * page_size), -math.inf)
    for sequence, length in enumerate(lengths.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        for token in range(first, end):
            for position in range(length - (end - token) + 1):
                key = keys[block_table[sequence, position // page_size], position % page_size]
                dots = [max(0.0, float(query @ key)) for query in index_query[token]]
                found[token, position] = sum(w * d for w, d in zip(head_weights[token].tolist(), dots, strict=True))
    return found


CALLS = [
    ("decode", [1, 1], [5, 9], {}),
    ("prefill", [7], [7], {}),
    ("chunked", [3, 0, 1, 5], [9, 4, 1, 6], {"padding": 2}),
    ("odd page", [2, 4], [10, 5], {"page_size": 3}),
    ("one page", [2], [11], {"page_size": 16}),
    ("nothing", [0, 0], [0, 3], {"padding": 2}),
    ("fp8", [2, 3], [9, 4], {"cache_format": "fp8"}),
]


@pytest.mark.parametrize(("name", "new", "lengths", "options"), CALLS, ids=[name for name, *_ in CALLS])
@scorers
def test_scores_by_hand(
    score: Callable[..., Tensor], name: str, new: list[int], lengths: list[int], options: dict[str, Any], workspace: None
) -> None:
    arguments = call(name, new, lengths, heads=2, head_dim=4, **options)
    (keys,) = cache_layout(INDEX, arguments["cache_format"]).decode(arguments["index_cache"], torch.float32)
    by_hand = scores_by_hand(keys=keys, **without(arguments, "index_cache", "cache_format"))
    assert torch.equal(score(**arguments), by_hand)


@scorers
def test_scores_have_gradients_for_query_weights_and_keys(score: Callable[..., Tensor], workspace: None) -> None:
    arguments = call("gradients", [2, 1], [5, 3], heads=2, head_dim=4)
    names = ("index_query", "head_weights", "keys")
    make = Make("gradients", torch.float64)
    tensors = [
        make.normal(*t.shape).requires_grad_()
        for t in (arguments["index_query"], arguments["head_weights"], *arguments["index_cache"])
    ]
    rest = without(arguments, *names, "index_cache")

    def visible(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        scores = score(index_query=query, head_weights=weights, index_cache=[keys], **rest)
        return scores[scores.isfinite()]

    assert torch.autograd.gradcheck(visible, tensors)


@scorers
def test_scores_refuse_an_unknown_format(score: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match="did you mean fp8"):
        score(**{**call("format", [1], [4]), "cache_format": "fp9"})


# -- scores and selection in one ---------------------------------------------------------------------------------------


@indexers
def test_is_the_composition(index: Callable[..., Tensor], workspace: None) -> None:
    for trial, (name, new, lengths, options) in enumerate(CALLS * 2):
        arguments = call(f"{name} {trial}", new, lengths, heads=2, head_dim=3, **options)
        scores = indexer_scores.reference(**arguments)
        for top_k in (1, 3, 6, 40):
            assert index(**arguments, top_k=top_k).tolist() == select_by_hand(scores, top_k)


@indexers
def test_a_batch_is_each_sequence_alone(index: Callable[..., Tensor], workspace: None) -> None:
    new, lengths = [3, 1, 5], [17, 9, 5]
    arguments = call("batch", new, lengths)
    together = index(**arguments, top_k=4)
    for sequence, (count, length) in enumerate(zip(new, lengths, strict=True)):
        rows = slice(sum(new[:sequence]), sum(new[: sequence + 1]))
        alone = {
            **arguments,
            "index_query": arguments["index_query"][rows],
            "head_weights": arguments["head_weights"][rows],
            "block_table": arguments["block_table"][sequence : sequence + 1],
            "query_starts": torch.tensor([0, count], dtype=torch.int32),
            "lengths": torch.tensor([length], dtype=torch.int32),
        }
        assert torch.equal(index(**alone, top_k=4), together[rows])


@indexers
def test_chunked_prefill_is_the_whole_prefill(index: Callable[..., Tensor], workspace: None) -> None:
    arguments = call("chunked prefill", [13], [13])
    whole = index(**arguments, top_k=4)
    for first, end in ((0, 5), (5, 6), (6, 13)):
        chunk = {
            **arguments,
            "index_query": arguments["index_query"][first:end],
            "head_weights": arguments["head_weights"][first:end],
            "query_starts": torch.tensor([0, end - first], dtype=torch.int32),
            "lengths": torch.tensor([end], dtype=torch.int32),
        }
        assert torch.equal(index(**chunk, top_k=4), whole[first:end])


@indexers
def test_the_page_size_does_not_matter(index: Callable[..., Tensor]) -> None:
    arguments = call("pages", [4], [23], page_size=1)
    keys = arguments["index_cache"][0][arguments["block_table"][0, :23].long(), 0]
    expected = index(**arguments, top_k=5)
    for page_size in (2, 3, 7, 64):
        pages = -(-23 // page_size)
        cache = torch.zeros(pages * page_size, keys.shape[1])
        cache[:23] = keys
        order = torch.arange(pages).flip(0)
        paged_again = {
            **arguments,
            "index_cache": [cache.view(pages, page_size, -1)[order].contiguous()],
            "block_table": order[None].to(torch.int32),
        }
        assert torch.equal(index(**paged_again, top_k=5), expected)


@indexers
def test_the_future_does_not_matter(index: Callable[..., Tensor]) -> None:
    arguments = call("future", [6], [11], page_size=1)
    before = index(**arguments, top_k=4)
    (keys,) = arguments["index_cache"]
    for row, position in enumerate(range(5, 11)):
        changed = keys.clone()
        changed[arguments["block_table"][0, position + 1 : 11].long()] = 100.0
        assert torch.equal(index(**{**arguments, "index_cache": [changed]}, top_k=4)[: row + 1], before[: row + 1])
        assert before[row].max() <= position


@indexers
def test_padding_selects_nothing(index: Callable[..., Tensor]) -> None:
    indices = index(**call("padding", [2, 1], [5, 3], padding=3), top_k=4)
    assert (indices[3:] == -1).all()
    assert (indices[:3, 0] >= 0).all()


# -- prologue ----------------------------------------------------------------------------------------------------------


def projecting(dtype: torch.dtype = torch.float64, **more: Any) -> dict[str, Any]:
    cos, sin = rotary_angles(torch.tensor([3, 50, 7]), 1e4, 8)
    make = Make("prologue", dtype)
    return {
        "hidden": make.normal(3, 24), "query_residual": make.normal(3, 12),
        "wq_b": make.normal(32, 12), "wk": make.normal(16, 24), "weights_proj": make.normal(2, 24),
        "k_norm_weight": make.normal(16), "k_norm_bias": make.normal(16),
        "cos": cos, "sin": sin, "k_norm_eps": 1e-6, "rope_interleaved": True,
    } | more  # fmt: skip


@prologues
def test_prologue_by_hand(prologue: Callable[..., tuple[Tensor, ...]]) -> None:
    a = projecting()
    still = {"cos": torch.ones(3, 4, dtype=torch.float64), "sin": torch.zeros(3, 4, dtype=torch.float64)}
    query, key, weights = prologue(**{**a, **still})
    raw = a["hidden"] @ a["wk"].T
    centred = raw - raw.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(query, (a["query_residual"] @ a["wq_b"].T).view(3, 2, 16))
    torch.testing.assert_close(key, normal * a["k_norm_weight"] + a["k_norm_bias"])
    torch.testing.assert_close(weights, a["hidden"] @ a["weights_proj"].T / math.sqrt(2 * 16))


@prologues
def test_the_first_channels_rotate(prologue: Callable[..., tuple[Tensor, ...]]) -> None:
    a = projecting()
    still = prologue(**{**a, "cos": torch.ones(3, 4, dtype=torch.float64), "sin": torch.zeros(3, 4, dtype=torch.float64)})
    for turned, raw in zip(prologue(**a)[:2], still[:2], strict=True):
        torch.testing.assert_close(turned[..., 8:], raw[..., 8:])
        assert not torch.isclose(turned[..., :8], raw[..., :8]).all(-1).any()
        pairs = (turned[..., :8].unflatten(-1, (4, 2)), raw[..., :8].unflatten(-1, (4, 2)))
        torch.testing.assert_close(*(pair.norm(dim=-1) for pair in pairs))  # interleaved pairs keep their length


@prologues
def test_head_weights_stay_float32(prologue: Callable[..., tuple[Tensor, ...]]) -> None:
    query, key, weights = prologue(**projecting(torch.bfloat16))
    assert query.dtype == key.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert (weights.bfloat16().float() != weights).any()


# -- both doors --------------------------------------------------------------------------------------------------------


def test_both_doors() -> None:
    arguments = call("doors", [2, 3], [9, 12], padding=1)
    check_compiles(indexer_prologue, projecting(torch.float32))
    check_traces(indexer_prologue, projecting(torch.bfloat16))
    check_compiles(indexer_scores, arguments)
    check_compiles(lightning_indexer, {**arguments, "top_k": 4})
    check_compiles(select_top_k, {"scores": torch.randn(3, 9), "top_k": 4})
    check_traces(select_top_k, {"scores": torch.randn(3, 9), "top_k": 4})
    for cache_format in ("plain", "fp8", "int8"):
        made = call("doors", [2, 3], [9, 12], cache_format=cache_format)
        check_traces(indexer_scores, made)
        check_traces(lightning_indexer, {**made, "top_k": 4})


@pytest.mark.parametrize(("tokens", "batch"), [(8, 8), (512, 1), (300, 3)])
def test_memory_does_not_grow_with_the_context(tokens: int, batch: int) -> None:
    """At GLM-5 widths and 131,072 positions no tensor exceeds the workspace: heads x queries x keys would take up to 8.6 GB."""
    positions, page_size = 131_072, 64
    arguments = {
        "index_query": torch.empty(tokens, 32, 128, dtype=torch.bfloat16, device="meta"),
        "head_weights": torch.empty(tokens, 32, device="meta"),
        "index_cache": [torch.empty(batch * positions // page_size, page_size, 128, dtype=torch.bfloat16, device="meta")],
        "block_table": torch.empty(batch, positions // page_size, dtype=torch.int32, device="meta"),
        "query_starts": torch.empty(batch + 1, dtype=torch.int32, device="meta"),
        "lengths": torch.empty(batch, dtype=torch.int32, device="meta"),
        "top_k": 2048,
        "cache_format": "plain",
    }
    for sizes in trace_on("cuda", lightning_indexer, arguments):
        assert 0 < sizes.largest <= chunks.WORKSPACE_BYTES
