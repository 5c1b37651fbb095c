"""Triton mla_attention_expanded: keys and values of a sequence are expanded from its latents by cuBLAS, then attended to.

They are expanded once for a sequence and its call, in the working dtype: expanding them anew for each block of queries would
take several times the operations of the attention itself. Their memory is L * H * (N + V) numbers: 117 MB for 2,048 positions of
GLM-5, which is as far as its dense prefill reaches.

Shape legend: T tokens; H heads; N nope, R rope and V value part; C latent; L positions that the block table covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.attention import FORMATS, WIDEST_LATENT, WIDEST_ROPE, LatentFields, latent_fields
from glm5_port.backends.cuda.triton_support import LARGE, SMALL, dense, generation, kernels, launch, power_of_two, triton
from glm5_port.operators.mla import mla_attention_expanded
from glm5_port.operators.sparse_attention import check_attention

WIDEST_HEAD = 256
ROWS = 16
"""Positions that one program reads."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys that a program multiplies at a time, and the options that it is compiled with."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


TILES = {LARGE: Tile(128, 32, 8, 2), SMALL: Tile(64, 32, 8, 1)}
IEEE_TILE = Tile(16, 16, 8, 1)


def _not_supported(*, cache_format: str, latent_dim: int, rope_dim: int, nope_dim: int, value_dim: int, **_: Any) -> list[str]:
    found = [] if cache_format in FORMATS else [f"reads caches of format {', '.join(FORMATS)}, not {cache_format}"]
    if latent_dim > WIDEST_LATENT or rope_dim > WIDEST_ROPE or max(nope_dim, value_dim) > WIDEST_HEAD:
        found.append(
            f"holds a latent of at most {WIDEST_LATENT}, a rope part of {WIDEST_ROPE}, and heads of {WIDEST_HEAD}, not "
            f"{latent_dim}, {rope_dim}, and {nope_dim} and {value_dim}"
        )
    return found


def _rows_of_sequence(
    fields: LatentFields, table: Tensor, lengths: Tensor, sequence: int, cache_format: str, like: Tensor, widths: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(latent [L, C], rope key [L, R]) of one sequence in the dtype of `like`, zeros from its end on."""
    count = table.shape[1] * fields.values.shape[1]
    latent_LC, rope_LR = (torch.empty((count, width), dtype=like.dtype, device=like.device) for width in widths)
    launch(
        kernels("expanded").read_sequence,
        (-(-count // ROWS),),
        fields.values, fields.scales, fields.rope_keys, table, lengths, latent_LC, rope_LR,
        sequence, count, fields.values.shape[0], table.shape[1], table.stride(0),
        *fields.values.stride()[:2], *fields.scales.stride()[:2], *fields.rope_keys.stride()[:2],
        LATENT=widths[0], ROPE_DIM=widths[1], PAGE=fields.values.shape[1], FORMAT=cache_format, ROWS=ROWS,
        CHANNELS=power_of_two(widths[0]), ROPE=power_of_two(widths[1]), num_warps=4,
    )  # fmt: skip
    return latent_LC, rope_LR


@triton(mla_attention_expanded, not_supported=_not_supported)
def mla_attention_expanded_triton(
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
    """One sequence after the other; one program for a block of its tokens in one head."""
    check_attention(query_nope, query_rope, latent_cache, block_table, query_starts, lengths)
    (tokens, heads, nope_dim), rope_dim = query_nope.shape, query_rope.shape[2]
    value_dim, latent_dim = w_uv.shape[1:]
    fields = latent_fields(latent_cache, cache_format, (latent_dim, rope_dim))
    query_THN, rope_THR, table = dense(query_nope), dense(query_rope), dense(block_table)
    starts, counts = query_starts.contiguous(), lengths.contiguous()
    tile = IEEE_TILE if query_nope.dtype == torch.float32 else TILES[generation()]
    out = torch.zeros((tokens, heads, value_dim), dtype=query_nope.dtype, device=query_nope.device)  # padding stays zero
    for sequence in range(table.shape[0] if tokens else 0):
        latent_LC, rope_LR = _rows_of_sequence(fields, table, counts, sequence, cache_format, query_nope, (latent_dim, rope_dim))
        keys_LHN, values_LHV = (latent_LC @ weight.to(latent_LC.dtype).flatten(0, 1).T for weight in (w_uk, w_uv))
        launch(
            kernels("expanded").attend_expanded,
            (-(-tokens // tile.queries), heads),
            query_THN, rope_THR, keys_LHN, rope_LR, values_LHV, starts, counts, out, sequence, heads, latent_LC.shape[0],
            *query_THN.stride()[:2], *rope_THR.stride()[:2], scale,
            NOPE_DIM=nope_dim, ROPE_DIM=rope_dim, VALUE_DIM=value_dim, QUERIES=tile.queries, KEYS=tile.keys,
            NOPE=power_of_two(nope_dim, least=16), ROPE=power_of_two(rope_dim, least=16),
            VALUE=power_of_two(value_dim, least=16), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out
