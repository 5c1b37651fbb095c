"""Portable sparse_mla_attention: gathers the selected rows, a chunk of tokens at a time.

Shape legend: G tokens of a chunk; H heads; C latent; R rope; K indices a token; U indices of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from glm5_port.backends.torch.chunks import chunk_size, recomputed, spans, wants_gradient
from glm5_port.backends.torch.softmax import running_attention
from glm5_port.operators.cache import LATENT, cache_layout, gather_rows, locate_tokens, slots_at
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.operators.sparse_attention import check_attention, check_indices, sparse_mla_attention
from glm5_port.registry import PORTABLE

COPIES = 3
"""Temporaries of the size of the gathered rows, and of the scores, that live at once."""


@sparse_mla_attention.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def sparse_mla_attention_eager(
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
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    check_indices(query_latent, indices)
    layout = cache_layout(LATENT, cache_format)
    tokens, heads, latent_dim = query_latent.shape
    top_k = indices.shape[1]
    if top_k == 0:
        return query_latent.new_zeros(query_latent.shape)
    wide = accumulation_dtype(query_latent)
    page_size = latent_cache[0].shape[1]
    sequences, positions = locate_tokens(query_starts, lengths, tokens)
    bytes_per_key = COPIES * (latent_dim + query_rope.shape[2] + heads) * wide.itemsize
    gradient = wants_gradient(query_latent, query_rope, *latent_cache)
    keys = top_k if gradient else chunk_size(bytes_per_key, top_k)
    group = chunk_size(bytes_per_key * keys, tokens)

    def attend(query: Tensor, rope: Tensor, chosen: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        def steps() -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
            for first, end in spans(top_k, keys):
                picked_GU = chosen[:, first:end]
                visible_GU = (picked_GU >= 0) & (picked_GU <= position[:, None]) & (picked_GU < block_table.shape[1] * page_size)
                rows = gather_rows(layout, latent_cache, slots_at(block_table, sequence, picked_GU, page_size), wide)
                latent_GUC, rope_key_GUR = (row.masked_fill(~visible_GU[..., None], 0.0) for row in rows)
                scores_GHU = query @ latent_GUC.mT + rope @ rope_key_GUR.mT
                yield scores_GHU * scale, visible_GU[:, None, :], partial(_weigh, latent_GUC)

        return running_attention(steps()).to(query_latent.dtype)

    chunks = [
        recomputed(
            attend,
            query_latent[first:end].to(wide),
            query_rope[first:end].to(wide),
            indices[first:end],
            sequences[first:end],
            positions[first:end],
            gradient=gradient,
        )
        for first, end in [*spans(tokens, group)] or [(0, 0)]  # no tokens: an empty result with gradients
    ]
    return torch.cat(chunks)


def _weigh(values_GUC: Tensor, weights_GHU: Tensor) -> Tensor:
    return weights_GHU @ values_GUC
