"""Attention over selected keys: the absorbed form of MLA on the rows that the indexer chose.

Shape legend: T tokens; H heads; C latent; R rope; K indices a token; B sequences; N pages a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout, gather_rows, locate_tokens, slots_at
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.operators.softmax import visible_softmax
from glm5_port.registry import LONG_SUMS


@operator(
    facts={
        "heads": lambda query_latent, **_: query_latent.shape[1],
        "latent_dim": lambda query_latent, **_: query_latent.shape[2],
        "rope_dim": lambda query_rope, **_: query_rope.shape[2],
        "top_k": lambda indices, **_: indices.shape[1],
        "page_size": lambda latent_cache, **_: latent_cache[0].shape[1],
        "cache_format": lambda cache_format, **_: cache_format,
    },
    fake=lambda query_latent, *_, **__: query_latent.new_empty(query_latent.shape),
    budget=LONG_SUMS,
)
def sparse_mla_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    indices: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    cache_format: str,
) -> Tensor:
    """Attends to the given keys only, all heads of a token to the same ones.

    out[t, h] = sum_u softmax_u(scale * (query_latent[t, h] . latent[u] + query_rope[t, h] . rope_key[u])) latent[u], where u
    runs over the entries of indices[t] that lie in 0 .. position of t. Scores, softmax and sum in float32 (float64 for
    float64 inputs), rounded once.

    Args:
        query_latent: [T, H, C], queries absorbed into the latent space (`mla_prologue`).
        query_rope: [T, H, R], rotated.
        latent_cache: fields of the layout, each [pages, page_size, W].
        indices: [T, K] int32, logical positions in the token's own sequence; -1 is no key.
        block_table: [B, N] int32, page ids; entries beyond a sequence's pages may be anything.
        query_starts: [B + 1] int32; tokens at or beyond the last are padding.
        lengths: [B] int32, cached tokens a sequence, this call's included.
        scale: multiplies the scores; GLM-5: 256^-0.5.
        cache_format: name of a latent `CacheLayout`.

    Returns:
        [T, H, C] in the dtype of query_latent.

    Contract:
        The causal cut is always applied: an index beyond the token's position (Hugging Face's top-k gives such) or beyond the
        block table is ignored. A row with nothing visible, and padding, give zeros. The order of indices carries no meaning;
        an index given twice counts twice and is the caller's error. With every position in indices the result is that of
        `mla_attention_absorbed`. Cached rows that are not selected never reach the result, whatever they hold. Rows are
        independent. No tokens, or K = 0: zeros or an empty result. Deterministic.

    Raises:
        InputError: unknown cache_format, or shapes that do not fit.

    Source: DeepSeek-V3.2 sparse attention (FlashMLA `flash_mla_sparse_fwd` and its decoding form), GLM-5.
    """
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    check_indices(query_latent, indices)
    wide = accumulation_dtype(query_latent)
    page_size = latent_cache[0].shape[1]
    sequences, positions = locate_tokens(query_starts, lengths, query_latent.shape[0])
    visible = (indices >= 0) & (indices <= positions[:, None]) & (indices < block_table.shape[1] * page_size)
    slots = slots_at(block_table, sequences, indices, page_size)
    rows = gather_rows(cache_layout(LATENT, cache_format), latent_cache, slots, wide)
    latent, rope_key = (row.masked_fill(~visible[..., None], 0.0) for row in rows)  # [T, K, C], [T, K, R]
    scores = torch.einsum("thc,tkc->thk", query_latent.to(wide), latent)
    scores = scores + torch.einsum("thr,tkr->thk", query_rope.to(wide), rope_key)
    weights = visible_softmax(scores * scale, visible[:, None, :])
    return torch.einsum("thk,tkc->thc", weights, latent).to(query_latent.dtype)


def check_attention(
    query: Tensor, query_rope: Tensor, latent_cache: list[Tensor], block_table: Tensor, query_starts: Tensor, lengths: Tensor
) -> None:
    """Raises InputError unless the shapes that every attention operator takes fit each other."""
    fits = (
        query.dim() == query_rope.dim() == 3
        and query.shape[:2] == query_rope.shape[:2]
        and all(field.dim() == 3 for field in latent_cache)
        and block_table.dim() == 2
        and query_starts.shape[0] == lengths.shape[0] + 1 == block_table.shape[0] + 1
    )
    if not fits:
        raise InputError(
            f"attention: query {tuple(query.shape)}, query_rope {tuple(query_rope.shape)}, cache fields "
            f"{[tuple(field.shape) for field in latent_cache]}, block_table {tuple(block_table.shape)}, query_starts "
            f"{tuple(query_starts.shape)}, lengths {tuple(lengths.shape)} do not fit\n"
            "  supported: query [T, H, *], query_rope [T, H, R], fields [pages, page_size, W], block_table [B, N], "
            "query_starts [B + 1], lengths [B]"
        )


def check_indices(query: Tensor, indices: Tensor) -> None:
    """Raises InputError unless there is one list of indices for every token."""
    if indices.dim() != 2 or indices.shape[0] != query.shape[0]:
        raise InputError(
            f"sparse_mla_attention: indices {tuple(indices.shape)} for {query.shape[0]} tokens\n"
            "  supported: [T, K], one list of positions a token, shared by its heads"
        )
