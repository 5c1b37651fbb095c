"""Rows of packed sequences and of paged caches, as the vendor's attention operators describe them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.npu_runtime.bodies.calling import require


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a call: its query rows in the flattened queries, and how many keys it has."""

    number: int
    start: int
    queries: int
    keys: int


def sequences(
    layout_query: str, layout_key: str, query: Tensor, key: Tensor, lengths_query: Tensor | None, lengths_key: Tensor | None
) -> Iterator[Sequence]:
    """Lengths of TND queries are cumulative, and must be given; of pages they count each sequence's own keys."""
    require(layout_query in ("BSND", "TND") and layout_key in ("BSND", "TND", "PA_BSND"), "layouts BSND, TND, PA_BSND")
    require(layout_key == "PA_BSND" or layout_key == layout_query, "one layout where keys are not paged")
    for lengths in (lengths_query, lengths_key):
        require(lengths is None or lengths.dtype == torch.int32, "lengths of int32")
    if layout_query == "TND":
        require(lengths_query is not None, "lengths of the queries, which TND needs")
        starts, counts = _from_cumulative(lengths_query, query.shape[0])
    else:
        counts = [query.shape[1]] * query.shape[0] if lengths_query is None else lengths_query.tolist()
        starts = [number * query.shape[1] for number in range(query.shape[0])]
    if layout_key == "BSND":
        keys = [key.shape[1]] * key.shape[0] if lengths_key is None else lengths_key.tolist()
    else:
        require(lengths_key is not None, f"lengths of the keys, which {layout_key} needs")
        keys = lengths_key.tolist() if layout_key == "PA_BSND" else _from_cumulative(lengths_key, key.shape[0])[1]
    require(len(keys) == len(counts), "as many lengths of keys as of queries")
    for number, (start, queries, own) in enumerate(zip(starts, counts, keys, strict=True)):
        yield Sequence(number, start, queries, own)


def _from_cumulative(lengths: Tensor, rows: int) -> tuple[list[int], list[int]]:
    ends = lengths.tolist()
    starts = [0, *ends[:-1]]
    require(all(a <= b for a, b in zip(starts, ends, strict=True)) and (not ends or ends[-1] <= rows), "cumulative lengths")
    return starts, [end - start for start, end in zip(starts, ends, strict=True)]


def check_pages(layout: str, cache: Tensor, block_table: Tensor | None, count: int) -> None:
    """Rules of paged keys."""
    if layout != "PA_BSND":
        return
    require(cache.dim() == 4 and cache.shape[2] == 1, "pages [blocks, rows, 1, width]")
    require(cache.shape[1] % 16 == 0 and 16 <= cache.shape[1] <= 1024, "pages of 16 to 1024 rows, whole 16s")
    require(block_table is not None and block_table.dim() == 2 and block_table.dtype == torch.int32, "a block table of int32")
    require(block_table.shape[0] == count, "a row of the block table for each sequence")


def rows(layout: str, cache: Tensor, block_table: Tensor | None, sequence: Sequence, starts: dict[int, int]) -> Tensor:
    """[keys, width] of one sequence. `starts`: where each sequence's keys begin, of TND."""
    if layout == "PA_BSND":
        size = cache.shape[1]
        pages = -(-sequence.keys // size)
        require(block_table.shape[1] >= pages, "a block table that covers every key")
        table = block_table[sequence.number, :pages].long()
        require(bool(((table >= 0) & (table < cache.shape[0])).all()), "pages that exist")
        return cache[table].reshape(pages * size, cache.shape[-1])[: sequence.keys]
    if layout == "TND":
        start = starts[sequence.number]
        return cache[start : start + sequence.keys, 0]
    return cache[sequence.number, : sequence.keys, 0]


def key_starts(found: list[Sequence]) -> dict[int, int]:
    """Where each sequence's keys begin when they are packed."""
    starts, total = {}, 0
    for sequence in found:
        starts[sequence.number] = total
        total += sequence.keys
    return starts


def causal(sequence: Sequence) -> Tensor:
    """[queries, keys]: which keys a query may see, aligned at the last of both."""
    queries = torch.arange(sequence.queries)[:, None]
    return torch.arange(sequence.keys)[None] <= queries + sequence.keys - sequence.queries
