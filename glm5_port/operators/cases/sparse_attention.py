"""Parity cases of `glm5_port.operators.sparse_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.cache import locate_tokens
from glm5_port.operators.cases.paging import Paging, filled_latent_cache, page_batch, random_batch, without_last_page
from glm5_port.operators.sparse_attention import sparse_mla_attention
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite

Choose = Callable[[Make, Paging], Tensor]


def chosen(top_k: int, *, beyond: bool = False, shuffled: bool = False) -> Choose:
    """[T, top_k] int32: random distinct positions of each token's past (or, with `beyond`, of its past and future), ascending
    with -1 behind, or in any order with -1 in between when `shuffled`."""

    def choose(make: Make, paging: Paging) -> Tensor:
        batch = paging.arguments()
        _, positions = locate_tokens(batch["query_starts"], batch["lengths"], paging.tokens)
        span = max(top_k, batch["block_table"].shape[1] * paging.page_size)
        ranks = make.uniform(paging.tokens, span, dtype=torch.float32)
        if not beyond:
            ranks = ranks.masked_fill(torch.arange(span) > positions[:, None], 2.0)
        picked = ranks.argsort(-1)[:, :top_k]
        picked = torch.where(ranks.gather(-1, picked) < 2.0, picked, span)
        if not shuffled:
            picked = picked.sort(-1).values
        return torch.where(picked < span, picked, -1).to(torch.int32)

    return choose


def everything(make: Make, paging: Paging) -> Tensor:
    """Every position of the block table for every token, as Hugging Face's top-k gives it when the context fits."""
    span = paging.block_table.shape[1] * paging.page_size
    return torch.arange(span, dtype=torch.int32).expand(paging.tokens, span).contiguous()


def out_of_reach(make: Make, paging: Paging) -> Tensor:
    """Position 0, then positions that no table holds."""
    return torch.tensor([[0, 2**31 - 1, 10**6, -7]], dtype=torch.int32).expand(paging.tokens, 4).contiguous()


def nothing(make: Make, paging: Paging) -> Tensor:
    """-1 everywhere."""
    return torch.full((paging.tokens, 5), -1, dtype=torch.int32)


@suite(sparse_mla_attention, rows=("query_latent", "query_rope", "indices"))
def sparse_mla_attention_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make,
        new: Sequence[int],
        lengths: Sequence[int],
        indices: Choose,
        *,
        heads: int = 3,
        widths: tuple[int, int] = (24, 8),
        cache_format: str = "plain",
        page_size: int = 4,
        padding: int = 0,
        extra_columns: int = 1,
        std: float = 1.0,
    ) -> dict[str, Any]:
        paging = page_batch(make, new, lengths, page_size=page_size, padding=padding, extra_columns=extra_columns)
        latent_dim, rope_dim = widths
        return {
            "query_latent": make.normal(paging.tokens, heads, latent_dim, std=std),
            "query_rope": make.normal(paging.tokens, heads, rope_dim, std=std),
            **filled_latent_cache(make, paging, cache_format, latent_dim, rope_dim),
            "indices": indices(make, paging),
            **paging.arguments(),
            "scale": (latent_dim + rope_dim) ** -0.5,
        }

    unequal = ([3, 1, 5, 0], [9, 1, 5, 4])
    yield Case("no_tokens", lambda make: arguments(make, [0], [3], chosen(2)))
    yield Case("context_of_one", lambda make: arguments(make, [1], [1], chosen(4)))
    yield Case("one_index", lambda make: arguments(make, [4], [9], chosen(1)))
    yield Case("decode", lambda make: arguments(make, [1, 1, 1], [9, 2, 30], chosen(6)))
    yield Case("chunked_prefill_and_padding", lambda make: arguments(make, *unequal, chosen(3), padding=2))
    yield Case("context_just_over_top_k", lambda make: arguments(make, [8], [8], chosen(7)))
    yield Case("context_just_under_top_k", lambda make: arguments(make, [8], [8], chosen(9)))
    yield Case("odd_page_size", lambda make: arguments(make, *unequal, chosen(4), page_size=5))
    yield Case("page_of_one", lambda make: arguments(make, *unequal, chosen(4), page_size=1))
    yield Case("any_order", lambda make: arguments(make, *unequal, chosen(6, shuffled=True), padding=1))
    yield Case("beyond_the_causal_cut", lambda make: arguments(make, *unequal, chosen(6, beyond=True), padding=1))
    yield Case("every_position", lambda make: arguments(make, *unequal, everything, padding=1))
    yield Case("out_of_reach", lambda make: arguments(make, *unequal, out_of_reach))
    yield Case(
        "table_ends_before_the_context", lambda make: without_last_page(arguments(make, *unequal, chosen(6), extra_columns=0))
    )
    yield Case("nothing_selected", lambda make: arguments(make, *unequal, nothing))
    yield Case("sharp_scores", lambda make: arguments(make, [6], [40], chosen(20), std=16.0))
    yield Case("fp8_rows", lambda make: arguments(make, *unequal, chosen(4), widths=(512, 64), cache_format="fp8", padding=1))
    yield Case("int8_rows", lambda make: arguments(make, *unequal, chosen(4), widths=(512, 64), cache_format="int8", padding=1))

    def glm5(form: str) -> Case:
        options: dict[str, Any] = {"heads": 64, "widths": (512, 64), "cache_format": form, "page_size": 64}
        return Case(f"glm5_{form}", lambda make: arguments(make, [2], [2100], chosen(2048), **options), tags=WIDTH)

    yield from map(glm5, ("plain", "fp8", "int8"))

    def random(make: Make) -> dict[str, Any]:
        form = make.one_of("plain", "plain", "fp8", "int8")
        widths = (make.size(1, 80), 2 * make.size(1, 20)) if form == "plain" else (512, 64)
        indices = chosen(make.size(1, 60), beyond=make.one_of(False, True), shuffled=make.one_of(False, True))
        return arguments(make, indices=indices, heads=make.size(1, 20), widths=widths, cache_format=form, **random_batch(make))

    yield Sweep(random)
