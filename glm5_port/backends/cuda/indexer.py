"""Triton indexer_scores, select_top_k and lightning_indexer.

The selection finds the lowest selected score by four passes over digits of its bits, then writes positions in their order. Only
integers are counted, so that set and order are exactly those of the tie rule, on every card and for every number of programs.

Shape legend: T tokens; J index heads; X index head size; S positions considered; k = top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import DTYPES, WORKSPACE_BYTES, dense, kernels, launch, power_of_two, triton
from glm5_port.errors import InputError
from glm5_port.operators.cache import INDEX, cache_layout
from glm5_port.operators.indexer import check_top_k, indexer_scores, lightning_indexer, select_top_k

FORMATS = ("plain", "fp8", "int8")
WIDEST_HEAD, MOST_HEADS = 256, 128
KEYS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
"""Positions of a tile of scores."""
RUN = 16
"""Tokens of a program where there are many; one where each is likely a sequence of its own."""
FEW_TOKENS = 32
BLOCK = 2048
"""Scores that a program of the selection looks at together."""
PASSES, BINS = 4, 256
"""Digits of a score's bits, and the values of a digit."""
MOST_TILES = 64
PROGRAMS = 1024
"""A row is shared among programs while rows are few. Every program adds the counts of all tiles of its row, so that tiles are few
where rows are many; the result is the same for any number of them."""
_EXACT = ("deterministic", "batch_invariant", "tie_rule")


def _not_supported(*, cache_format: str, heads: int, head_dim: int, **_: Any) -> list[str]:
    found = [] if cache_format in FORMATS else [f"reads index caches {', '.join(FORMATS)}, not {cache_format}"]
    if heads > MOST_HEADS or head_dim > WIDEST_HEAD:
        found.append(f"holds at most {MOST_HEADS} heads of {WIDEST_HEAD}, not {heads} of {head_dim}")
    return found


class _Call:
    """The arguments of a call, checked and dense."""

    def __init__(
        self,
        index_query: Tensor,
        head_weights: Tensor,
        index_cache: list[Tensor],
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
        cache_format: str,
    ) -> None:
        cache_layout(INDEX, cache_format)  # raises for an unknown one
        keys, *scales = index_cache
        batch = block_table.shape[0]
        fits = (
            keys.dim() == index_query.dim() == 3
            and keys.shape[2] == index_query.shape[2]
            and head_weights.shape == index_query.shape[:2]
            and (query_starts.shape[0], lengths.shape[0]) == (batch + 1, batch)
        )
        if not fits:
            shapes = [tuple(x.shape) for x in (index_query, head_weights, keys, block_table, query_starts, lengths)]
            raise InputError(
                f"indexer: query, head weights, keys, block table, query starts and lengths {shapes} do not fit\n"
                "  supported: [T, J, X], [T, J], [pages, page_size, X], [B, N], [B + 1], [B]"
            )
        self.query, self.head_weights, self.keys, self.table = map(dense, (index_query, head_weights, keys, block_table))
        self.scales = scales[0] if scales else self.keys
        self.starts, self.lengths = query_starts.contiguous(), lengths.contiguous()
        self.cache_format = cache_format
        self.tokens = index_query.shape[0]
        self.positions = block_table.shape[1] * keys.shape[1]

    def scores(self, first: int, count: int) -> Tensor:
        """[count, S] float32 of the tokens from `first` on."""
        scores_TS = torch.empty((count, self.positions), dtype=torch.float32, device=self.query.device)
        _, heads, head_dim = self.query.shape
        keys = KEYS[self.query.dtype]
        run = 1 if self.tokens <= FEW_TOKENS else RUN
        launch(
            kernels("indexer").scores_of_tokens,
            (-(-count // run), -(-self.positions // keys)),
            self.query, self.head_weights, self.keys, self.scales, self.table, self.starts, self.lengths, scores_TS,
            first, count, heads, self.table.shape[0], self.keys.shape[0], self.table.shape[1],
            *self.query.stride()[:2], self.head_weights.stride(0), self.table.stride(0),
            *self.keys.stride()[:2], *self.scales.stride()[:2],
            DIM=head_dim, PAGE=self.keys.shape[1], FORMAT=self.cache_format, TOKENS=run, KEYS=keys,
            HEADS=power_of_two(heads, least=16), CHANNELS=power_of_two(head_dim, least=16),
            num_warps=8 if self.query.dtype == torch.float32 else 4, num_stages=2,
        )  # fmt: skip
        return scores_TS


@triton(indexer_scores, not_supported=_not_supported)
def indexer_scores_triton(
    index_query: Tensor,
    head_weights: Tensor,
    index_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    cache_format: str,
) -> Tensor:
    """One program for a tile of positions and a run of tokens."""
    call = _Call(index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format)
    return call.scores(0, call.tokens)


def _select(scores: Tensor, indices_Tk: Tensor) -> None:
    rows, positions = scores.shape
    top_k = indices_Tk.shape[1]
    tiles = max(1, min(MOST_TILES, -(-positions // BLOCK), PROGRAMS // max(rows, 1)))
    tile_size = -(-positions // (tiles * BLOCK)) * BLOCK
    counts = torch.empty((rows, PASSES, tiles, BINS), dtype=torch.int32, device=scores.device)
    state = torch.empty((rows, PASSES, 2), dtype=torch.int32, device=scores.device)
    selected = torch.empty((rows, 2, tiles), dtype=torch.int32, device=scores.device)
    module = kernels("indexer")
    numbers = (positions, scores.stride(0), top_k, tiles, tile_size)
    for digit in range(PASSES):
        launch(module.count_digits, (rows, tiles), scores, counts, state, *numbers, PASS=digit, BLOCK=BLOCK, num_warps=4)
    launch(module.count_selected, (rows, tiles), scores, counts, state, selected, *numbers, BLOCK=BLOCK, num_warps=4)
    launch(
        module.write_selected, (rows, tiles), scores, state, selected, indices_Tk, *numbers,
        BLOCK=BLOCK, TILES=power_of_two(tiles), num_warps=4,
    )  # fmt: skip


@triton(select_top_k, promises=_EXACT)
def select_top_k_triton(scores: Tensor, *, top_k: int) -> Tensor:
    """Radix selection: counts by digits, then positions in their order."""
    check_top_k("select_top_k", top_k)
    indices_Tk = torch.empty((scores.shape[0], top_k), dtype=torch.int32, device=scores.device)
    _select(dense(scores), indices_Tk)
    return indices_Tk


@triton(lightning_indexer, dtypes=DTYPES, promises=_EXACT, not_supported=_not_supported)
def lightning_indexer_triton(
    index_query: Tensor,
    head_weights: Tensor,
    index_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    cache_format: str,
) -> Tensor:
    """Scores and selection of as many tokens at a time as their scores have room."""
    check_top_k("lightning_indexer", top_k)
    call = _Call(index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format)
    indices_Tk = torch.empty((call.tokens, top_k), dtype=torch.int32, device=index_query.device)
    together = max(1, WORKSPACE_BYTES // (4 * (call.positions + PASSES * BINS)))
    for first in range(0, call.tokens, together):
        count = min(together, call.tokens - first)
        _select(call.scores(first, count), indices_Tk[first : first + count])
    return indices_Tk
