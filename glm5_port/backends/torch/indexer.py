"""Portable indexer: prologue, scores, selection, and scores with selection.

Queries are cut into tiles of one sequence each, so that a tile's keys are gathered once; the number of tiles depends on shapes
only, never on what the device holds. `lightning_indexer` walks over blocks of keys and keeps the best so far, so that memory
does not grow with the context.

Shape legend: T tokens; J index heads; X index head size; B sequences; S positions considered; K indices kept; Q tiles; R tokens
of a tile; U positions of a block; C columns to select from; n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.torch.chunks import WORKSPACE_BYTES, chunk_size, recomputed, spans, wants_gradient
from glm5_port.backends.torch.rope import rotate_eager
from glm5_port.operators.cache import INDEX, cache_layout, gather_rows, locate_tokens, slots_at
from glm5_port.operators.indexer import check_top_k, indexer_prologue, indexer_scores, lightning_indexer, select_top_k
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.registry import PORTABLE

SHORTEST_BLOCK = 4096
"""Positions of a block of keys at least (fewer only where the context ends): each block costs one selection over K + U."""
SELECTION_BYTES = 40
"""Workspace that selecting takes for each candidate: its score and position, masks, running counts."""


@indexer_prologue.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def indexer_prologue_eager(
    hidden: Tensor,
    query_residual: Tensor,
    wq_b: Tensor,
    wk: Tensor,
    k_norm_weight: Tensor,
    k_norm_bias: Tensor,
    weights_proj: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    k_norm_eps: float,
    rope_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, head_dim, wide = weights_proj.shape[0], wk.shape[0], accumulation_dtype(hidden)
    query_TJX = F.linear(query_residual, wq_b).unflatten(1, (heads, head_dim))
    key_TX = F.linear(hidden, wk).to(wide)
    key_TX = F.layer_norm(key_TX, (head_dim,), k_norm_weight.to(wide), k_norm_bias.to(wide), k_norm_eps).to(hidden.dtype)
    query_TJX = rotate_eager(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
    key_TX = rotate_eager(key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
    head_weights_TJ = F.linear(hidden.to(wide), weights_proj.to(wide)) * (heads * head_dim) ** -0.5
    return query_TJX, key_TX, head_weights_TJ


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Tokens cut into tiles of one sequence each.

    Attributes:
        sequences_Q: the sequence of each tile.
        tokens_QR: which token lies in each row; any token in an unused row.
        positions_QR: its position, -1 in an unused row.
        places_T: the flat tile row of each token; 0 for padding.
        padding_T: whether a token is padding.
    """

    sequences_Q: Tensor
    tokens_QR: Tensor
    positions_QR: Tensor
    places_T: Tensor
    padding_T: Tensor


