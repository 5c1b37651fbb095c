"""The lightning indexer: which earlier tokens each token attends to.

Prologue -> scores -> selection. `lightning_indexer` is scores and selection in one, so that no [T, S] tensor has to exist.
Indices are logical positions, so that layers which share them (IndexShare) read their own caches with the same list.

Shape legend: T tokens of this call; D hidden size; Q query latent; J index heads; X index head size; B sequences; N pages of a
sequence at most; S = N * page_size positions considered; k = top_k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.cache import INDEX, cache_layout, gather_rows, locate_tokens, slots_at
from glm5_port.operators.linear import linear
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.operators.rope import rotate
from glm5_port.registry import LONG_SUMS


@operator(
    facts={
        "width": lambda hidden, **_: hidden.shape[1],
        "query_latent_dim": lambda wq_b, **_: wq_b.shape[1],
        "heads": lambda weights_proj, **_: weights_proj.shape[0],
        "head_dim": lambda wk, **_: wk.shape[0],
        "rope_dim": lambda cos, **_: 2 * cos.shape[-1],
        "rope_interleaved": lambda rope_interleaved, **_: rope_interleaved,
    },
    fake=lambda hidden, query_residual, wq_b, wk, k_norm_weight, k_norm_bias, weights_proj, cos, sin, **_: (
        hidden.new_empty((hidden.shape[0], weights_proj.shape[0], wk.shape[0])),
        hidden.new_empty((hidden.shape[0], wk.shape[0])),
        hidden.new_empty((hidden.shape[0], weights_proj.shape[0]), dtype=accumulation_dtype(hidden)),
    ),
    weights=("wq_b", "wk", "k_norm_weight", "k_norm_bias", "weights_proj"),
    budget=LONG_SUMS,
)
def indexer_prologue(
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
    """Projects the indexer's queries, key and head weights.

    index_query = rotate(query_residual wq_b^T); index_key = rotate(LayerNorm(hidden wk^T)); the rotation covers the *first*
    channels of a head. head_weights = (hidden weights_proj^T) * (J * X)^(-1/2): the scale X^(-1/2) of the dot products and
    J^(-1/2) of the heads in one factor, so that a score is sum_j head_weights_j * relu(query_j . key).

    Args:
        hidden: [T, D], the block's normalised input, any floating dtype.
        query_residual: [T, Q], the normalised query latent of the attention.
        wq_b: [J * X, Q].
        wk: [X, D]; one key for all heads.
        k_norm_weight: [X], of the LayerNorm (mean-centred).
        k_norm_bias: [X].
        weights_proj: [J, D].
        cos: [T, P], of `rotary_angles`; 2 * P <= X.
        sin: [T, P].
        k_norm_eps: added to the variance. GLM-5: 1e-6, whatever `rms_norm_eps` is.
        rope_interleaved: as `interleaved` of `rotate`. GLM-5: True; DeepSeek-V3.2's indexer: False.

    Returns:
        index_query [T, J, X] and index_key [T, X] in the dtype of hidden; head_weights [T, J] float32 (float64 for float64
        inputs), never rounded to a narrower type: that would flip near-ties.

    Contract:
        Tokens are independent. The LayerNorm is computed in float32 (float64) and rounded once before the rotation. Head weights
        may be negative. NaN or infinity in a row stays in that row. No tokens: empty results. Deterministic. No Hadamard
        transform: it is orthogonal and changes no score; a quantising cache layout stores what it is given.

    Raises:
        InputError: from `rotate`, when the rotated channels do not fit the head.

    Source: GLM-5 `GlmMoeDsaIndexer`; DeepSeek-V3.2 `Indexer`.
    """
    tokens, head_dim, heads = hidden.shape[0], wk.shape[0], weights_proj.shape[0]
    wide = accumulation_dtype(hidden)
    query_TJX = linear.reference(query_residual, wq_b).view(tokens, heads, head_dim)
    key_TX = linear.reference(hidden, wk).to(wide)
    key_TX = F.layer_norm(key_TX, (head_dim,), k_norm_weight.to(wide), k_norm_bias.to(wide), k_norm_eps).to(hidden.dtype)
    query_TJX = rotate.reference(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
    key_TX = rotate.reference(key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
    head_weights_TJ = F.linear(hidden.to(wide), weights_proj.to(wide)) * (heads * head_dim) ** -0.5
    return query_TJX, key_TX, head_weights_TJ


_SCORE_FACTS = {
    "heads": lambda index_query, **_: index_query.shape[1],
    "head_dim": lambda index_query, **_: index_query.shape[2],
    "page_size": lambda index_cache, **_: index_cache[0].shape[1],
    "cache_format": lambda cache_format, **_: cache_format,
}


@operator(
    facts=_SCORE_FACTS,
    fake=lambda index_query, head_weights, index_cache, block_table, query_starts, lengths, *, cache_format: (
        index_query.new_empty(
            (index_query.shape[0], block_table.shape[1] * index_cache[0].shape[1]), dtype=accumulation_dtype(index_query)
        )
    ),
    budget=LONG_SUMS,
)
def indexer_scores(
    index_query: Tensor,
    head_weights: Tensor,
    index_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    cache_format: str,
) -> Tensor:
    """Scores every earlier token of its own sequence for each token.

    score[t, u] = sum over heads j of head_weights[t, j] * relu(index_query[t, j] . key[u]) for u <= position of t, else -inf.
    Products, relu and sum in float32 (float64 for float64 inputs).

    Args:
        index_query: [T, J, X], any floating dtype. Tokens are packed: see `glm5_port.operators.cache`.
        head_weights: [T, J] float32 (or wider), scale included.
        index_cache: the fields of the layout, each [pages, page_size, W]; the keys of this call are already written.
        block_table: [B, N] int32, the page of each page-sized run of positions; entries beyond a sequence's pages may hold
            anything.
        query_starts: [B + 1] int32; tokens at or beyond query_starts[B] are padding.
        lengths: [B] int32, cached tokens of each sequence, this call's included.
        cache_format: name of a `CacheLayout` of the index cache: "plain", "fp8", "int8".

    Returns:
        [T, S] float32 (float64 for float64 inputs), S = N * page_size; column u is logical position u.

    Contract:
        The causal cut is always applied. Padding tokens get -inf everywhere. A key whose dot products are all <= 0 scores
        exactly zero (of either sign) and so ranks above keys with negative scores: zero is not the floor. What lies in
        invisible cache rows, NaN included, does not reach the result. NaN in a visible key or in the query gives NaN. No
        tokens: an empty result. Quantised keys are decoded exactly; the query stays as it is. Deterministic. Differentiable.

    Raises:
        InputError: unknown cache format.

    Source: DeepSeek-V3.2 lightning indexer, as in GLM-5 `GlmMoeDsaIndexer`.
    """
    layout, wide = cache_layout(INDEX, cache_format), accumulation_dtype(index_query)
    tokens, page_size = index_query.shape[0], index_cache[0].shape[1]
    sequences_T, positions_T = locate_tokens(query_starts, lengths, tokens)
    positions_S = torch.arange(block_table.shape[1] * page_size, device=block_table.device)
    scores_TS = torch.zeros((tokens, positions_S.shape[0]), dtype=wide, device=index_query.device)
    sequences_B = torch.arange(block_table.shape[0], device=block_table.device)
    slots_BS = slots_at(block_table, sequences_B, positions_S.expand(block_table.shape[0], -1), page_size)
    (keys_BSX,) = gather_rows(layout, index_cache, slots_BS, wide)
    for sequence, keys_SX in enumerate(keys_BSX):  # every sequence scores every token: no ragged shapes, and no host sync
        dots_TJS = torch.relu(index_query.to(wide) @ keys_SX.T)
        sums_TS = torch.einsum("tj,tjs->ts", head_weights.to(wide), dots_TJS)
        scores_TS = torch.where((sequences_T == sequence).unsqueeze(1), sums_TS, scores_TS)
    return torch.where(positions_S <= positions_T.unsqueeze(1), scores_TS, float("-inf"))


def check_top_k(name: str, top_k: int) -> None:
    """Raises InputError unless at least one position is asked for."""
    if top_k < 1:
        raise InputError(f"{name}: top_k={top_k}; supported: 1 or more (config: index_topk)")


@operator(
    facts={"top_k": lambda top_k, **_: top_k},
    fake=lambda scores, *, top_k: scores.new_empty((scores.shape[0], top_k), dtype=torch.int32),
)
def select_top_k(scores: Tensor, *, top_k: int) -> Tensor:
    """Selects the positions with the highest scores of each row.

    Tie rule: highest score, then lowest position; indices ascending by position, -1 padded at the end.

    Args:
        scores: [T, S], any floating dtype; -inf where a position may not be selected.
        top_k: how many to select at most.

    Returns:
        [T, top_k] int32.

    Contract:
        The same scores give the same indices in the same order on every device and rank. A row selects min(top_k, positions
        above -inf). -inf is never selected; -0.0 equals 0.0; NaN ranks above everything (as in torch.sort), NaN equal to NaN.
        top_k may exceed S. No tokens or no positions: empty, or all -1. Rows are independent. Deterministic. Not differentiable:
        indices carry no gradient.

    Raises:
        InputError: top_k below 1.

    Source: the rule is ours (spec/glm5.md 3.4): torch.topk keeps no order among ties, and two ranks that disagree on one
    attend to different keys.
    """
    check_top_k("select_top_k", top_k)
    positions = scores.shape[1]
    ranked = (scores.detach() + 0.0).sort(dim=-1, descending=True, stable=True)  # + 0.0 turns -0.0 into 0.0
    best, order = ranked.values[:, :top_k], ranked.indices[:, :top_k]
    ascending = order.masked_fill(best == float("-inf"), positions).sort(dim=-1).values
    selected = ascending.masked_fill(ascending == positions, -1)
    return F.pad(selected, (0, top_k - selected.shape[1]), value=-1).to(torch.int32)


@operator(
    facts={**_SCORE_FACTS, "top_k": lambda top_k, **_: top_k},
    fake=lambda index_query, head_weights, index_cache, block_table, query_starts, lengths, *, top_k, cache_format: (
        index_query.new_empty((index_query.shape[0], top_k), dtype=torch.int32)
    ),
    budget=LONG_SUMS,
)
def lightning_indexer(
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
    """Selects the best-scoring earlier tokens for each token, without keeping the scores.

    indices = select_top_k(indexer_scores(...), top_k=top_k).

    Args:
        index_query: [T, J, X], any floating dtype.
        head_weights: [T, J] float32 (or wider), scale included.
        index_cache: as in `indexer_scores`.
        block_table: [B, N] int32.
        query_starts: [B + 1] int32.
        lengths: [B] int32.
        top_k: how many positions to select at most.
        cache_format: name of a `CacheLayout` of the index cache.

    Returns:
        [T, top_k] int32, logical positions.

    Contract:
        The tie rule of `select_top_k` holds for the scores that the implementation computes. Two implementations agree wherever
        scores differ by more than their rounding, and exactly where scores are exact (all dot products <= 0 give exact zeros).
        A token selects min(top_k, position + 1) positions, none beyond its own; nothing forces its own to be among them.
        Padding tokens get -1. Otherwise as `indexer_scores`. Not differentiable: indices carry no gradient.

    Raises:
        InputError: top_k below 1, unknown cache format.

    Source: as `indexer_scores`; one operator as in `npu_lightning_indexer` and the fused CUDA kernels.
    """
    scores = indexer_scores.reference(
        index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format=cache_format
    )
    return select_top_k.reference(scores, top_k=top_k)
