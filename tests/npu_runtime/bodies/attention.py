"""Attention over selected keys, its 8-bit cache form, and dense attention over a latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.npu_runtime.bodies import paging
from tests.npu_runtime.bodies.calling import body, chip, require, undefined

NO_LIMIT = 2**63 - 1
LATENT, ROPE, TILE = 512, 64, 128
NARROW = (torch.float16, torch.bfloat16)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """[queries, heads, width]: softmax over the visible keys, its weights rounded to `dtype` for the second product, as the
    matrix units want them; a row that sees none is not defined."""
    scores = torch.einsum("qhd,qkd->qhk" if keys.dim() == 3 else "qhd,kd->qhk", query, keys) * scale
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).to(dtype).float()
    return torch.einsum("qhk,qkd->qhd" if keys.dim() == 3 else "qhk,kd->qhd", weights, values)


def check_sparse(a: Any) -> None:
    """Rules that both sparse operators share."""
    heads = a.query.shape[-2]
    require(heads in POWERS or (chip() == "950" and 1 <= heads <= 128), "1, 2, 4, ... 128 heads")
    require(a.query.dtype in NARROW, "queries of 16 bits")
    require(a.attention_mode == 2, "attention_mode 2")
    require(a.sparse_mode in (0, 3) and a.pre_tokens == a.next_tokens == NO_LIMIT, "sparse_mode 0 or 3, no other limits")
    require(a.sparse_block_size == 1, "no body with blocks of keys")
    require(a.key.shape[-2] == 1, "one key head")
    indices = a.sparse_indices
    require(indices.dtype == torch.int32 and indices.shape[:-1] == (*a.query.shape[:-2], 1), "indices [..., 1, count] of int32")
    require(indices.shape[-1] > 0, "at least one index a row")
    require(all(t.is_contiguous() for t in (a.query, a.key, indices)), "contiguous tensors")
    valid = indices >= 0
    require(bool((valid[..., 1:] <= valid[..., :-1]).all()), "valid indices first, then -1")


def sparse(a: Any, query: Tensor, key: Tensor, split: Any) -> Tensor:
    """Every row of every sequence on its own keys. `split` makes a sequence's cached rows into (keys, values), float32."""
    heads = query.shape[-2]
    flat, indices = query.reshape(-1, heads, query.shape[-1]).float(), a.sparse_indices.reshape(-1, a.sparse_indices.shape[-1])
    found = list(paging.sequences(a.layout_query, a.layout_kv, query, key, a.actual_seq_lengths_query, a.actual_seq_lengths_kv))
    paging.check_pages(a.layout_kv, key, a.block_table, len(found))
    out = undefined((flat.shape[0], heads, LATENT), torch.float32)
    starts = paging.key_starts(found)
    for sequence in found:
        if not sequence.queries or not sequence.keys:
            continue
        mine = slice(sequence.start, sequence.start + sequence.queries)
        keys, values = split(sequence, starts)
        chosen = indices[mine].long()
        limit = (
            torch.arange(sequence.queries)[:, None] + sequence.keys - sequence.queries
            if a.sparse_mode == 3
            else sequence.keys - 1
        )
        seen = (chosen >= 0) & (chosen <= limit)
        require(bool((chosen < sequence.keys).all()) or a.sparse_mode == 3, "indices below the number of keys")
        inside = chosen.clamp(0, sequence.keys - 1)
        out[mine] = attend(flat[mine], keys[inside], values[inside], seen, a.scale_value, query.dtype)
    return out.view(*query.shape[:-1], LATENT)


@body("npu_sparse_flash_attention", kernels=("aclnnSparseFlashAttention",))
def sparse_flash_attention(a: Any) -> tuple[Tensor, None, None]:
    check_sparse(a)
    require(a.sinks is None, "no sinks")
    require(not a.return_softmax_lse, "no body with the softmax's sums")
    require(a.query.shape[-1] == a.key.shape[-1] == LATENT, "a latent of 512")
    require(a.query_rope is not None and a.query_rope.shape[-1] == a.key_rope.shape[-1] == ROPE, "a rope part of 64")
    tensors = (a.query, a.key, a.value, a.query_rope, a.key_rope)
    require(len({t.dtype for t in tensors if t is not None}) == 1, "one dtype")
    require(all(t.is_contiguous() for t in tensors if t is not None), "contiguous tensors")
    require(a.value is None or a.value.shape == a.key.shape, "values in the shape of keys")

    def split(sequence: paging.Sequence, starts: dict[int, int]) -> tuple[Tensor, Tensor]:
        latent, rope = (paging.rows(a.layout_kv, t, a.block_table, sequence, starts).float() for t in (a.key, a.key_rope))
        return torch.cat((latent, rope), dim=-1), latent

    out = sparse(a, torch.cat((a.query, a.query_rope), dim=-1), a.key, split)
    return out.to(a.query.dtype), None, None