def tile_queries(query_starts: Tensor, lengths: Tensor, tokens: int, rows: int) -> QueryTiles:
    """Cuts each sequence's tokens into tiles of `rows`, on the device: as many tiles as any query_starts may need."""
    sequences_T, positions_T = locate_tokens(query_starts, lengths, tokens)
    starts, batch = query_starts.to(torch.int64), lengths.shape[0]
    tiles_B = (starts.diff() + rows - 1) // rows
    ends_B = tiles_B.cumsum(0)
    tiles_Q = torch.arange((tokens + batch * (rows - 1)) // rows, device=query_starts.device)
    sequences_Q = torch.searchsorted(ends_B, tiles_Q, right=True).clamp(max=batch - 1)
    first_token_Q = starts[sequences_Q] + (tiles_Q - (ends_B - tiles_B)[sequences_Q]) * rows
    tokens_QR = first_token_Q.unsqueeze(1) + torch.arange(rows, device=query_starts.device)
    unused_QR = tokens_QR >= starts[sequences_Q + 1].unsqueeze(1)
    tokens_QR = tokens_QR.clamp(max=tokens - 1)
    positions_QR = positions_T[tokens_QR].masked_fill(unused_QR, -1)
    rows_T = torch.arange(tokens, device=query_starts.device) - starts[sequences_T]
    padding_T = positions_T < 0
    places_T = ((ends_B - tiles_B)[sequences_T] * rows + rows_T).masked_fill(padding_T, 0)
    return QueryTiles(sequences_Q, tokens_QR, positions_QR, places_T, padding_T)


@dataclass(frozen=True, slots=True)
class Scoring:
    """One call's scores, tile by tile and block by block, each step within WORKSPACE_BYTES.

    Attributes:
        tiles: the queries.
        chunk: tiles computed together.
        block: positions computed together.
    """

    index_query: Tensor
    head_weights: Tensor
    index_cache: list[Tensor]
    block_table: Tensor
    cache_format: str
    tiles: QueryTiles
    chunk: int
    block: int

    def chunks(self) -> Iterator[slice]:
        """Runs of tiles that are computed together; one empty run where there are none, so that gradients pass."""
        for first, end in spans(max(1, self.tiles.sequences_Q.shape[0]), self.chunk):
            yield slice(first, end)

    def blocks(self, chunk: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The (scores [Q, R, U], positions [U]) of each block of keys, for one run of tiles."""
        gradient = wants_gradient(self.index_query, self.head_weights, *self.index_cache)
        for first, end in spans(self.block_table.shape[1] * self.index_cache[0].shape[1], self.block):
            positions_U = torch.arange(first, end, device=self.block_table.device)
            yield recomputed(self._score, chunk, positions_U, gradient=gradient), positions_U

    def _score(self, chunk: slice, positions_U: Tensor) -> Tensor:
        tokens_QR, sequences_Q = self.tiles.tokens_QR[chunk], self.tiles.sequences_Q[chunk]
        wide = accumulation_dtype(self.index_query)
        positions_QU = positions_U.expand(sequences_Q.shape[0], -1)
        slots_QU = slots_at(self.block_table, sequences_Q, positions_QU, self.index_cache[0].shape[1])
        (keys_QUX,) = gather_rows(cache_layout(INDEX, self.cache_format), self.index_cache, slots_QU, wide)
        query_QRJX = self.index_query[tokens_QR].to(wide)
        dots_QRJU = (query_QRJX.flatten(1, 2) @ keys_QUX.transpose(1, 2)).relu_().unflatten(1, query_QRJX.shape[1:3])
        scores_QRU = (self.head_weights[tokens_QR].to(wide).unsqueeze(2) @ dots_QRJU).squeeze(2)
        return torch.where(positions_U <= self.tiles.positions_QR[chunk].unsqueeze(2), scores_QRU, float("-inf"))


def plan_scoring(
    index_query: Tensor,
    head_weights: Tensor,
    index_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    cache_format: str,
    kept: int,
) -> Scoring:
    """Chooses tile, chunk and block from shapes alone. Blocks are as long as the workspace allows for all tokens, and at least
    SHORTEST_BLOCK; then as many tiles as fit go together.

    Args:
        kept: candidates that a selection carries from block to block; 0 when there is none.
    """
    tokens, heads, head_dim = index_query.shape
    batch, end = block_table.shape[0], block_table.shape[1] * index_cache[0].shape[1]
    element = accumulation_dtype(index_query).itemsize
    bytes_of_score = heads * element + SELECTION_BYTES
    bytes_of_key = 3 * head_dim * element  # as stored, decoded, and one step between

    rows = chunk_size(bytes_of_score * (SHORTEST_BLOCK + kept), -(-tokens // max(batch, 1)))
    tiles = tile_queries(query_starts, lengths, tokens, rows)
    count = max(1, tiles.sequences_Q.shape[0])
    free = WORKSPACE_BYTES // count - rows * bytes_of_score * kept
    block = max(min(SHORTEST_BLOCK, end), chunk_size(rows * bytes_of_score + bytes_of_key, end, budget=free))
    chunk = chunk_size(rows * bytes_of_score * (block + kept) + block * bytes_of_key, count)
    return Scoring(index_query, head_weights, index_cache, block_table, cache_format, tiles, chunk, block)


@indexer_scores.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def indexer_scores_eager(
    index_query: Tensor,
    head_weights: Tensor,
    index_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    cache_format: str,
) -> Tensor:
    """Memory: the result twice, and WORKSPACE_BYTES."""
    scoring = plan_scoring(index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format, kept=0)
    rows = []
    for chunk in scoring.chunks():
        rows.append(torch.cat([scores_QRU.flatten(0, 1) for scores_QRU, _ in scoring.blocks(chunk)], dim=1))
    tiles = scoring.tiles
    return torch.cat(rows)[tiles.places_T].masked_fill(tiles.padding_T.unsqueeze(1), float("-inf"))


# -- selection ---------------------------------------------------------------------------------------------------------


def best_columns(scores_nC: Tensor, top_k: int) -> Tensor:
    """The columns that the tie rule selects, ascending, -1 padded at the end: [n, min(top_k, C)].

    Everything above the k-th best value is in; what equals it fills the room that is left from the lowest column on. Only
    values decide, so it does not matter in which order torch.topk returns ties, or zeros of both signs."""
    columns = scores_nC.shape[1]
    kept = min(top_k, columns)
    if kept == 0:
        return scores_nC.new_empty((scores_nC.shape[0], 0), dtype=torch.int64)
    limit_n1 = scores_nC.topk(kept, dim=1).values[:, -1:]  # NaN ranks first, as in torch.sort
    nan_nC, nan_n1 = scores_nC.isnan(), limit_n1.isnan()
    above_nC = (scores_nC > limit_n1) | (nan_nC & ~nan_n1)
    equal_nC = ((scores_nC == limit_n1) & (limit_n1 > float("-inf"))) | (nan_nC & nan_n1)
    room_n1 = kept - above_nC.sum(1, keepdim=True)
    chosen_nC = above_nC | (equal_nC & (equal_nC.cumsum(1, dtype=torch.int32) <= room_n1))
    counts_nC = chosen_nC.cumsum(1, dtype=torch.int32)  # reaches j + 1 first at the j-th chosen column
    wanted_nk = torch.arange(1, kept + 1, dtype=torch.int32, device=scores_nC.device).expand(scores_nC.shape[0], -1)
    found_nk = torch.searchsorted(counts_nC, wanted_nk.contiguous())
    return found_nk.masked_fill(found_nk == columns, -1)


def _pad(indices_nk: Tensor, top_k: int) -> Tensor:
    return F.pad(indices_nk, (0, top_k - indices_nk.shape[1]), value=-1).to(torch.int32)


@select_top_k.implement(
    PORTABLE,
    variant="eager",
    differentiable=True,  # nothing to pass on: indices carry no gradient
    promises=("deterministic", "tie_rule", "batch_invariant", "thread_invariant"),
)
def select_top_k_eager(scores: Tensor, *, top_k: int) -> Tensor:
    """Memory: WORKSPACE_BYTES, one row at least."""
    check_top_k("select_top_k", top_k)
    chunk = chunk_size(SELECTION_BYTES * scores.shape[1], max(1, scores.shape[0]))
    return torch.cat([_pad(best_columns(rows, top_k), top_k) for rows in scores.detach().split(chunk)])


@lightning_indexer.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic", "tie_rule"))
def lightning_indexer_eager(
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
    """Memory: the result twice, and WORKSPACE_BYTES (one tile of one token with one SHORTEST_BLOCK at least), at any context.

    A matrix product may round a score differently in a block of another shape, so scores that are equal only by luck may fall
    apart; exact zeros and every exactly representable score do not."""
    check_top_k("lightning_indexer", top_k)
    with torch.no_grad():
        scoring = plan_scoring(
            index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format, kept=top_k
        )
        rows = [_pad(_select_over_blocks(scoring, chunk, top_k), top_k) for chunk in scoring.chunks()]
        tiles = scoring.tiles
        return torch.cat(rows)[tiles.places_T].masked_fill(tiles.padding_T.unsqueeze(1), -1)


def _select_over_blocks(scoring: Scoring, chunk: slice, top_k: int) -> Tensor:
    """The positions selected from all blocks of keys, [n, up to top_k]. What is kept lies before the next block and ascends, so
    that the tie rule over columns is the tie rule over positions."""
    rows = scoring.tiles.positions_QR[chunk].numel()
    best_positions = scoring.tiles.positions_QR.new_empty((rows, 0))
    best_scores = scoring.index_query.new_empty((rows, 0), dtype=accumulation_dtype(scoring.index_query))
    for scores_QRU, positions_U in scoring.blocks(chunk):
        scores_nC = torch.cat((best_scores, scores_QRU.flatten(0, 1)), dim=1)
        positions_nC = torch.cat((best_positions, positions_U.expand(rows, -1)), dim=1)
        columns_nk = best_columns(scores_nC, top_k)
        nothing_nk, columns_nk = columns_nk < 0, columns_nk.clamp(min=0)
        best_scores = scores_nC.gather(1, columns_nk).masked_fill(nothing_nk, float("-inf"))
        best_positions = positions_nC.gather(1, columns_nk).masked_fill(nothing_nk, -1)
    return best_positions
