"""The contests of sparse attention: attending to 2048 of 128K rows, the indexer's scores, and the selection.

Every sequence of a decoding batch has pages of its own, up to `SEQUENCES`; beyond they share them, so that the caches fit a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.contest import Contest
from benchmarks.cuda.products import GLM5, TRITON, Bench, contenders, with_arguments
from glm5_port.operators import lightning_indexer, select_top_k, sparse_mla_attention
from glm5_port.operators.cache import cache_layout

SPLIT, FLASH_MLA, EAGER = "cuda/triton_split", "cuda/flash_mla", "torch/eager"
FORMATS = ("plain", "fp8")
SEQUENCES = 16
COPIES = 4
"""Sets of selected positions, or of scores, which calls take in turn."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of the work, as in `products.Sizes`; `rows` of scores are selected from."""

    heads: int
    index_heads: int
    top_k: int
    context: int
    page: int
    decoding: tuple[int, ...]
    prefill: int
    rows: tuple[int, ...]
    latent: int = 512
    rope: int = 64
    index: int = 128


FULL = Widths(64, 32, 2048, 131_072, 64, (1, 8, 32, 128), 512, (1, 64))
SMALL = Widths(2, 2, 4, 32, 16, (1, 2), 3, (1, 2))


def widths_of(bench: Bench) -> Widths:
    return FULL if bench.sizes is GLM5 else SMALL


def rows(bench: Bench, kind: str, cache_format: str, sequences: int) -> list[Tensor]:
    """A cache of so many full sequences."""
    w = widths_of(bench)
    widths = (w.latent, w.rope) if kind == "latent" else (w.index,)
    made = [bench.normal(w.context, width, std=0.5, seed=place) for place, width in enumerate(widths)]
    fields = cache_layout(kind, cache_format).encode(made) if cache_format != "plain" else made
    return [field.unflatten(0, (-1, w.page)).repeat(sequences, 1, 1) for field in fields]


