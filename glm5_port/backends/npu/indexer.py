"""The indexer: its projections by the vendor's norms and rotation, its selection by npu_lightning_indexer.

The vendor's documents say which positions come back, and neither in which order nor which of equal scores. `aclnn` puts them in
order; which of equal scores at the end of the list is taken stays the kernel's, so it does not promise `tie_rule`. `ordered` is
slower, keeps the rule and is the same twice: GLM5_PORT_OP_LIGHTNING_INDEXER=ordered. `aclnn_int8` reads the 8-bit cache.

Shape legend: T tokens; J index heads; X index head size; K indices kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu.attention import INT8, PLAIN, one_key_head
from glm5_port.backends.npu.contracts.attention import INDEX_HEADS, LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER, sparse_count_fits
from glm5_port.backends.npu.contracts.kinds import FLOATING, HALF, NO_LIMIT
from glm5_port.backends.npu.contracts.small import ROTARY_MUL
from glm5_port.backends.npu.paging import PAGES, Packed, pack
from glm5_port.backends.npu.rope import rotate_aclnn
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.backends.torch.indexer import lightning_indexer_eager
from glm5_port.operators.cache import locate_tokens
from glm5_port.operators.cache_layouts import INT8_MAX, SMALLEST_AMAX
from glm5_port.operators.indexer import check_top_k, indexer_prologue, lightning_indexer


@aclnn(indexer_prologue, Needs((ROTARY_MUL,), (dtype_among(*FLOATING),)))
def indexer_prologue_aclnn(
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
    heads, head_dim = weights_proj.shape[0], wk.shape[0]
    query_TJX = F.linear(query_residual, wq_b).unflatten(-1, (heads, head_dim))
    key_TX = F.linear(hidden, wk).to(torch.float32)
    key_TX = F.layer_norm(key_TX, (head_dim,), k_norm_weight.float(), k_norm_bias.float(), k_norm_eps).to(hidden.dtype)
    query_TJX = rotate_aclnn(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
    key_TX = rotate_aclnn(key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
    head_weights_TJ = F.linear(hidden.to(torch.float32), weights_proj.to(torch.float32)) * (heads * head_dim) ** -0.5
    return query_TJX, key_TX, head_weights_TJ


_INDEX_HEADS = Rule("index heads", "wants up to 64 index heads, not {heads}", lambda *, heads, **_: heads <= 64)
_INDEX_WIDTH = Rule(
    "index head width", "wants index heads of 128 channels, not {head_dim}", lambda *, head_dim, **_: head_dim == 128
)
_INDEX_COUNT = Rule(
    "top_k",
    "selects 1 to 2048 positions, or 3072 to 8192 in whole 1024s, not {top_k}",
    lambda *, top_k, **_: sparse_count_fits(top_k),
)


def _options(packed: Packed, top_k: int) -> dict[str, Tensor | int | str]:
    """What both forms of the vendor's indexer take, everything that has a default included."""
    return {
        "actual_seq_lengths_query": packed.query_ends,
        "actual_seq_lengths_key": packed.key_lengths,
        "block_table": packed.block_table,
        "layout_query": "TND",
        "layout_key": "PA_BSND",
        "sparse_count": top_k,
        "sparse_mode": 3,
        "pre_tokens": NO_LIMIT,
        "next_tokens": NO_LIMIT,
    }


def _ascending(found_T1K: Tensor, block_table: Tensor, query_starts: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """The vendor's positions in order, -1 behind them and in the rows of padding."""
    _, positions_T = locate_tokens(query_starts, lengths, found_T1K.shape[0])
    nowhere = block_table.shape[1] * page_size  # beyond every position
    found_TK = found_T1K.squeeze(1)
    inside = (found_TK >= 0) & (positions_T >= 0)[:, None]
    ascending = torch.where(inside, found_TK, nowhere).sort(dim=-1).values
    return ascending.masked_fill(ascending == nowhere, -1)


@aclnn(
    lightning_indexer,
    Needs((LIGHTNING_INDEXER,), (dtype_among(*HALF), _INDEX_HEADS, _INDEX_WIDTH, PAGES, _INDEX_COUNT, PLAIN)),
)
def lightning_indexer_aclnn(
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
    """The block table covers every cached token, as it does in every batch of the model: the vendor reads whole sequences."""
    check_top_k("lightning_indexer", top_k)
    tokens = index_query.shape[0]
    if tokens == 0:
        return index_query.new_empty((0, top_k), dtype=torch.int32)
    packed = pack(block_table, query_starts, lengths, tokens, index_cache[0])
    found_T1K, _ = call(
        LIGHTNING_INDEXER,
        index_query.contiguous(),
        one_key_head(index_cache[0]),
        head_weights.to(torch.float32).contiguous(),
        return_value=False,
        **_options(packed, top_k),
    )
    return _ascending(found_T1K, block_table, query_starts, lengths, index_cache[0].shape[1])


@aclnn(
    lightning_indexer, Needs((), (dtype_among(*FLOATING),)), variant="ordered", rank=200, promises=("deterministic", "tie_rule")
)
def lightning_indexer_ordered(
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
    """The portable selection, by torch's own kernels: every score is there to compare, as the tie rule needs."""
    return lightning_indexer_eager(
        index_query, head_weights, index_cache, block_table, query_starts, lengths, top_k=top_k, cache_format=cache_format
    )


def _int8_query(index_query: Tensor, head_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Queries as int8, one scale for each token and head, and head weights that hold those scales, as float16.

    Only the order of a token's scores matters, so each token's weights are divided by the largest of them: all fit float16."""
    wide = index_query.to(torch.float32)
    scales_TJ1 = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / INT8_MAX
    weights_TJ = head_weights.to(torch.float32) * scales_TJ1.squeeze(-1)
    largest_T1 = weights_TJ.abs().amax(-1, keepdim=True)
    weights_TJ = weights_TJ / torch.where(largest_T1 > 0, largest_T1, 1.0)
    return (wide / scales_TJ1).round().to(torch.int8), weights_TJ.to(torch.float16)


@aclnn(
    lightning_indexer,
    Needs(
        (QUANT_LIGHTNING_INDEXER,),
        (
            dtype_among(torch.bfloat16),
            Rule("index heads", "wants 8, 16, 24, 32 or 64 index heads, not {heads}", lambda *, heads, **_: heads in INDEX_HEADS),
            _INDEX_WIDTH,
            PAGES,
            Rule("top_k", "selects 1 to 2048 positions, not {top_k}", lambda *, top_k, **_: 1 <= top_k <= 2048),
            INT8,
        ),
    ),
    variant="aclnn_int8",
    rank=300,
)
def lightning_indexer_aclnn_int8(
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
    """For the 8-bit cache. The vendor quantises the query too, which moves scores by half a per cent, less than bfloat16 itself
    may; engines report garbled text with it all the same, so it runs only when asked for."""
    check_top_k("lightning_indexer", top_k)
    tokens = index_query.shape[0]
    if tokens == 0:
        return index_query.new_empty((0, top_k), dtype=torch.int32)
    values, scales = index_cache
    packed = pack(block_table, query_starts, lengths, tokens, values)
    codes_TJX, weights_TJ = _int8_query(index_query, head_weights)
    found_T1K = call(
        QUANT_LIGHTNING_INDEXER,
        codes_TJX.contiguous(),
        one_key_head(values),
        weights_TJ,
        torch.ones_like(weights_TJ),
        scales.contiguous(),
        0,
        0,
        **_options(packed, top_k),
    )
    return _ascending(found_T1K, block_table, query_starts, lengths, values.shape[1])