@body("npu_kv_quant_sparse_flash_attention", kernels=("aclnnKvQuantSparseFlashAttention",))
def kv_quant_sparse_flash_attention(a: Any) -> Tensor:
    check_sparse(a)
    require(a.key_quant_mode == a.value_quant_mode == 2, "quantisation modes 2")
    require(a.quant_scale_repo_mode == 1 and a.tile_size == TILE and a.rope_head_dim == ROPE, "scales in the row, tiles of 128")
    require(a.query.shape[-1] == LATENT + ROPE, "queries of 512 + 64")
    require(a.key.dtype == a.value.dtype == torch.int8, "keys of int8")
    require(a.key.shape[-1] == LATENT + 2 * ROPE + 4 * (LATENT // TILE), "rows of 656 bytes")

    def split(sequence: paging.Sequence, starts: dict[int, int]) -> tuple[Tensor, Tensor]:
        stored = paging.rows(a.layout_kv, a.key, a.block_table, sequence, starts).contiguous()
        codes, rope, scales = stored.split([LATENT, 2 * ROPE, 16], dim=-1)
        scales = scales.contiguous().view(torch.float32).repeat_interleave(TILE, dim=-1)
        latent = (codes.float() * scales).to(a.query.dtype).float()
        return torch.cat((latent, rope.contiguous().view(a.query.dtype).float()), dim=-1), latent

    return sparse(a, a.query, a.key, split).to(a.query.dtype)


@body(
    "npu_fused_infer_attention_score",
    kernels=tuple(f"aclnnFusedInferAttentionScore{version}" for version in ("", "V2", "V3", "V4", "V5")),
    chips=("A2", "A3"),
)
def fused_infer_attention_score(a: Any) -> tuple[Tensor, Tensor | None]:
    require((a.query_rope is None) == (a.key_rope is None), "both rope parts, or none")
    if a.query_rope is None:
        return _heads_of_their_own(a)
    require(a.block_table is not None, "no body but for paged keys")
    require(not a.softmax_lse_flag, "no body with the softmax's sums")
    require(a.input_layout in ("TND", "BNSD", "BSND"), "no body for this layout")
    heads, tokens_first = a.num_heads, a.query
    require(heads in POWERS and a.num_key_value_heads in (0 if heads == 1 else 1, 1), "1, 2, 4, ... 128 heads, one key head")
    require(len({t.dtype for t in (a.query, a.key, a.value, a.query_rope, a.key_rope)}) == 1, "one dtype")
    require(a.query.dtype in NARROW, "tensors of 16 bits")
    require(a.query.shape[-1] == a.key.shape[-1] == LATENT, "a latent of 512")
    require(a.query_rope.shape[-1] == a.key_rope.shape[-1] == ROPE, "a rope part of 64")
    require(a.actual_seq_lengths_kv is not None, "lengths of the keys, which pages need")
    require(a.block_size % 16 == 0 and 16 <= a.block_size <= 1024, "pages of 16 to 1024 rows, whole 16s")
    require(a.block_table.dtype == torch.int32 and a.block_table.dim() == 2, "a block table of int32")
    key, rope = (_pages(t, a.block_size) for t in (a.key, a.key_rope))
    require(all(t.is_contiguous() for t in (a.query, a.query_rope)), "contiguous queries")
    if a.sparse_mode in (2, 3, 4):
        require(a.atten_mask is not None and a.atten_mask.shape[-2:] == (2048, 2048), "a mask [2048, 2048]")
        require(a.atten_mask.dtype in (torch.bool, torch.int8, torch.uint8), "a mask of bool, int8 or uint8")
        below = a.atten_mask.reshape(2048, 2048).bool()
        require(bool((below == torch.ones(2048, 2048, dtype=torch.bool).triu(1)).all()), "a mask that hides what comes later")
    require(a.sparse_mode == 3 or (a.sparse_mode == 0 and a.atten_mask is None), "no body for this mask")
    counts = [int(count) for count in a.actual_seq_lengths or ()]
    keys = [int(count) for count in a.actual_seq_lengths_kv]
    query = torch.cat((a.query, a.query_rope), dim=-1).float()
    if a.input_layout == "TND":
        require(
            bool(counts) and len(counts) <= 4096 and counts == sorted(counts), "cumulative lengths of the queries, 4096 at most"
        )
        starts = [0, *counts[:-1]]
        counts = [end - start for start, end in zip(starts, counts, strict=True)]
        require(starts[-1] + counts[-1] == a.query.shape[0], "lengths that end at the last row of the queries")
    else:
        query = query.transpose(1, 2) if a.input_layout == "BNSD" else query
        counts = counts or [query.shape[1]] * query.shape[0]
        starts = [number * query.shape[1] for number in range(query.shape[0])]
        query = query.flatten(0, 1)
    require(len(keys) == len(counts) == a.block_table.shape[0], "as many lengths of keys as sequences")
    out = undefined((query.shape[0], heads, LATENT), torch.float32)
    for number, (start, count, length) in enumerate(zip(starts, counts, keys, strict=True)):
        sequence = paging.Sequence(number, start, count, length)
        latent, angles = (paging.rows("PA_BSND", t, a.block_table, sequence, {}).float() for t in (key, rope))
        seen = paging.causal(sequence) if a.sparse_mode == 3 else torch.ones(count, length, dtype=torch.bool)
        if count and length:
            mine = slice(start, start + count)
            out[mine] = attend(query[mine], torch.cat((latent, angles), dim=-1), latent, seen, a.scale, a.query.dtype)
    if a.input_layout == "TND":
        return out.to(a.query.dtype), None
    out = out.view(tokens_first.shape[0], -1, heads, LATENT)
    return (out.transpose(1, 2) if a.input_layout == "BNSD" else out).to(a.query.dtype).contiguous(), None


def _heads_of_their_own(a: Any) -> tuple[Tensor, Tensor | None]:
    """Keys and values by head, in one piece for each sequence; the log of the softmax's sums where it is asked for."""
    require(a.input_layout in ("BNSD", "BSND"), "no body for this layout without a rope part")
    require(a.block_table is None and a.sparse_mode == 0 and a.atten_mask is None, "no body for pages or masks by head")
    require(a.actual_seq_lengths is None and a.actual_seq_lengths_kv is None, "no body for lengths by head")
    query, key, value = (t if a.input_layout == "BNSD" else t.transpose(1, 2) for t in (a.query, a.key, a.value))
    key_heads = a.num_key_value_heads or a.num_heads
    require(query.shape[1] == a.num_heads and key.shape[1] == value.shape[1] == key_heads, "heads as the arguments say")
    require(a.num_heads % key_heads == 0 and a.num_heads <= 256, "whole groups of heads, 256 at most")
    require(len({query.dtype, key.dtype, value.dtype}) == 1 and query.dtype in NARROW, "one dtype of 16 bits")
    require(query.shape[-1] <= 512 and query.shape[-1] % 16 == 0, "widths of a head in whole 16s, 512 at most")
    key, value = (t.float().repeat_interleave(a.num_heads // key_heads, dim=1) for t in (key, value))
    scores = query.float() @ key.transpose(2, 3) * a.scale
    out = (scores.softmax(-1).to(query.dtype).float() @ value).to(query.dtype)
    out = out if a.input_layout == "BNSD" else out.transpose(1, 2).contiguous()
    return out, scores.logsumexp(-1, keepdim=True) if a.softmax_lse_flag else None


def _pages(cache: Tensor, block_size: int) -> Tensor:
    """[blocks, rows, 1, width] of a cache that lies [blocks, rows, width] or [blocks, 1, rows, width]."""
    if cache.dim() == 3:
        require(cache.shape[1] == block_size, "pages of block_size rows")
        return cache.unsqueeze(2)
    require(cache.dim() == 4 and cache.shape[1] == 1 and cache.shape[2] == block_size, "pages [blocks, 1, block_size, width]")
    return cache.transpose(1, 2)
