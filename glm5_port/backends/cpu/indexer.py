"""Native indexer_scores, lightning_indexer and select_top_k.

Shape legend: T tokens; J index heads; X index head size; S positions considered; k = top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import DTYPES, dense_rows, kernels, native, threads
from glm5_port.errors import InputError
from glm5_port.operators.cache import INDEX, cache_layout
from glm5_port.operators.indexer import check_top_k, indexer_scores, lightning_indexer, select_top_k

KEY_FORMATS = {torch.float32: 0, torch.bfloat16: 1, "fp8": 2, "int8": 3}
"""Numbers of `KeyFormat` in native/indexer/indexer.h, by dtype of a plain cache or by the name of the format."""
_SCORES = ("deterministic", "batch_invariant", "thread_invariant")


def _scores_not_supported(*, cache_format: str, **_: Any) -> list[str]:
    return [] if cache_format in ("plain", "fp8", "int8") else [f"reads index caches plain, fp8 and int8, not {cache_format}"]


def _pairs_not_supported(*, dtype: torch.dtype, **facts: Any) -> list[str]:
    own = [] if dtype == torch.bfloat16 else ["multiplies bfloat16 queries; float32 ones are for avx512"]
    return own + _scores_not_supported(**facts)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _check_shapes(
    index_query: Tensor, head_weights: Tensor, keys: Tensor, block_table: Tensor, query_starts: Tensor, lengths: Tensor
) -> None:
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


class _Call:
    """What the kernels are told of a call; keeps alive what they read."""

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
        _check_shapes(index_query, head_weights, keys, block_table, query_starts, lengths)
        if cache_format == "plain" and keys.dtype not in DTYPES:
            keys = keys.float()
        query, keys = dense_rows(index_query.detach()), dense_rows(keys.detach())
        weights = dense_rows(head_weights.detach(), torch.float32)
        table, starts, ends = dense_rows(block_table, torch.int32), _int32(query_starts), _int32(lengths)
        scale = scales[0] if scales else None
        self.tokens, heads, head_dim = query.shape
        self.positions = table.shape[1] * keys.shape[1]
        self.tensors = (query, keys, weights, table, starts, ends, scale)
        self.call = kernels().IndexerCall(
            query.data_ptr(), query.dtype == torch.bfloat16, query.stride(0), query.stride(1),
            weights.data_ptr(), weights.stride(0),
            keys.data_ptr(), KEY_FORMATS[keys.dtype if cache_format == "plain" else cache_format], keys.stride(0), keys.stride(1),
            0 if scale is None else scale.data_ptr(), *((0, 0) if scale is None else scale.stride()[:2]),
            keys.shape[0], keys.shape[1],
            table.data_ptr(), table.stride(0), table.shape[1], starts.data_ptr(), ends.data_ptr(),
            table.shape[0], self.tokens, heads, head_dim, threads(),
        )  # fmt: skip


def _make_scores(isa: int) -> Callable[..., Tensor]:
    def run(
        index_query: Tensor,
        head_weights: Tensor,
        index_cache: list[Tensor],
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
        *,
        cache_format: str,
    ) -> Tensor:
        made = _Call(index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format)
        scores_TS = torch.empty((made.tokens, made.positions), dtype=torch.float32)
        kernels().indexer_scores(isa, made.call, scores_TS.data_ptr())
        return scores_TS

    return run


def _make_indexer(isa: int) -> Callable[..., Tensor]:
    def run(
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
        check_top_k("lightning_indexer", top_k)
        made = _Call(index_query, head_weights, index_cache, block_table, query_starts, lengths, cache_format)
        indices_Tk = torch.empty((made.tokens, top_k), dtype=torch.int32)
        kernels().lightning_indexer(isa, made.call, indices_Tk.data_ptr(), top_k)
        return indices_Tk

    return run


for _isas, _reasons in ((("scalar", "avx2", "avx512"), _scores_not_supported), (("avx512_bf16", "amx"), _pairs_not_supported)):
    native(indexer_scores, isas=_isas, promises=_SCORES, not_supported=_reasons)(_make_scores)
    native(lightning_indexer, isas=_isas, promises=(*_SCORES, "tie_rule"), not_supported=_reasons)(_make_indexer)


@native(select_top_k, promises=(*_SCORES, "tie_rule"))
def select_top_k_native(isa: int) -> Callable[..., Tensor]:
    def run(scores: Tensor, *, top_k: int) -> Tensor:
        check_top_k("select_top_k", top_k)
        rows = dense_rows(scores.detach())
        indices_Tk = torch.empty((rows.shape[0], top_k), dtype=torch.int32)
        kernels().select_top_k(
            isa,
            rows.data_ptr(),
            rows.dtype == torch.bfloat16,
            *rows.shape,
            rows.stride(0),
            indices_Tk.data_ptr(),
            top_k,
            threads(),
        )
        return indices_Tk

    return run
