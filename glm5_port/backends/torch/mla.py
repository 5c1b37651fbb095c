"""Portable MLA: projections by matmul, dense attention in blocks of queries and chunks of keys.

Shape legend: T tokens; H heads; N nope; C latent; R rope; V value; G blocks at once; S query tokens of a block;
U keys of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.torch.cache import write_cache_eager
from glm5_port.backends.torch.chunks import chunk_size, recomputed, spans, wants_gradient, workspace
from glm5_port.backends.torch.norm import rms_norm_eager
from glm5_port.backends.torch.rope import rotate_eager
from glm5_port.backends.torch.softmax import running_attention
from glm5_port.operators.cache import LATENT, cache_layout, gather_rows, locate_tokens, slots_at
from glm5_port.operators.mla import (
    attention_output,
    check_output,
    check_projection,
    mla_attention_absorbed,
    mla_attention_expanded,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
)
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.operators.sparse_attention import check_attention
from glm5_port.registry import PORTABLE

# -- projections -------------------------------------------------------------------------------------------------------


@mla_project.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def mla_project_eager(
    hidden: Tensor,
    q_a: Tensor,
    q_a_norm: Tensor,
    q_b: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    latent_norm_eps: float,
    rope_interleaved: bool,
    nope_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_projection(hidden, q_a, q_b, kv_a, kv_a_norm, cos, nope_dim)
    rope_dim, latent_dim = 2 * cos.shape[-1], kv_a_norm.shape[0]
    query_residual = rms_norm_eager(F.linear(hidden, q_a), q_a_norm, latent_norm_eps)
    query = F.linear(query_residual, q_b).unflatten(-1, (q_b.shape[0] // (nope_dim + rope_dim), nope_dim + rope_dim))
    query_rope = rotate_eager(query[..., nope_dim:], cos, sin, interleaved=rope_interleaved, start=0)
    latent, rope_key = F.linear(hidden, kv_a).split([latent_dim, rope_dim], dim=-1)
    latent = rms_norm_eager(latent, kv_a_norm, latent_norm_eps)
    rope_key = rotate_eager(rope_key[:, None], cos, sin, interleaved=rope_interleaved, start=0)[:, 0]
    return query[..., :nope_dim].contiguous(), query_rope, latent, rope_key, query_residual


@mla_prologue.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def mla_prologue_eager(
    hidden: Tensor,
    q_a: Tensor,
    q_a_norm: Tensor,
    q_b: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    w_uk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    latent_norm_eps: float,
    rope_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query_nope, *rest = mla_project_eager(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved, nope_dim=w_uk.shape[1],
    )  # fmt: skip
    query_rope, latent, rope_key, query_residual = rest
    return torch.einsum("thn,hnc->thc", query_nope, w_uk), query_rope, latent, rope_key, query_residual


@mla_prologue_into_cache.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def mla_prologue_into_cache_eager(
    hidden: Tensor,
    q_a: Tensor,
    q_a_norm: Tensor,
    q_b: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    w_uk: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: list[Tensor],
    slots: Tensor,
    *,
    latent_norm_eps: float,
    rope_interleaved: bool,
    cache_format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    query_latent, query_rope, latent, rope_key, query_residual = mla_prologue_eager(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved,
    )  # fmt: skip
    write_cache_eager([latent, rope_key], latent_cache, slots, cache_format=cache_format)
    return query_latent, query_rope, query_residual


@attention_output.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def attention_output_eager(latent_out: Tensor, w_uv: Tensor, o: Tensor) -> Tensor:
    check_output(latent_out, w_uv, o)
    return F.linear(torch.einsum("thc,hvc->thv", latent_out, w_uv).flatten(1), o)


# -- dense attention ---------------------------------------------------------------------------------------------------

COPIES = 6
"""So many temporaries of the size of the scores, of the queries and of the keys live at once."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The packed tokens cut into blocks of S, each within one sequence. How many blocks there can be follows from shapes
    alone (a sequence wastes less than one block), so that nothing about the batch is read on the host.

    Attributes:
        tokens: [blocks, S] which packed token; some token where there is none.
        positions: [blocks, S], -1 where there is none.
        sequences: [blocks].
        homes: [T] where packed token t lies among the blocks * S places.
        is_padding: [T].
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    homes: Tensor
    is_padding: Tensor


