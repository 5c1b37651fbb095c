"""Attention over the latent cache and the indexer, against plain torch and this project's portable implementations.

Shape legend: T tokens; S cached tokens of a sequence; H heads; C latent; R rope; J index heads; X their width; K selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.calls import NOPE, VALUE, normal
from benchmarks.cpu.contest import Contest
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.dispatch import Operator
from glm5_port.memory import zeros
from glm5_port.operators import (
    indexer_scores,
    lightning_indexer,
    mla_attention_absorbed,
    mla_attention_expanded,
    sparse_mla_attention,
)

HEADS, LATENT, ROPE, SELECTED, SCALE = 64, 512, 64, 2048, 256**-0.5
INDEX_HEADS, INDEX_WIDTH = 32, 128
PAGE = 64


def _bound(operator: Operator, backend: str, arguments: dict[str, Any]) -> Callable[..., Tensor]:
    """A backend's best implementation of a call's facts; `torch` is the portable one."""
    if backend == "torch":
        return operator.implementations["torch/eager"].function
    return operator.bind(backend=backend, **operator.facts_of(arguments))


def _pages(sequences: int, length: int) -> dict[str, Tensor]:
    """Sequences of one length, one page after the other."""
    pages = -(-length // PAGE)
    return {
        "block_table": torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages),
        "lengths": torch.full((sequences,), length, dtype=torch.int32),
    }


def _cache(generator: torch.Generator, pages: int, width: int) -> Tensor:
    """A field in memory such as a model's cache has."""
    field = zeros(pages, PAGE, width, dtype=torch.bfloat16)
    return field.copy_(torch.randn(field.shape, generator=generator))