def packed(bench: Bench, tokens: int, sequences: int) -> dict[str, Tensor]:
    """`sequences` sequences of the whole context, each with its share of the tokens at its end."""
    w = widths_of(bench)
    pages = w.context // w.page
    table = torch.arange(min(sequences, SEQUENCES) * pages, dtype=torch.int32).view(-1, pages)
    return {
        "block_table": table.repeat(-(-sequences // len(table)), 1)[:sequences].contiguous().to(bench.device),
        "query_starts": torch.arange(sequences + 1, dtype=torch.int32, device=bench.device) * (tokens // sequences),
        "lengths": torch.full((sequences,), w.context, dtype=torch.int32, device=bench.device),
    }


def positions(bench: Bench, tokens: int, sequences: int, seed: int) -> Tensor:
    """top_k ascending positions a token, none of them beyond the first token that shares its sequence."""
    w = widths_of(bench)
    reach = w.context - tokens // sequences + 1
    generator = torch.Generator(bench.device).manual_seed(seed)
    drawn = [torch.randperm(reach, generator=generator, device=bench.device)[: w.top_k] for _ in range(min(tokens, 64))]
    chosen = torch.stack(drawn).sort(-1).values.to(torch.int32)
    return chosen.repeat(-(-tokens // len(chosen)), 1)[:tokens].contiguous()


def sparse(bench: Bench) -> Iterator[Contest]:
    """sparse_mla_attention, decoding batches and a prefill."""
    w = widths_of(bench)
    for cache_format in FORMATS:
        caches = {count: rows(bench, "latent", cache_format, count) for count in {1, min(SEQUENCES, max(w.decoding))}}
        row = sum(field.shape[-1] * field.element_size() for field in caches[1])
        for tokens, sequences, phase in [*((n, n, "decode") for n in w.decoding), (w.prefill, 1, "prefill")]:
            facts = {
                "device_type": bench.device.type, "dtype": bench.dtype, "heads": w.heads, "latent_dim": w.latent,
                "rope_dim": w.rope, "top_k": w.top_k, "page_size": w.page, "cache_format": cache_format, "phase": phase,
            }  # fmt: skip
            names = (TRITON, FLASH_MLA, EAGER) if phase == "prefill" else (SPLIT, TRITON, FLASH_MLA, EAGER)
            found = contenders(sparse_mla_attention, names, facts=facts, copies=[[{}]] * COPIES, whole=True)
            given = {
                "query_latent": bench.normal(tokens, w.heads, w.latent, std=0.1),
                "query_rope": bench.normal(tokens, w.heads, w.rope, std=0.1),
                "latent_cache": caches[1 if sequences == 1 else max(caches)],
                **packed(bench, tokens, sequences),
                "scale": 256**-0.5,
                "cache_format": cache_format,
            }
            chosen = [positions(bench, tokens, sequences, seed) for seed in range(COPIES)]
            read = min(tokens * w.top_k, min(sequences, SEQUENCES) * w.context)
            yield Contest(
                "sparse_mla_attention",
                f"{phase} {tokens}, {w.top_k} of {w.context}, {cache_format}",
                read * row + 2.0 * tokens * w.heads * (2 * w.latent + w.rope),
                2.0 * tokens * w.heads * w.top_k * (2 * w.latent + w.rope),
                {
                    name: lambda copy, call=call, given=given, chosen=chosen: call(copy, indices=chosen[copy], **given)
                    for name, call in found.items()
                },
                COPIES,
            )


def indexer(bench: Bench) -> Iterator[Contest]:
    """lightning_indexer: scores of all positions, and the selection."""
    w = widths_of(bench)
    for cache_format in FORMATS:
        caches = {count: rows(bench, "index", cache_format, count) for count in {1, min(SEQUENCES, max(w.decoding))}}
        row = sum(field.shape[-1] * field.element_size() for field in caches[1])
        for tokens, sequences, phase in [*((n, n, "decode") for n in w.decoding), (w.prefill, 1, "prefill")]:
            facts = {
                "device_type": bench.device.type, "dtype": bench.dtype, "heads": w.index_heads, "head_dim": w.index,
                "top_k": w.top_k, "page_size": w.page, "cache_format": cache_format, "phase": phase,
            }  # fmt: skip
            found = contenders(lightning_indexer, (TRITON, EAGER), facts=facts, copies=[[{}]], whole=True)
            given: dict[str, Any] = {
                "index_query": bench.normal(tokens, w.index_heads, w.index),
                "head_weights": bench.normal(tokens, w.index_heads, std=0.02, dtype=torch.float32),
                "index_cache": caches[1 if sequences == 1 else max(caches)],
                **packed(bench, tokens, sequences),
                "top_k": w.top_k,
                "cache_format": cache_format,
            }
            yield Contest(
                "lightning_indexer",
                f"{phase} {tokens} at {w.context}, {cache_format}",
                min(sequences, SEQUENCES) * w.context * row + 4.0 * tokens * w.top_k,
                2.0 * tokens * w.context * w.index_heads * (w.index + 1),
                with_arguments(found, **given),
                1,
            )


def top_k(bench: Bench) -> Iterator[Contest]:
    """select_top_k beside torch.topk, which promises no order among equals."""
    w = widths_of(bench)
    for count in w.rows:
        scores = [bench.normal(count, w.context, dtype=torch.float32, seed=seed) for seed in range(COPIES)]
        facts = {"device_type": bench.device.type, "dtype": torch.float32, "top_k": w.top_k}
        found = contenders(select_top_k, (TRITON, EAGER), facts=facts, copies=[[{}]] * COPIES, whole=True)
        calls = {
            name: lambda copy, call=call, scores=scores: call(copy, scores=scores[copy], top_k=w.top_k)
            for name, call in found.items()
        }
        yield Contest(
            "select_top_k",
            f"{w.top_k} of {w.context}, {count} rows",
            4.0 * count * (w.context + w.top_k),
            0.0,
            {**calls, "torch.topk, no tie rule": lambda copy, scores=scores: torch.topk(scores[copy], w.top_k, dim=-1)},
            COPIES,
        )
