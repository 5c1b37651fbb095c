"""Triton sparse_mla_attention and mla_attention_absorbed, whole and split over keys.

`triton` gives one program all keys of a token, so that a token's result does not depend on the batch. `triton_split` shares the
keys of a token among programs while there are few tokens, as in decoding, and adds the splits in their order; how many there are
depends on the number of tokens, never on the card's multiprocessors.

Shape legend: T tokens; H heads; C latent; R rope; K indices a token; W width of a field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import LARGE, SMALL, dense, generation, kernels, launch, power_of_two, triton
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.mla import mla_attention_absorbed
from glm5_port.operators.sparse_attention import check_attention, check_indices, sparse_mla_attention

FORMATS = ("plain", "fp8", "int8")
WIDEST_LATENT, WIDEST_ROPE = 512, 128
"""What the accumulators of a tile and its shared memory hold."""
PROGRAMS = 128
"""Programs that a launch is split into while tokens are few: about what the larger cards run at once."""
FEWEST_KEYS = 128
"""A split has at least so many keys."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Heads and keys that a program multiplies at a time, and the options that it is compiled with."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


TILES = {
    # 64 heads by 512 channels of sums fill half the registers of eight warps. With 64 keys a tile, sums spill on 9.0, and two
    # tiles do not fit the shared memory of 10.0.
    (LARGE, "plain"): Tile(heads=64, keys=32, num_warps=8, num_stages=2),
    (LARGE, "quantised"): Tile(heads=64, keys=32, num_warps=8, num_stages=2),
    (SMALL, "plain"): Tile(heads=16, keys=32, num_warps=4, num_stages=2),
    (SMALL, "quantised"): Tile(heads=16, keys=32, num_warps=8, num_stages=2),
}
IEEE_TILE = Tile(heads=16, keys=16, num_warps=8, num_stages=1)
"""float32: products without matrix units, rows twice as wide."""


def tile_of(dtype: torch.dtype, heads: int, cache_format: str) -> Tile:
    """The tile for a working dtype and cache on this card. Heads are the rows of a product: at least 16."""
    kind = "plain" if cache_format == "plain" else "quantised"
    tile = IEEE_TILE if dtype == torch.float32 else TILES[generation(), kind]
    return replace(tile, heads=min(tile.heads, power_of_two(heads, least=16)))


def _not_supported(*, cache_format: str, latent_dim: int, rope_dim: int, **_: Any) -> list[str]:
    found = [] if cache_format in FORMATS else [f"reads caches of format {', '.join(FORMATS)}, not {cache_format}"]
    if latent_dim > WIDEST_LATENT or rope_dim > WIDEST_ROPE:
        found.append(
            f"holds a latent of at most {WIDEST_LATENT} and a rope key of {WIDEST_ROPE}, not {latent_dim} and {rope_dim}"
        )
    return found


def _split_not_supported(*, phase: str | None, **facts: Any) -> list[str]:
    own = ["splits keys for few tokens; a prefill has many"] if phase == "prefill" else []
    return own + _not_supported(**facts)


@dataclass(frozen=True, slots=True)
class LatentFields:
    """A latent cache as kernels read it: numbers, scales (of quantised rows) and rope keys, each [pages, page_size, W]."""

    values: Tensor
    scales: Tensor
    rope_keys: Tensor


def latent_fields(latent_cache: list[Tensor], cache_format: str, widths: tuple[int, int]) -> LatentFields:
    """The fields of a cache in place.

    Raises:
        InputError: unknown format, or fields that do not hold rows of these widths.
    """
    layout = cache_layout(LATENT, cache_format)
    layout.check_widths(widths)
    found, wanted = [field.shape[-1] for field in latent_cache], [field.width(widths) for field in layout.fields]
    if found != wanted or any(field.shape[:2] != latent_cache[0].shape[:2] for field in latent_cache):
        raise InputError(
            f"attention: cache fields {[tuple(field.shape) for field in latent_cache]} do not hold rows of latent {widths[0]} "
            f"and rope {widths[1]} in format {cache_format!r}\n  supported: fields [pages, page_size, W], W = {wanted}"
        )
    rows = dense(latent_cache[0])
    if cache_format == "plain":
        return LatentFields(rows, rows, dense(latent_cache[1]))
    halves = rows.view(torch.bfloat16)
    if cache_format == "fp8":  # 512 bytes of numbers | 4 float32 scales | 64 bfloat16
        return LatentFields(rows, rows.view(torch.float32)[..., 128:], halves[..., 264:])
    return LatentFields(rows, rows.view(torch.float32)[..., 160:], halves[..., 256:])  # numbers | 64 bfloat16 | scales


