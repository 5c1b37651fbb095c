"""Triton write_cache, and the rows that the prologues normalise and rotate on their way into the cache.

Shape legend: T tokens; C latent; R rope; X index key; W width of a row or field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glm5_port.backends.cuda.attention import latent_fields
from glm5_port.backends.cuda.triton_support import dense, kernels, launch, power_of_two, triton
from glm5_port.operators.cache import LATENT, cache_layout, check_write, kind_of_rows, write_cache

FORMATS = ("plain", "fp8", "int8")
GROUPS, GROUP = 4, 128
"""Of a quantised latent."""


def format_not_supported(*, cache_format: str, **_: Any) -> list[str]:
    return [] if cache_format in FORMATS else [f"writes caches of format {', '.join(FORMATS)}, not {cache_format}"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a prologue does to a row before it is stored.

    Attributes:
        weight: of the norm, [C] or [X].
        bias: of the LayerNorm [X]; None for the latent's rms_norm.
        eps: of the norm.
        cos, sin: [T, R / 2].
        interleaved: which channels make a pair.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    cos: Tensor
    sin: Tensor
    interleaved: bool


def _angles(rotation: Rotation | None, fallback: Tensor) -> tuple[Tensor, Tensor]:
    return (rotation.cos.contiguous(), rotation.sin.contiguous()) if rotation else (fallback, fallback)


def store_latent(
    latent: Tensor, rope_key: Tensor, cache: list[Tensor], slots: Tensor | None, cache_format: str, rotation: Rotation | None
) -> None:
    """Writes latent rows [T, C] and rope keys [T, R] into a cache; `slots` None: token t is row t of a cache of one page."""
    rows, rope_rows = dense(latent), dense(rope_key)
    fields = latent_fields(cache, cache_format, (latent.shape[1], rope_key.shape[1]))
    cos, sin = _angles(rotation, rows)
    groups, width = (1, power_of_two(latent.shape[1])) if cache_format == "plain" else (GROUPS, GROUP)
    launch(
        kernels("cache").store_latent,
        (rows.shape[0],),
        rows, rope_rows, rotation.weight.contiguous() if rotation else rows, cos, sin,
        rows if slots is None else slots.contiguous(),
        fields.values, fields.scales, fields.rope_keys,
        rows.stride(0), rope_rows.stride(0), rotation.eps if rotation else 0.0, fields.values.shape[0],
        *fields.values.stride()[:2], *fields.scales.stride()[:2], *fields.rope_keys.stride()[:2],
        LATENT=latent.shape[1], ROPE_DIM=rope_key.shape[1], PAGE=cache[0].shape[1], FORMAT=cache_format,
        PROLOGUE=rotation is not None, INTERLEAVED=rotation is not None and rotation.interleaved, SLOTTED=slots is not None,
        GROUPS=groups, WIDTH=width, ROPE=power_of_two(rope_key.shape[1]), num_warps=4,
    )  # fmt: skip


def store_index(keys: Tensor, cache: list[Tensor], slots: Tensor | None, cache_format: str, rotation: Rotation | None) -> None:
    """Writes index keys [T, X]; as `store_latent`."""
    rows, values = dense(keys), cache[0]
    scales = cache[1] if len(cache) > 1 else values
    cos, sin = _angles(rotation, rows)
    weight, bias = (rows, rows) if rotation is None or rotation.bias is None else (rotation.weight, rotation.bias)
    launch(
        kernels("cache").store_index,
        (rows.shape[0],),
        rows, weight.contiguous(), bias.contiguous(), cos, sin, rows if slots is None else slots.contiguous(), values, scales,
        rows.stride(0), rotation.eps if rotation else 0.0, values.shape[0],
        *values.stride()[:2], *scales.stride()[:2],
        DIM=keys.shape[1], ROPE_DIM=2 * rotation.cos.shape[1] if rotation else 0, PAGE=values.shape[1], FORMAT=cache_format,
        PROLOGUE=rotation is not None, INTERLEAVED=rotation is not None and rotation.interleaved, SLOTTED=slots is not None,
        CHANNELS=power_of_two(keys.shape[1]), num_warps=4,
    )  # fmt: skip


def into_cache(
    rows: Sequence[Tensor], cache: list[Tensor], slots: Tensor, cache_format: str, rotation: Rotation | None = None
) -> None:
    """`write_cache` of rows as they are, or as a prologue makes them."""
    kind = kind_of_rows(rows)
    check_write(cache_layout(kind, cache_format), rows, cache, slots)
    fields = [dense(field) for field in cache]
    if kind == LATENT:
        store_latent(rows[0], rows[1], fields, slots, cache_format, rotation)
    else:
        store_index(rows[0], fields, slots, cache_format, rotation)
    for field, written in zip(cache, fields, strict=True):
        if field.stride(-1) != 1 and field.shape[-1] > 1:  # strided rows, which no cache of this library has
            field.copy_(written)


@triton(write_cache, not_supported=format_not_supported)
def write_cache_triton(rows: list[Tensor], cache: list[Tensor], slots: Tensor, *, cache_format: str) -> None:
    """One program for a token."""
    into_cache(rows, cache, slots, cache_format)
