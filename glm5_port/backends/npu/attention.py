"""Attention over the paged latent cache: npu_sparse_flash_attention, its form for the 8-bit cache, and
npu_fused_infer_attention_score for every earlier position.

Shape legend: T tokens; H heads; C latent; R rope; K indices a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.attention import (
    FUSED_INFER_ATTENTION,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    SPARSE_FLASH_ATTENTION,
)
from glm5_port.backends.npu.contracts.kinds import HALF, HEAD_COUNTS, NO_LIMIT
from glm5_port.backends.npu.machine import machine
from glm5_port.backends.npu.paging import PAGES, Packed, pack
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.backends.torch.mla import mla_attention_absorbed_eager
from glm5_port.operators.cache import locate_tokens
from glm5_port.operators.mla import mla_attention_absorbed
from glm5_port.operators.sparse_attention import check_attention, check_indices, sparse_mla_attention

LATENT_512 = Rule("latent width", "wants a latent of 512, not {latent_dim}", lambda *, latent_dim, **_: latent_dim == 512)
ROPE_64 = Rule("rope width", "wants a rope part of 64, not {rope_dim}", lambda *, rope_dim, **_: rope_dim == 64)
POWER_OF_TWO_HEADS = Rule("heads", "wants 1, 2, 4, ... 128 heads, not {heads}", lambda *, heads, **_: heads in HEAD_COUNTS)
HEADS_OF_CHIP = Rule(
    "heads",
    "wants 1, 2, 4, ... 128 heads (1 to 128 on Ascend950), not {heads}",
    lambda *, heads, **_: heads in HEAD_COUNTS or (machine().chip.startswith("950") and 1 <= heads <= 128),
)
PLAIN = Rule("cache format", "reads the plain cache, not {cache_format}", lambda *, cache_format, **_: cache_format == "plain")
INT8 = Rule("cache format", "reads the int8 cache, not {cache_format}", lambda *, cache_format, **_: cache_format == "int8")
SELECTED = Rule("top_k", "wants at least one index a token, not {top_k}", lambda *, top_k, **_: top_k > 0)
_LAST = 2**31 - 1


def selected_first(indices: Tensor, positions: Tensor, covered: int) -> tuple[Tensor, Tensor]:
    """The indices that a token may read in front and -1 behind them, as the vendor wants them, and which tokens have any.

    Indices may arrive in any order. The causal cut is made here, and so is the one at the end of the block table: no page is
    behind what lies beyond."""
    readable = (indices >= 0) & (indices <= positions[:, None]) & (indices < covered)
    ordered = torch.where(readable, indices, _LAST).sort(dim=-1).values
    return ordered.masked_fill(ordered == _LAST, -1).to(torch.int32).unsqueeze(1), readable.any(-1)


def _sparse_options(packed: Packed) -> dict[str, Tensor | int | str]:
    """Everything that has a default, since some defaults are no supported value."""
    return {
        "block_table": packed.block_table,
        "actual_seq_lengths_query": packed.query_ends,
        "actual_seq_lengths_kv": packed.key_lengths,
        "sparse_block_size": 1,
        "layout_query": "TND",
        "layout_kv": "PA_BSND",
        "sparse_mode": 0,  # the indices are cut already
        "pre_tokens": NO_LIMIT,
        "next_tokens": NO_LIMIT,
        "attention_mode": 2,
    }


def one_key_head(field: Tensor) -> Tensor:
    """[pages, page_size, W] as [pages, page_size, 1, W]. The vendor reads dense caches only."""
    return field.contiguous().unsqueeze(2)


@aclnn(
    sparse_mla_attention,
    Needs((SPARSE_FLASH_ATTENTION,), (dtype_among(*HALF), LATENT_512, ROPE_64, HEADS_OF_CHIP, PAGES, PLAIN, SELECTED)),
)
def sparse_mla_attention_aclnn(
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
    if query_latent.numel() == 0:
        return torch.empty_like(query_latent)
    _, positions_T = locate_tokens(query_starts, lengths, query_latent.shape[0])
    sparse_indices_T1K, has_keys_T = selected_first(indices, positions_T, block_table.shape[1] * latent_cache[0].shape[1])
    latent, rope_key = (one_key_head(field) for field in latent_cache)
    packed = pack(block_table, query_starts, lengths, query_latent.shape[0], latent_cache[0])
    out_THC, _, _ = call(
        SPARSE_FLASH_ATTENTION,
        query_latent.contiguous(),
        latent,
        latent,
        sparse_indices_T1K,
        scale,
        query_rope=query_rope.contiguous(),
        key_rope=rope_key,
        return_softmax_lse=False,
        **_sparse_options(packed),
    )
    return torch.where(has_keys_T[:, None, None], out_THC, 0.0)


@aclnn(
    sparse_mla_attention,
    Needs(
        (KV_QUANT_SPARSE_FLASH_ATTENTION,),
        (dtype_among(torch.bfloat16), LATENT_512, ROPE_64, POWER_OF_TWO_HEADS, PAGES, INT8, SELECTED),
    ),
    variant="aclnn_int8",
)
def sparse_mla_attention_aclnn_int8(
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
    """The 656-byte rows hold their rope part in bfloat16, so queries are bfloat16 too."""
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    check_indices(query_latent, indices)
    if query_latent.numel() == 0:
        return torch.empty_like(query_latent)
    _, positions_T = locate_tokens(query_starts, lengths, query_latent.shape[0])
    sparse_indices_T1K, has_keys_T = selected_first(indices, positions_T, block_table.shape[1] * latent_cache[0].shape[1])
    rows = one_key_head(latent_cache[0])
    packed = pack(block_table, query_starts, lengths, query_latent.shape[0], latent_cache[0])
    out_THC = call(
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        torch.cat((query_latent, query_rope), dim=-1),
        rows,
        rows,
        sparse_indices_T1K,
        scale,
        2,
        2,
        quant_scale_repo_mode=1,
        tile_size=128,
        rope_head_dim=64,
        **_sparse_options(packed),
    )
    return torch.where(has_keys_T[:, None, None], out_THC[..., : query_latent.shape[-1]], 0.0)


@aclnn(
    mla_attention_absorbed,
    Needs((FUSED_INFER_ATTENTION,), (dtype_among(*HALF), LATENT_512, ROPE_64, POWER_OF_TWO_HEADS, PAGES, PLAIN)),
)
def mla_attention_absorbed_aclnn(
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
    """Waits for the device once a call: the vendor takes lengths as Python lists. Used where attention is dense (no indexer).

    The vendor reads whole sequences, so a block table that ends before one, which no model here makes, is computed portably."""
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    if query_latent.numel() == 0:
        return torch.empty_like(query_latent)
    tokens, heads = query_latent.shape[:2]
    latent, rope_key = (field.contiguous().unsqueeze(1) for field in latent_cache)  # [pages, 1, page_size, W]
    packed = pack(block_table, query_starts, lengths, tokens, latent_cache[0])
    query_ends, key_lengths = torch.stack((packed.query_ends, packed.key_lengths)).tolist()
    if max(key_lengths) > block_table.shape[1] * latent_cache[0].shape[1]:
        return mla_attention_absorbed_eager(
            query_latent, query_rope, latent_cache, block_table, query_starts, lengths, scale=scale, cache_format=cache_format
        )
    out_THC, _ = call(
        FUSED_INFER_ATTENTION,
        query_latent.contiguous(),
        latent,
        latent,
        query_rope=query_rope.contiguous(),
        key_rope=rope_key,
        atten_mask=torch.ones((2048, 2048), dtype=torch.bool, device=query_latent.device).triu(1),
        actual_seq_lengths=query_ends,
        actual_seq_lengths_kv=key_lengths,
        block_table=packed.block_table,
        num_heads=heads,
        num_key_value_heads=1,
        scale=scale,
        input_layout="TND",
        sparse_mode=3,
        block_size=latent_cache[0].shape[1],
        softmax_lse_flag=False,
    )
    _, positions_T = locate_tokens(query_starts, lengths, tokens)
    return torch.where((positions_T >= 0)[:, None, None], out_THC, 0.0)