def splits_of(tokens: int, head_blocks: int, keys: int) -> int:
    """How many programs share the keys of a token: 1 as soon as tokens are many."""
    wanted = PROGRAMS // max(tokens * head_blocks, 1)
    return max(1, min(wanted, -(-keys // FEWEST_KEYS)))


def _attend(
    query: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    indices: Tensor | None,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    cache_format: str,
    *,
    may_split: bool,
) -> Tensor:
    check_attention(query, query_rope, latent_cache, block_table, query_starts, lengths)
    (tokens, heads, latent_dim), rope_dim = query.shape, query_rope.shape[2]
    fields = latent_fields(latent_cache, cache_format, (latent_dim, rope_dim))
    query_THC, rope_THR, table = dense(query), dense(query_rope), dense(block_table)
    chosen = table if indices is None else dense(indices)
    pages, page_size = fields.values.shape[:2]
    keys = table.shape[1] * page_size if indices is None else indices.shape[1]
    tile = tile_of(query.dtype, heads, cache_format)
    head_blocks = -(-heads // tile.heads)
    splits = splits_of(tokens, head_blocks, keys) if may_split else 1
    split_keys = -(-keys // (splits * tile.keys)) * tile.keys
    splits = max(1, -(-keys // split_keys)) if split_keys else 1
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partial = torch.empty((tokens, splits, heads, latent_dim) if splits > 1 else (1,), dtype=torch.float32, device=query.device)
    weights = torch.empty((2, tokens, splits, heads) if splits > 1 else (2, 1), dtype=torch.float32, device=query.device)
    module = kernels("attention")
    channels = power_of_two(latent_dim, least=16)
    launch(
        module.attend,
        (tokens * head_blocks, splits),
        query_THC, rope_THR, fields.values, fields.scales, fields.rope_keys, chosen, table, query_starts.contiguous(),
        lengths.contiguous(), out, partial, weights[0], weights[1],
        heads, keys, split_keys, splits, table.shape[0], pages, table.shape[1],
        *query_THC.stride()[:2], *rope_THR.stride()[:2], chosen.stride(0), table.stride(0),
        *fields.values.stride()[:2], *fields.scales.stride()[:2], *fields.rope_keys.stride()[:2],
        scale,
        LATENT=latent_dim, ROPE_DIM=rope_dim, PAGE=page_size, FORMAT=cache_format, SPARSE=indices is not None, SPLIT=splits > 1,
        HEADS=tile.heads, KEYS=tile.keys, CHANNELS=channels, ROPE=power_of_two(rope_dim, least=16),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            module.combine, (tokens * heads,), partial, weights[0], weights[1], out, heads, splits,
            LATENT=latent_dim, SPLITS=power_of_two(splits), CHANNELS=channels, num_warps=4,
        )  # fmt: skip
    return out


def _make_sparse(may_split: bool) -> Callable[..., Tensor]:
    def run(
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
        check_indices(query_latent, indices)
        return _attend(
            query_latent, query_rope, latent_cache, indices, block_table, query_starts, lengths, scale, cache_format,
            may_split=may_split,
        )  # fmt: skip

    return run


def _make_absorbed(may_split: bool) -> Callable[..., Tensor]:
    def run(
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
        return _attend(
            query_latent, query_rope, latent_cache, None, block_table, query_starts, lengths, scale, cache_format,
            may_split=may_split,
        )  # fmt: skip

    return run


for _operator, _make in ((sparse_mla_attention, _make_sparse), (mla_attention_absorbed, _make_absorbed)):
    triton(_operator, not_supported=_not_supported)(_make(may_split=False))
    triton(_operator, variant="triton_split", rank=10, promises=("deterministic",), not_supported=_split_not_supported)(
        _make(may_split=True)
    )