def _latent_call(tokens: int, sequences: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length + tokens)
    pages = -(-length // PAGE)
    return {
        "query_latent": torch.randn(tokens, HEADS, LATENT, generator=generator).mul_(0.3).bfloat16(),
        "query_rope": torch.randn(tokens, HEADS, ROPE, generator=generator).mul_(0.3).bfloat16(),
        "latent_cache": [_cache(generator, sequences * pages, width) for width in (LATENT, ROPE)],
        "query_starts": torch.arange(sequences + 1, dtype=torch.int32) * (tokens // sequences),
        **_pages(sequences, length),
        "scale": SCALE,
        "cache_format": "plain",
    }


def _gather(a: dict[str, Any], sequence: int, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [H, C + R], keys [S, C + R] and values of one decoding sequence."""
    query = torch.cat((a["query_latent"][sequence], a["query_rope"][sequence]), dim=-1).to(wide)
    latent, rope = (field[a["block_table"][sequence].long()].flatten(0, 1) for field in a["latent_cache"])
    return query, torch.cat((latent, rope), dim=-1).to(wide), latent.to(wide)


def _torch_decode(a: dict[str, Any], wide: torch.dtype = torch.bfloat16) -> Tensor:
    """Two products and a softmax for each sequence, over the selected rows where there are any."""
    results = []
    for sequence in range(len(a["lengths"])):
        if "indices" in a:
            rows = a["indices"][sequence].long() + int(a["block_table"][sequence, 0]) * PAGE
            latent, rope = (field.flatten(0, 1)[rows] for field in a["latent_cache"])
            query = torch.cat((a["query_latent"][sequence], a["query_rope"][sequence]), dim=-1).to(wide)
            keys, values = torch.cat((latent, rope), dim=-1).to(wide), latent.to(wide)
        else:
            query, keys, values = _gather(a, sequence, wide)
        weights = ((query @ keys.t()).to(torch.promote_types(wide, torch.float32)) * a["scale"]).softmax(-1).to(wide)
        results.append(weights @ values)
    return torch.stack(results)


def sparse_decode() -> Iterator[Contest]:
    """2048 of 128K rows for one token of each sequence."""
    for batch in (1, 8):
        length = 131072
        a = _latent_call(batch, batch, length)
        draws = [
            torch.stack([torch.randperm(length)[:SELECTED].sort().values for _ in range(batch)]).to(torch.int32) for _ in range(8)
        ]
        a["indices"] = draws[0]
        yield Contest(
            operator="sparse_mla_attention",
            work=f"decode, {SELECTED} of {length}, batch {batch}",
            bytes=batch * (SELECTED * (LATENT + ROPE) + HEADS * (2 * LATENT + ROPE)) * 2,
            operations=2.0 * batch * HEADS * SELECTED * (2 * LATENT + ROPE),
            kind="bf16",
            contenders=_contenders(sparse_mla_attention, a, {"torch gather + mm": _torch_decode}, draws),
            gold=lambda a=a: _torch_decode(a, torch.float64),
            copies=len(draws),
        )


def sparse_prefill() -> Iterator[Contest]:
    """512 queries with 2048 of 8K rows each."""
    tokens, length = 512, 8192
    a = _latent_call(tokens, 1, length)
    a["indices"] = torch.stack([torch.randperm(length - tokens + t + 1)[:SELECTED].sort().values for t in range(tokens)]).to(
        torch.int32
    )
    yield Contest(
        operator="sparse_mla_attention",
        work=f"prefill {tokens}, {SELECTED} of {length}",
        bytes=(length * (LATENT + ROPE) + tokens * HEADS * (2 * LATENT + ROPE)) * 2,
        operations=2.0 * tokens * HEADS * SELECTED * (2 * LATENT + ROPE),
        kind="bf16",
        contenders=_contenders(sparse_mla_attention, a, {}),
        floor_note="every row is read once",
    )


def dense_decode() -> Iterator[Contest]:
    """Every row of the cache for one token."""
    for length in (4096, 32768):
        a = _latent_call(1, 1, length)
        yield Contest(
            operator="mla_attention_absorbed",
            work=f"decode, {length} rows",
            bytes=length * (LATENT + ROPE) * 2,
            operations=2.0 * HEADS * length * (2 * LATENT + ROPE),
            kind="bf16",
            contenders=_contenders(mla_attention_absorbed, a, {"torch mm, softmax, mm": _torch_decode}),
            gold=lambda a=a: _torch_decode(a, torch.float64),
        )


def dense_prefill() -> Iterator[Contest]:
    """A short prompt, whose heads are multiplied out of the latents."""
    tokens = 512
    a = _latent_call(tokens, 1, tokens)
    weights = {name: normal(HEADS, width, LATENT, std=LATENT**-0.5) for name, width in (("w_uk", NOPE), ("w_uv", VALUE))}
    del a["query_latent"]
    a |= {"query_nope": normal(tokens, HEADS, NOPE, std=0.3), **weights}
    expanded = LATENT * (NOPE + VALUE)
    yield Contest(
        operator="mla_attention_expanded",
        work=f"prefill {tokens}",
        bytes=2.0 * HEADS * (expanded + tokens * (NOPE + ROPE + VALUE)) + 2.0 * tokens * (LATENT + ROPE),
        operations=2.0 * HEADS * tokens * (expanded + (tokens + 1) / 2 * (NOPE + ROPE + VALUE)),
        kind="bf16",
        contenders=_contenders(mla_attention_expanded, a, {}),
        floor_note="half of all pairs of positions",
    )


def _contenders(
    operator: Operator, a: dict[str, Any], peers: dict[str, Callable[[dict[str, Any]], Tensor]], draws: list[Tensor] | None = None
) -> dict[str, Callable[[int], Tensor]]:
    ours, portable = _bound(operator, "cpu", a), _bound(operator, "torch", a)

    def at(copy: int) -> dict[str, Any]:
        return a if draws is None else {**a, "indices": draws[copy]}

    return {
        f"cpu/{widest_isa()}": lambda copy: ours(**at(copy)),
        **{name: lambda copy, peer=peer: peer(at(copy)) for name, peer in peers.items()},
        "torch/eager (portable)": lambda copy: portable(**at(copy)),
    }


# -- indexer -------------------------------------------------------------------------------------------------------------


def _torch_indexer(a: dict[str, Any]) -> Tensor:
    """Scores by a product in bfloat16, and torch.topk, which does not keep the tie rule."""
    keys = a["index_cache"][0].flatten(0, 1)
    tokens, last = a["index_query"].shape[0], int(a["lengths"][0])
    positions = torch.arange(last - tokens, last)
    chosen = []
    for part in torch.arange(tokens).split(64):  # in blocks of queries: all scores of a prefill would be gigabytes
        products = torch.einsum("tjx,sx->tjs", a["index_query"][part], keys).relu().float()
        scores = torch.einsum("tjs,tj->ts", products, a["head_weights"][part])
        scores.masked_fill_(torch.arange(keys.shape[0]) > positions[part, None], -torch.inf)
        chosen.append(scores.topk(min(a["top_k"], keys.shape[0])).indices)
    return torch.cat(chosen)


def indexer() -> Iterator[Contest]:
    """Scores and selection, and scores alone: one token over 128K keys, and 512 tokens over 8K."""
    for tokens, length in ((1, 131072), (512, 8192)):
        generator = torch.Generator().manual_seed(tokens)
        pages = _pages(1, length)
        a = {
            "index_query": torch.randn(tokens, INDEX_HEADS, INDEX_WIDTH, generator=generator).bfloat16(),
            "head_weights": torch.randn(tokens, INDEX_HEADS, generator=generator),
            "index_cache": [_cache(generator, length // PAGE, INDEX_WIDTH)],
            "query_starts": torch.tensor([0, tokens], dtype=torch.int32),
            **pages,
            "top_k": SELECTED,
            "cache_format": "plain",
        }
        yield Contest(
            operator="lightning_indexer",
            work=f"{tokens} token{'s' * (tokens > 1)}, {length} keys",
            bytes=length * INDEX_WIDTH * 2,
            operations=2.0 * tokens * length * INDEX_HEADS * INDEX_WIDTH,
            kind="bf16",
            contenders=_contenders(lightning_indexer, a, {"torch einsum + topk": _torch_indexer}),
        )
        scored = {name: value for name, value in a.items() if name != "top_k"}
        yield Contest(
            operator="indexer_scores",
            work=f"{tokens} token{'s' * (tokens > 1)}, {length} keys",
            bytes=length * INDEX_WIDTH * 2 + 4 * tokens * length,
            operations=2.0 * tokens * length * INDEX_HEADS * INDEX_WIDTH,
            kind="bf16",
            contenders=_contenders(indexer_scores, scored, {}),
        )
