"""Native indexer kernels, each instruction set of this machine: by hand on exact scores, ties, tails, threads, strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.cases.indexer import paged
from glm5_port.operators.indexer import indexer_scores, lightning_indexer, select_top_k
from glm5_port.testing.cases import Make

HERE = [isa for isa in extension.ISAS if not extension.isa_missing(isa)]
pytestmark = pytest.mark.skipif(not HERE, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")
isas = pytest.mark.parametrize("isa", [isa for isa in ("scalar", "avx2", "avx512", "avx512_bf16") if isa in HERE])
vectors = pytest.mark.parametrize("isa", [isa for isa in extension.VECTOR if isa in HERE])


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[..., Tensor]]]:
    """Binds an operator for a call under GLM5_PORT_CPU_ISA, and holds that the kernel of this set is what runs."""

    def bind(operator: Operator, isa: str, arguments: dict[str, Any]) -> Callable[..., Tensor]:
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


def dtype_for(isa: str) -> torch.dtype:
    return torch.bfloat16 if isa == "avx512_bf16" else torch.float32


def select_by_hand(scores: Tensor, top_k: int) -> list[list[int]]:
    """Highest score, then lowest position: a stable sort of Python numbers."""
    found = []
    for row in scores.tolist():
        allowed = [u for u, score in enumerate(row) if score != -math.inf]
        best = sorted(allowed, key=lambda u: (0, 0.0) if math.isnan(row[u]) else (1, -row[u]))[:top_k]
        found.append(sorted(best) + [-1] * (top_k - len(best)))
    return found


def scores_in_float64(arguments: dict[str, Any]) -> Tensor:
    wide = arguments["index_query"].double()
    return indexer_scores.reference(**{**arguments, "index_query": wide})


# -- selection ---------------------------------------------------------------------------------------------------------


@vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_a_stable_sort(bound: Callable[..., Any], isa: str, dtype: torch.dtype) -> None:
    """Rows long enough that the bar rises several times, with few and with many ties, and all special values."""
    make = Make("selection", dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45], dtype=dtype)
    normal, steps = make.normal(2, 5000), make.integers(3, 5000, low=-3, high=4)
    mixed = torch.where(make.integers(2, 5000, low=0, high=3) == 0, special[make.integers(2, 5000, low=0, high=8).long()], normal)
    ascending, plateau = torch.arange(5000.0).to(dtype).expand(2, -1), torch.zeros(1, 5000, dtype=dtype)
    rows = torch.cat((normal, steps, mixed, ascending, -ascending, plateau, torch.full_like(plateau, -math.inf)))
    for columns in (0, 1, 7, 15, 16, 17, 255, 256, 257, 1000, 5000):
        scores = rows[:, :columns]
        for top_k in (1, 5, 16, 300, 2048, 6000):
            found = bound(select_top_k, isa, {"scores": scores, "top_k": top_k})(scores, top_k=top_k)
            assert found.tolist() == select_by_hand(scores, top_k), (columns, top_k)


@vectors
def test_a_tie_at_the_bar_is_settled_by_position(bound: Callable[..., Any], isa: str) -> None:
    """Rows where the bar is full of ties when something better comes."""
    for better in (1, 100, 700, 2047):
        scores = torch.zeros(1, 9000)
        scores[0, 4000 : 4000 + 2 * better : 2] = torch.arange(better) % 3 + 1.0
        scores[0, ::7] = -1.0
        found = bound(select_top_k, isa, {"scores": scores, "top_k": 2048})(scores, top_k=2048)
        assert found.tolist() == select_by_hand(scores, 2048)


@vectors
def test_selection_of_strided_and_unaligned_rows(bound: Callable[..., Any], isa: str) -> None:
    scores = Make("strides", torch.float32).integers(8, 900, low=-5, high=6)
    memory = torch.full((8 * 901 + 1,), math.nan)
    unaligned = memory[1:].view(8, 901)[:, :900].copy_(scores)
    for given in (unaligned, scores.t().contiguous().t(), scores[::3], scores[:, ::3], scores.flip(1)):
        found = bound(select_top_k, isa, {"scores": given, "top_k": 40})(given, top_k=40)
        assert found.tolist() == select_by_hand(given, 40)


@vectors
def test_no_top_k_is_refused(bound: Callable[..., Any], isa: str) -> None:
    scores = torch.zeros(1, 4)
    with pytest.raises(InputError, match="top_k"):
        bound(select_top_k, isa, {"scores": scores, "top_k": 0})(scores, top_k=0)


# -- scores ------------------------------------------------------------------------------------------------------------


@isas
@pytest.mark.parametrize("cache_format", ["plain", "fp8", "int8"])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (3, 17), (16, 64), (20, 40), (32, 128), (33, 130), (64, 96)])
def test_scores_of_every_size(bound: Callable[..., Any], isa: str, cache_format: str, heads: int, head_dim: int) -> None:
    """Small integers: exact in any order of summation. Blocks, tiles and pages end at different keys and tokens."""
    options: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "page_size": 5, "padding": 1, "integers": True}
    arguments = paged(Make("sizes", dtype_for(isa)), [9, 1, 0], [101, 37, 4], cache_format=cache_format, **options)
    if cache_format == "int8":  # its scale is no power of two
        arguments["index_cache"][1].fill_(0.5)
    scores = bound(indexer_scores, isa, arguments)(**arguments)
    assert torch.equal(scores.double(), scores_in_float64(arguments))


@isas
def test_an_infinite_key_counts_only_through_heads_that_are_there(bound: Callable[..., Any], isa: str) -> None:
    arguments = paged(Make("infinite", dtype_for(isa)), [1], [9], heads=3, head_dim=8, integers=True)
    arguments["index_query"].fill_(1.0)
    arguments["head_weights"].fill_(1.0)
    arguments["index_cache"][0][arguments["block_table"][0, 0], 1, 2] = math.inf
    assert bound(indexer_scores, isa, arguments)(**arguments)[0, 1] == math.inf


@isas
def test_quantised_keys_that_are_not_finite_read_as_nan(bound: Callable[..., Any], isa: str) -> None:
    for cache_format in ("fp8", "int8"):
        make = Make("not finite", dtype_for(isa))
        arguments = paged(make, [1], [40], heads=4, head_dim=40, page_size=64, cache_format=cache_format)
        page = arguments["block_table"][0, 0]
        values, scale = arguments["index_cache"]
        values[page, 3], scale[page, 3] = 0, math.nan
        values[page, 5], scale[page, 5] = 0, math.inf
        if cache_format == "fp8":
            values[page, 7, 33] = 0xFF
        scores = bound(indexer_scores, isa, arguments)(**arguments)
        expected = scores_in_float64(arguments)
        assert torch.equal(scores.isnan(), expected.isnan())
        assert expected[0, [3, 5]].isnan().all()


@isas
def test_every_code_of_e4m3(bound: Callable[..., Any], isa: str) -> None:
    arguments = paged(Make("codes", dtype_for(isa)), [1], [256], heads=1, head_dim=33, page_size=64, cache_format="fp8")
    values, scale = arguments["index_cache"]
    arguments["block_table"][0, :4] = torch.arange(4)
    values.zero_()
    scale.fill_(4.0)
    for column in (0, 32):  # in a whole vector, and in the tail
        query = torch.zeros_like(arguments["index_query"])
        query[..., column] = 1.0
        values.view(-1, 33)[:256] = 0
        values.view(-1, 33)[:256, column] = torch.arange(256, dtype=torch.uint8)
        arguments["index_query"], arguments["head_weights"] = query, torch.ones(1, 1)
        positive = bound(indexer_scores, isa, arguments)(**arguments)
        assert torch.equal(positive[:, :256].double().nan_to_num(-1), scores_in_float64(arguments)[:, :256].nan_to_num(-1))


# -- both in one -------------------------------------------------------------------------------------------------------


@isas
@pytest.mark.parametrize("cache_format", ["plain", "fp8", "int8"])
def test_the_indexer_is_the_selection_of_the_scores(bound: Callable[..., Any], isa: str, cache_format: str) -> None:
    """The same bits: random scores, so that one that is rounded otherwise would show at some cut."""
    make = Make("composition", dtype_for(isa))
    lengths = [300, 41, 9] if isa == "scalar" else [9000, 410, 9]  # over several splits
    arguments = paged(make, [3, 11, 2], lengths, heads=32, head_dim=128, page_size=64, padding=2, cache_format=cache_format)
    scores = bound(indexer_scores, isa, arguments)(**arguments)
    assert (scores[-2:] == -math.inf).all()
    for top_k in (1, 7, 200, 2048):
        found = bound(lightning_indexer, isa, {**arguments, "top_k": top_k})(**arguments, top_k=top_k)
        assert torch.equal(found, select_top_k.reference(scores, top_k=top_k))


@isas
def test_ties_over_blocks_and_splits(bound: Callable[..., Any], isa: str) -> None:
    """Most scores are equal, and the cut lies among them: positions decide, from the first block on."""
    lengths = [700] if isa == "scalar" else [9000]
    arguments = paged(Make("ties", dtype_for(isa)), [2], lengths, heads=2, head_dim=4, page_size=64, integers=True)
    scores = scores_in_float64(arguments)
    for top_k in (3, 100, 4000):
        found = bound(lightning_indexer, isa, {**arguments, "top_k": top_k})(**arguments, top_k=top_k)
        assert torch.equal(found, select_top_k.reference(scores, top_k=top_k))


@isas
def test_threads_batch_and_neighbours_do_not_matter(bound: Callable[..., Any], isa: str) -> None:
    lengths = [200, 90, 30] if isa == "scalar" else [8300, 90, 300]
    make = Make("threads", dtype_for(isa))
    arguments = paged(make, [1, 2, 19], lengths, heads=5, head_dim=34, page_size=16)
    scores, index = (
        bound(op, isa, {**arguments, **more}) for op, more in ((indexer_scores, {}), (lightning_indexer, {"top_k": 60}))
    )
    expected, selected = scores(**arguments), index(**arguments, top_k=60)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(scores(**arguments), expected)
        assert torch.equal(index(**arguments, top_k=60), selected)
    for token, sequence, seen in ((0, 0, lengths[0]), (1, 1, 89), (9, 2, lengths[2] - 12)):
        rows = slice(token, token + 1)
        alone = arguments | {
            "index_query": arguments["index_query"][rows],
            "head_weights": arguments["head_weights"][rows],
            "block_table": arguments["block_table"][sequence : sequence + 1],
            "query_starts": torch.tensor([0, 1], dtype=torch.int32),
            "lengths": torch.tensor([seen], dtype=torch.int32),
        }
        assert torch.equal(scores(**alone), expected[rows])
        assert torch.equal(index(**alone, top_k=60), selected[rows])


@isas
def test_strided_and_unaligned_inputs(bound: Callable[..., Any], isa: str) -> None:
    for cache_format in ("plain", "int8"):
        make = Make("strided", dtype_for(isa))
        arguments = paged(make, [3, 2], [70, 33], heads=4, head_dim=32, page_size=8, cache_format=cache_format)
        expected = bound(indexer_scores, isa, arguments)(**arguments)

        def spread(x: Tensor) -> Tensor:
            """The same numbers at odd addresses, with room between rows."""
            memory = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
            return memory.narrow(-1, 1, x.shape[-1]).copy_(x)

        moved = arguments | {
            "index_query": spread(arguments["index_query"].transpose(0, 1)).transpose(0, 1),
            "head_weights": arguments["head_weights"].t().contiguous().t(),
            "index_cache": [spread(field) for field in arguments["index_cache"]],
            "block_table": spread(arguments["block_table"]),
            "lengths": arguments["lengths"].to(torch.int64),
        }
        assert torch.equal(bound(indexer_scores, isa, moved)(**moved), expected)


@isas
def test_queries_and_keys_of_different_dtypes(bound: Callable[..., Any], isa: str) -> None:
    arguments = paged(Make("dtypes", dtype_for(isa)), [3], [50], heads=4, head_dim=32, integers=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mixed = arguments | {"index_cache": [arguments["index_cache"][0].to(dtype)]}
        assert torch.equal(bound(indexer_scores, isa, mixed)(**mixed).double(), scores_in_float64(arguments))


@isas
def test_no_tokens_and_pages_that_are_not_there(bound: Callable[..., Any], isa: str) -> None:
    nothing = paged(Make("nothing", dtype_for(isa)), [0, 0], [5, 0], heads=2, head_dim=8)
    assert bound(indexer_scores, isa, nothing)(**nothing).shape == (0, 12)
    assert bound(lightning_indexer, isa, {**nothing, "top_k": 3})(**nothing, top_k=3).shape == (0, 3)
    wrong = paged(Make("nothing", dtype_for(isa)), [1], [9], heads=2, head_dim=8)
    wrong["block_table"][:] = 2**31 - 1  # the caller's error: some row is read, as the definition does
    assert torch.equal(bound(indexer_scores, isa, wrong)(**wrong).isfinite(), scores_in_float64(wrong).isfinite())


@isas
def test_shapes_that_do_not_fit_are_refused(bound: Callable[..., Any], isa: str) -> None:
    arguments = paged(Make("shapes", dtype_for(isa)), [1], [9], heads=2, head_dim=8)
    score = bound(indexer_scores, isa, arguments)
    for name in ("head_weights", "block_table", "lengths"):
        with pytest.raises(InputError, match="do not fit"):
            score(**{**arguments, name: arguments[name][:0]})


def test_reasons() -> None:
    facts = {"device_type": "cpu", "heads": 32, "head_dim": 128, "page_size": 64, "top_k": 2048}
    text = str(lightning_indexer.select(**facts, dtype=torch.float32, cache_format="plain"))
    assert "multiplies bfloat16 queries" in text
    text = str(
        indexer_scores.select(**{k: v for k, v in facts.items() if k != "top_k"}, dtype=torch.bfloat16, cache_format="other")
    )
    assert "reads index caches plain, fp8 and int8, not other" in text