def cut_into_blocks(query_starts: Tensor, lengths: Tensor, tokens: int, size: int) -> Blocks:
    """Cuts T packed tokens into blocks of `size`."""
    batch = lengths.shape[0]
    starts, long_lengths = query_starts.to(torch.int64), lengths.to(torch.int64)
    counts = starts.diff()
    ends = torch.div(counts + size - 1, size, rounding_mode="floor").cumsum(0)  # blocks up to and with each sequence
    blocks = torch.arange((tokens + batch * (size - 1)) // size, device=query_starts.device)
    sequences = torch.searchsorted(ends, blocks, right=True)
    is_used = sequences < batch
    sequences = sequences.masked_fill(~is_used, 0)
    first_blocks = torch.cat((ends.new_zeros(1), ends[:-1]))
    offsets = (blocks - first_blocks[sequences])[:, None] * size + torch.arange(size, device=blocks.device)
    is_token = (offsets < counts[sequences][:, None]) & is_used[:, None]
    before = (long_lengths - counts)[sequences][:, None]
    own_sequences, own_positions = locate_tokens(query_starts, lengths, tokens)
    own_offsets = torch.arange(tokens, device=blocks.device) - starts[own_sequences]
    is_padding = own_positions < 0
    return Blocks(
        tokens=(starts[sequences][:, None] + offsets).masked_fill(~is_token, 0),
        positions=(before + offsets).masked_fill(~is_token, -1),
        sequences=sequences,
        homes=(first_blocks[own_sequences] * size + own_offsets).masked_fill(is_padding, 0),
        is_padding=is_padding,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes within the workspace: query tokens of a block, keys of a chunk, blocks at once."""

    block: int
    keys: int
    group: int


def plan_attention(tokens: int, batch: int, keys: int, *, per_query: int, per_score: int, per_key: int, gradient: bool) -> Plan:
    """Splits the workspace: half for what query tokens hold throughout, half for a chunk of keys.

    Args:
        tokens, batch, keys: T, B and the positions that the block table covers.
        per_query: bytes a query token holds throughout (its query and its running result).
        per_score: bytes for each pair of query token and key.
        per_key: bytes for each key (read, converted, expanded).
        gradient: a block's scores live together while the backward pass computes them again (and so do the keys of its
            sequence, as converted or expanded, which is beyond the workspace in a long sequence).
    """
    half = workspace(parts=2)
    block = chunk_size(per_query, -(-tokens // batch), budget=half)
    if gradient:
        block = chunk_size(per_score * keys, block, budget=half)
    chunk = chunk_size(per_score * block + per_key, keys, budget=half)
    group = chunk_size(block * per_query + chunk * (per_score * block + per_key), tokens)
    return Plan(block, chunk, group)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]
"""(query [G, S, H, *], query_rope [G, S, H, R], latent [G, U, C], rope_key [G, U, R]) -> scores [G, S, H, U], and the
function from weights to the sum of values [G, S, H, *]."""


def attend_in_blocks(
    query: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    attend: Attend,
    *,
    plan: Plan,
    scale: float,
    cache_format: str,
    gradient: bool,
) -> Tensor:
    """Dense causal attention: blocks of queries outside, chunks of keys inside."""
    layout, wide = cache_layout(LATENT, cache_format), accumulation_dtype(query)
    page_size = latent_cache[0].shape[1]
    keys = block_table.shape[1] * page_size
    blocks = cut_into_blocks(query_starts, lengths, query.shape[0], plan.block)

    def attend_group(tokens: Tensor, positions: Tensor, sequences: Tensor, query: Tensor, query_rope: Tensor) -> Tensor:
        query_GSHN, rope_GSHR = query[tokens].to(wide), query_rope[tokens].to(wide)

        def steps() -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
            for first, end in spans(keys, plan.keys):
                keys_U = torch.arange(first, end, device=tokens.device)
                slots = slots_at(block_table, sequences, keys_U, page_size)
                unwritten_GU = keys_U >= lengths[sequences][:, None]
                rows = gather_rows(layout, latent_cache, slots, wide)
                latent, rope_key = (row.masked_fill(unwritten_GU[..., None], 0.0) for row in rows)
                scores, combine = attend(query_GSHN, rope_GSHR, latent, rope_key)
                yield scores * scale, (keys_U <= positions[..., None])[:, :, None, :], combine

        return running_attention(steps()).to(query.dtype)

    results = [
        recomputed(
            attend_group,
            blocks.tokens[first:end],
            blocks.positions[first:end],
            blocks.sequences[first:end],
            query,
            query_rope,
            gradient=gradient,
        ).flatten(0, 1)
        for first, end in [*spans(blocks.sequences.shape[0], plan.group)] or [(0, 0)]  # no tokens: an empty result with gradients
    ]
    at_home = torch.cat(results)[blocks.homes]
    return at_home.masked_fill(blocks.is_padding[:, None, None], 0.0)


def _against_shared_keys(query_GSHN: Tensor, key_GUN: Tensor) -> Tensor:
    """[G, S, H, U]: every head against the same keys, as one matmul."""
    scores: Tensor = (query_GSHN.flatten(1, 2) @ key_GUN.mT).unflatten(1, query_GSHN.shape[1:3])
    return scores


@mla_attention_absorbed.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def mla_attention_absorbed_eager(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    cache_format: str,
) -> Tensor:
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    tokens, heads, latent_dim = query_latent.shape
    size = accumulation_dtype(query_latent).itemsize
    gradient = wants_gradient(query_latent, query_rope, *latent_cache)
    plan = plan_attention(
        tokens,
        lengths.shape[0],
        block_table.shape[1] * latent_cache[0].shape[1],
        per_query=COPIES * heads * latent_dim * size,
        per_score=COPIES * heads * size,
        per_key=COPIES * (latent_dim + query_rope.shape[2]) * size,
        gradient=gradient,
    )

    def attend(query: Tensor, rope: Tensor, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        scores = _against_shared_keys(query, latent) + _against_shared_keys(rope, rope_key)
        return scores, lambda weights: (weights.flatten(1, 2) @ latent).unflatten(1, weights.shape[1:3])

    return attend_in_blocks(
        query_latent, query_rope, latent_cache, block_table, query_starts, lengths, attend,
        plan=plan, scale=scale, cache_format=cache_format, gradient=gradient,
    )  # fmt: skip


@mla_attention_expanded.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def mla_attention_expanded_eager(
    query_nope: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    cache_format: str,
) -> Tensor:
    check_attention(query_nope, query_rope, latent_cache, block_table, query_starts, lengths)
    tokens, heads, nope_dim = query_nope.shape
    value_dim, latent_dim = w_uv.shape[1:]
    wide = accumulation_dtype(query_nope)
    gradient = wants_gradient(query_nope, query_rope, w_uk, w_uv, *latent_cache)
    plan = plan_attention(
        tokens,
        lengths.shape[0],
        block_table.shape[1] * latent_cache[0].shape[1],
        per_query=COPIES * heads * max(nope_dim, value_dim) * wide.itemsize,
        per_score=COPIES * heads * wide.itemsize,
        per_key=(COPIES * (latent_dim + query_rope.shape[2]) + heads * (nope_dim + value_dim)) * wide.itemsize,
        gradient=gradient,
    )

    def attend(query: Tensor, rope: Tensor, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        key_GHUN = latent[:, None] @ w_uk.to(wide).mT
        value_GHUV = latent[:, None] @ w_uv.to(wide).mT
        scores = (query.transpose(1, 2) @ key_GHUN.mT).transpose(1, 2) + _against_shared_keys(rope, rope_key)
        return scores, lambda weights: (weights.transpose(1, 2) @ value_GHUV).transpose(1, 2)

    return attend_in_blocks(
        query_nope, query_rope, latent_cache, block_table, query_starts, lengths, attend,
        plan=plan, scale=scale, cache_format=cache_format, gradient=gradient,
    )  # fmt: skip
