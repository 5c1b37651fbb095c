"""Parity cases of `glm5_port.operators.indexer`, and how selections are compared: by value and by the tie rule.

Shape legend: T tokens; J index heads; X index head size; S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.cache import INDEX, cache_layout
from glm5_port.operators.cases.paging import random_batch
from glm5_port.operators.indexer import indexer_prologue, indexer_scores, lightning_indexer, select_top_k
from glm5_port.operators.rope import rotary_angles
from glm5_port.testing.cases import TIES, WIDTH, Case, Make, Sweep, suite
from glm5_port.testing.comparison import Outcome, allowed_error, check_equal, check_form


@suite(indexer_prologue, rows=("hidden", "query_residual", "cos", "sin"))
def indexer_prologue_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, tokens: int, width: int = 64, rank: int = 48, heads: int = 4, head_dim: int = 32, rotated: int = 16,
        eps: float = 1e-6, interleaved: bool = True, first_position: int = 0, key_std: float = 1.0,
    ) -> dict[str, Any]:  # fmt: skip
        cos, sin = rotary_angles(torch.arange(first_position, first_position + tokens), 1e6, rotated)
        return {
            "hidden": make.normal(tokens, width),
            "query_residual": make.normal(tokens, rank),
            "wq_b": make.normal(heads * head_dim, rank, std=rank**-0.5),
            "wk": make.normal(head_dim, width, std=key_std * width**-0.5),
            "k_norm_weight": make.normal(head_dim, mean=1.0, std=0.1),
            "k_norm_bias": make.normal(head_dim, std=0.1),
            "weights_proj": make.normal(heads, width, std=width**-0.5),
            "cos": cos,
            "sin": sin,
            "k_norm_eps": eps,
            "rope_interleaved": interleaved,
        }

    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("odd_sizes", lambda make: arguments(make, 7, width=77, rank=33, heads=3, head_dim=22, rotated=6))
    yield Case("half_split", lambda make: arguments(make, 7, interleaved=False, first_position=5))
    yield Case("whole_head_rotates", lambda make: arguments(make, 5, rotated=32, first_position=9))
    yield Case("far_positions", lambda make: arguments(make, 5, first_position=1_000_000))
    yield Case("small_keys_large_eps", lambda make: arguments(make, 5, eps=1e-2, key_std=0.05))
    yield Case("small_keys_small_eps", lambda make: arguments(make, 5, key_std=0.05))
    yield Case("not_finite", lambda make: {**arguments(make, 3), "hidden": make.with_non_finite(3, 64)})
    yield Case(
        "glm5_indexer",
        lambda make: arguments(make, 3, width=6144, rank=2048, heads=32, head_dim=128, rotated=64, first_position=70_000),
        tags=WIDTH,
    )

    def random(make: Make) -> dict[str, Any]:
        rotated = 2 * make.size(1, 20)
        sizes = {"width": make.size(1, 150), "rank": make.size(1, 100), "heads": make.size(1, 9)}
        sizes |= {"head_dim": rotated + make.size(0, 40), "rotated": rotated, "first_position": make.size(0, 10**6)}
        return arguments(make, make.size(0, 30), **sizes, interleaved=make.one_of(False, True))

    yield Sweep(random)


# -- scores over a paged cache -----------------------------------------------------------------------------------------


def paged(
    make: Make,
    new: Sequence[int],
    lengths: Sequence[int],
    *,
    padding: int = 0,
    heads: int = 4,
    head_dim: int = 32,
    page_size: int = 4,
    cache_format: str = "plain",
    integers: bool = False,
) -> dict[str, Any]:
    """A call over sequences with `new[b]` tokens each, `lengths[b]` cached ones, and `padding` tokens after them.

    Pages are shuffled; block-table entries beyond a sequence's pages name no page at all. With `integers` every number is a
    small integer, so that scores are exact in any order of summation and collide often."""
    tokens, batch = sum(new) + padding, len(new)
    pages_of = [-(-length // page_size) for length in lengths]
    block_table = torch.full((batch, max(pages_of) + 1), 10**6, dtype=torch.int32)
    block_table[:, -1] = -1
    page_ids = make.permutation(sum(pages_of) + 2, torch.int32)
    for sequence, count in enumerate(pages_of):
        first = sum(pages_of[:sequence])
        block_table[sequence, :count] = page_ids[first : first + count]
    keys_shape, query_shape = (len(page_ids), page_size, head_dim), (tokens, heads, head_dim)
    if integers:
        keys, query = make.integers(*keys_shape, low=-2, high=3), make.integers(*query_shape, low=-1, high=2)
        head_weights = make.integers(tokens, heads, low=-2, high=3, dtype=torch.float32)
    else:
        keys, query = make.normal(*keys_shape), make.normal(*query_shape)
        head_weights = make.normal(tokens, heads, std=(heads * head_dim) ** -0.5, dtype=torch.float32)
    return {
        "index_query": query,
        "head_weights": head_weights,
        "index_cache": cache_layout(INDEX, cache_format).encode([keys]),
        "block_table": block_table,
        "query_starts": torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "cache_format": cache_format,
    }


def _zero_plateau(make: Make, *, sign: int) -> dict[str, Any]:
    """Queries are positive and most keys negative, so most dot products are <= 0 and most scores exactly zero; a few keys are
    positive and score above (sign 1) or below (sign -1) the plateau."""
    made = paged(make, [9], [40])
    keys = -make.integers(*made["index_cache"][0].shape, low=1, high=3)
    made["index_query"] = make.integers(*made["index_query"].shape, low=1, high=3)
    made["index_cache"] = [torch.where(torch.arange(4)[:, None] == 2, -keys, keys)]  # row 2 of each page
    made["head_weights"] = sign * make.integers(9, 4, low=1, high=3, dtype=torch.float32)
    return made


def _unwritten_rows(make: Make) -> dict[str, Any]:
    """Rows of the cache that no token may see hold NaN."""
    made = paged(make, [2, 1], [7, 9])
    (keys,) = made["index_cache"]
    written = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for pages, length in zip(made["block_table"], made["lengths"].tolist(), strict=True):
        for position in range(length):
            written[pages[position // 4], position % 4] = True
    return {**made, "index_cache": [keys.masked_fill(~written[..., None], float("nan"))]}


def _nan_key(make: Make) -> dict[str, Any]:
    made = paged(make, [3], [9])
    made["index_cache"][0][made["block_table"][0, 1], 3, 5] = float("nan")  # position 7: two of the tokens see it
    return made


def _scoring_cases(top_k: dict[str, int], long_top_k: dict[str, int], glm5_top_k: dict[str, int]) -> Iterator[Case]:
    """The cases that scores, and scores with selection, share; `top_k` is empty where there is no such argument."""

    def case(name: str, new: Sequence[int], lengths: Sequence[int], more: dict[str, int] = top_k, **options: Any) -> Case:
        tags = (WIDTH if name.startswith("glm5") else frozenset()) | (TIES if options.get("integers") else frozenset())
        return Case(
            name, lambda make: {**paged(make, new, lengths, **options), **more}, tags=tags, exact=bool(options.get("integers"))
        )

    yield case("no_tokens", [0, 0], [5, 0])
    yield case("one_token_of_one", [1], [1])
    yield case("decode", [1, 1, 1], [9, 1, 14])
    yield case("prefill", [13], [13])
    yield case("chunked_prefill_unequal", [3, 1, 6, 0], [17, 9, 6, 4])
    yield case("context_shorter_than_top_k", [2, 3], [3, 4])
    yield case("context_just_over_top_k", [1, 2], [6, 7])
    yield case("padding_at_the_end", [2, 3], [8, 11], padding=4)
    yield case("all_padding", [0], [0], padding=3)
    yield case("odd_sizes", [5, 2], [23, 8], heads=3, head_dim=17, page_size=7)
    yield case("page_of_one", [3], [10], page_size=1)
    yield case("one_contiguous_page", [3], [29], page_size=64)
    yield case("fp8", [3, 1], [21, 10], cache_format="fp8", head_dim=128)
    yield case("int8", [3, 1], [21, 10], cache_format="int8", head_dim=128)
    yield case("long_context", [2], [5000], long_top_k, heads=2, head_dim=16, page_size=64)
    yield Case("unwritten_rows", lambda make: {**_unwritten_rows(make), **top_k})
    yield Case("not_a_number", lambda make: {**_nan_key(make), **top_k})
    yield case("collisions", [17, 4], [40, 33], integers=True)
    yield case("collisions_fp8", [9], [40], integers=True, cache_format="fp8")
    yield case("collisions_one_head", [9], [60], integers=True, heads=1, head_dim=3)
    yield Case("zero_plateau", lambda make: {**_zero_plateau(make, sign=1), **top_k, **long_top_k}, exact=True, tags=TIES)
    yield Case("below_the_zero_plateau", lambda make: {**_zero_plateau(make, sign=-1), **top_k}, exact=True, tags=TIES)
    yield case("glm5_decode", [1, 2], [2100, 300], glm5_top_k, heads=32, head_dim=128, page_size=64)
    yield case("glm5_decode_int8", [1, 2], [2100, 300], glm5_top_k, heads=32, head_dim=128, page_size=64, cache_format="int8")
    yield case("glm5_decode_fp8", [1, 2], [2100, 300], glm5_top_k, heads=32, head_dim=128, page_size=64, cache_format="fp8")


def _random_scoring(make: Make) -> dict[str, Any]:
    form = make.one_of("plain", "plain", "fp8", "int8")
    head_dim = make.size(1, 140) if form == "plain" else 8 * make.size(1, 17)
    return paged(make, heads=make.size(1, 40), head_dim=head_dim, cache_format=form, **random_batch(make))


@suite(indexer_scores, rows=("index_query", "head_weights"))
def indexer_scores_cases() -> Iterator[Case | Sweep]:
    yield from _scoring_cases({}, {}, {})
    yield Sweep(_random_scoring)


# -- selection ---------------------------------------------------------------------------------------------------------


@suite(select_top_k, rows=("scores",))
def select_top_k_cases() -> Iterator[Case | Sweep]:
    infinity = float("inf")

    def causal(make: Make, scores: Tensor) -> Tensor:
        """Row t sees a few positions more than row t - 1."""
        rows, positions = scores.shape
        seen = (torch.arange(rows) + 1) * positions // rows
        return scores.masked_fill(torch.arange(positions) >= seen[:, None], -infinity)

    def special(make: Make) -> Tensor:
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, infinity, -infinity, float("nan")])
        return values[make.integers(40, 30, low=0, high=7, dtype=torch.int64)].to(make.dtype)

    def case(name: str, build: Any, top_k: int, tags: frozenset[str] = TIES) -> Case:
        return Case(name, lambda make: {"scores": build(make), "top_k": top_k}, tags=tags, exact=True)

    yield case("no_tokens", lambda make: make.normal(0, 9), 4)
    yield case("no_positions", lambda make: make.normal(3, 0), 4)
    yield case("one_position", lambda make: make.normal(3, 1), 4)
    yield case("top_1", lambda make: make.integers(9, 31, low=-1, high=2), 1)
    yield case("just_over_top_k", lambda make: causal(make, make.normal(5, 9)), 8)
    yield case("top_k_over_positions", lambda make: causal(make, make.normal(5, 9)), 64)
    yield case("nothing_visible", lambda make: torch.full((3, 20), -infinity, dtype=make.dtype), 5)
    yield case("all_equal", lambda make: causal(make, make.zeros(7, 50)), 8)
    yield case("zero_plateau", lambda make: causal(make, make.normal(9, 80).clamp(min=0.0)), 60)
    yield case("zeros_of_both_signs", lambda make: (make.integers(9, 40, low=0, high=2) - 0.5) * 0.0, 7)
    yield case("below_the_zero_plateau", lambda make: causal(make, make.normal(9, 80).clamp(max=0.0)), 60)
    yield case("bfloat16_collisions", lambda make: causal(make, make.normal(6, 3000, dtype=torch.bfloat16)).float(), 300)
    yield case("small_integers", lambda make: causal(make, make.integers(33, 70, low=-3, high=4)), 16)
    yield case("special_values", special, 9)
    yield case("every_second_column", lambda make: make.integers(5, 60, low=-3, high=4)[:, ::2], 7)
    yield case("glm5", lambda make: causal(make, make.normal(3, 9000).clamp(min=0.0)), 2048, WIDTH | TIES)

    def random(make: Make) -> dict[str, Any]:
        rows, positions = make.size(0, 20), make.one_of(make.size(0, 40), make.size(0, 5000))
        drawn = make.one_of(make.normal(rows, positions), make.integers(rows, positions, low=-9, high=10))
        return {"scores": causal(make, drawn), "top_k": make.one_of(make.size(1, 20), make.size(1, 3000))}

    yield Sweep(random, exact=True)


def compare_selection(outcome: Outcome) -> list[str]:
    """Exact cases, of an implementation that promises `tie_rule`: the gold's indices. Others: the structure of the contract, and
    every position that the gold does not select (or selects alone) must score within the budgeted error of the gold's lowest
    selected score."""
    (indices,) = outcome.outputs
    if problem := check_form(indices, outcome.reference[0]):
        return [problem]
    if outcome.case.exact and outcome.tie_rule:
        return check_equal(indices, outcome.gold[0])
    arguments = {name: value for name, value in outcome.arguments.items() if name != "top_k"}
    gold_arguments = {name: value for name, value in outcome.gold_arguments.items() if name != "top_k"}
    scores = indexer_scores.reference(**gold_arguments)
    if problems := _structure(indices, scores):
        return problems
    seen = scores.isfinite()
    error = torch.where(seen, indexer_scores.reference(**arguments).double() - scores, 0.0).abs()
    size = torch.where(seen, scores, 0.0).square().sum() / seen.sum().clamp(min=1)
    scale = size.sqrt().item() or 1.0
    near = 2 * scale * allowed_error(outcome.budget, error.max().item() / scale if error.numel() else 0.0, outcome.dtype)
    problems = []
    for row in (indices != outcome.gold[0]).any(1).nonzero().flatten().tolist():
        mine, theirs = ({i for i in found[row].tolist() if i >= 0} for found in (indices, outcome.gold[0]))
        limit = scores[row, sorted(theirs)].min()
        far = [i for i in sorted(mine ^ theirs) if not (scores[row, i] - limit).abs() <= near]
        if far:
            problems.append(
                f"token {row}: position {far[0]} scores {scores[row, far[0]]:.6g}, the lowest selected one {limit:.6g}: "
                f"further apart than {near:.2g} ({len(far)} such positions)"
            )
    return problems


def _structure(indices: Tensor, scores: Tensor) -> list[str]:
    """Ascending, without repeats, -1 at the end only, min(top_k, visible) of them, nothing invisible."""
    problems = []
    for row, found in enumerate(indices.tolist()):
        chosen = [i for i in found if i >= 0]
        visible = int((scores[row] != -torch.inf).sum())
        if found != sorted(set(chosen)) + [-1] * (len(found) - len(chosen)):
            problems.append(f"token {row}: not ascending, repeated, or -1 before the end: {found[:20]}")
        elif len(chosen) != min(len(found), visible):
            problems.append(f"token {row}: {len(chosen)} positions instead of {min(len(found), visible)}")
        elif any(i >= scores.shape[1] or scores[row, i] == -torch.inf for i in chosen):
            problems.append(f"token {row}: selects a position that it may not see: {chosen[:20]}")
    return problems


@suite(lightning_indexer, compare=compare_selection, rows=("index_query", "head_weights"))
def lightning_indexer_cases() -> Iterator[Case | Sweep]:
    yield from _scoring_cases({"top_k": 5}, {"top_k": 25}, {"top_k": 2048})
    yield Sweep(lambda make: {**_random_scoring(make), "top_k": make.one_of(make.size(1, 20), make.size(1, 300))})
