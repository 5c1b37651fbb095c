"""The lightning indexer and its 8-bit form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.npu_runtime.bodies import paging
from tests.npu_runtime.bodies.calling import body, chip, require, undefined

NO_LIMIT = 2**63 - 1
NARROW = (torch.float16, torch.bfloat16)


def select(scores: Tensor, visible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best visible keys of each row, [rows, count], -1 where there are no more; best first, equal scores from the last
    position on: neither order is documented, so nobody may rely on the other."""
    keys = scores.shape[1]
    hidden = scores.masked_fill(~visible, float("-inf")).flip(-1)
    order = hidden.sort(dim=-1, descending=True, stable=True)
    found = min(count, keys)
    indices = torch.full((scores.shape[0], count), -1, dtype=torch.int32)
    values = torch.full((scores.shape[0], count), float("-inf"))
    counts = visible.sum(-1, keepdim=True)
    valid = torch.arange(found)[None] < counts
    indices[:, :found] = torch.where(valid, keys - 1 - order.indices[:, :found], -1).int()
    values[:, :found] = torch.where(valid, order.values[:, :found], float("-inf"))
    return indices, values


def check_common(a: Any, *, heads: int) -> None:
    """Rules that both forms share."""
    require(a.query.shape[-1] == a.key.shape[-1] == 128, "heads of 128 channels")
    require(a.key.shape[-2] == 1 and 1 <= heads <= 64, "up to 64 query heads, one key head")
    require(chip() != "950" or heads in (8, 16, 24, 32, 64), "8, 16, 24, 32 or 64 query heads on 950")
    require(a.sparse_mode in (0, 3) and a.pre_tokens == a.next_tokens == NO_LIMIT, "sparse_mode 0 or 3, no other limits")
    require(all(t.is_contiguous() for t in (a.query, a.key, a.weights)), "contiguous tensors")


def weighted(weights: Tensor, dots: Tensor) -> Tensor:
    """Scores [queries, keys] of the dot products of each head [heads, queries, keys]."""
    return (torch.relu(dots) * weights.T[..., None].float()).sum(0)


def run(a: Any, scored: Any, count: int) -> tuple[Tensor, Tensor]:
    """Indices and values of all rows; rows of no sequence stay undefined."""
    heads = a.query.shape[-2]
    flat_query, flat_weights = a.query.reshape(-1, heads, 128), a.weights.reshape(-1, heads)
    found = list(
        paging.sequences(a.layout_query, a.layout_key, a.query, a.key, a.actual_seq_lengths_query, a.actual_seq_lengths_key)
    )
    paging.check_pages(a.layout_key, a.key, a.block_table, len(found))
    indices, values = undefined((flat_query.shape[0], count), torch.int32), undefined((flat_query.shape[0], count), torch.float32)
    starts = paging.key_starts(found)
    for sequence in found:
        mine = slice(sequence.start, sequence.start + sequence.queries)
        seen = paging.causal(sequence) if a.sparse_mode == 3 else torch.ones(sequence.queries, sequence.keys, dtype=torch.bool)
        scores = scored(flat_query[mine], flat_weights[mine], sequence, starts, mine)
        indices[mine], values[mine] = select(scores, seen, count)
        if a.layout_query == "BSND":
            indices[sequence.start + sequence.queries : sequence.start + a.query.shape[1]] = -1
    return indices.view(*a.query.shape[:-2], 1, count), values.view(*a.query.shape[:-2], 1, count)


@body("npu_lightning_indexer", kernels=("aclnnLightningIndexer",))
def lightning_indexer(a: Any) -> tuple[Tensor, Tensor | None]:
    check_common(a, heads=a.query.shape[-2])
    require(a.query.dtype in NARROW and a.key.dtype == a.query.dtype, "query and key of one 16-bit dtype")
    require(a.weights.dtype in (a.query.dtype, torch.float32), "weights in the dtype of query, or float32")
    require(a.weights.dtype != torch.float32 or chip() != "950", "no float32 weights on 950")
    large = 3072 <= a.sparse_count <= 8192 and a.sparse_count % 1024 == 0
    require(1 <= a.sparse_count <= 2048 or large, "sparse_count 1 to 2048, or 3072 to 8192 in whole 1024s")
    require(not a.return_value or a.layout_key != "PA_BSND", "no values with paged keys")

    def scored(query: Tensor, weights: Tensor, sequence: paging.Sequence, starts: dict[int, int], _: slice) -> Tensor:
        keys = paging.rows(a.layout_key, a.key, a.block_table, sequence, starts).float()
        return weighted(weights, query.transpose(0, 1).float() @ keys.T)

    indices, values = run(a, scored, a.sparse_count)
    return indices, values.to(a.query.dtype) if a.return_value else None


@body("npu_quant_lightning_indexer", kernels=("aclnnQuantLightningIndexer",))
def quant_lightning_indexer(a: Any) -> Tensor:
    check_common(a, heads=a.query.shape[-2])
    require(a.query.dtype == a.key.dtype == torch.int8, "query and key of int8")
    scales = (a.weights, a.query_dequant_scale, a.key_dequant_scale)
    require(all(t.dtype == torch.float16 for t in scales), "weights and scales of float16")
    require(a.query_quant_mode == a.key_quant_mode == 0, "quantisation by token and head")
    require(1 <= a.sparse_count <= 2048, "sparse_count 1 to 2048")
    heads = a.query.shape[-2]
    query_scale = a.query_dequant_scale.reshape(-1, heads)
    factors = a.weights.reshape(-1, heads).float() * query_scale.float()
    require(bool((factors.abs() <= 65504).all()), "weights times scales of the query inside float16")

    def scored(query: Tensor, weights: Tensor, sequence: paging.Sequence, starts: dict[int, int], mine: slice) -> Tensor:
        keys = paging.rows(a.layout_key, a.key, a.block_table, sequence, starts).float()
        scale = paging.rows(a.layout_key, a.key_dequant_scale.unsqueeze(-1), a.block_table, sequence, starts)[:, 0].float()
        dots = query.transpose(0, 1).float() @ keys.T
        return weighted(weights, dots * scale * query_scale[mine].T[..., None].float())

    return run(a, scored, a.sparse_count)[0]
