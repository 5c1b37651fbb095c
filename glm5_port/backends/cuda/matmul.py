"""Triton int4_matmul and int8_matmul, and the INT4 weight layout of the kernels.

A prepared weight has the bytes of the canonical one in another order (kernels/weights.py): tiles of 128 inputs, [tiles, N, 16]
words, padded up to whole tiles, and scales [groups, N].

Shape legend: N, K outputs and inputs of a weight; R rows of x; S segments of the inputs; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.cuda.triton_support import (
    LARGE,
    capability,
    check_shapes,
    dense,
    generation,
    kernels,
    launch,
    power_of_two,
    rows_of,
    triton,
)
from glm5_port.errors import InputError
from glm5_port.operators.int4 import SMALLEST_ROW, check_int4, int4_matmul, int8_matmul
from glm5_port.quant.int4 import PER_CHANNEL, groups_of
from glm5_port.quant.packing import pack_int4, unpack_int4

TILE, RUN = 128, 32
FEW_ROWS = 64
"""Up to so many rows, segments have programs of their own."""
HOPPER = (9, 0)
PROGRAMS = 512
"""Segments are cut so that about as many programs run: two for each multiprocessor of the largest cards, and the
same everywhere, so that results do not depend on the card's size."""


# -- weights -------------------------------------------------------------------------------------------------------------


def group_reasons(group_size: int) -> list[str]:
    """Why INT4 products cannot take a group size; empty when they can."""
    if group_size == PER_CHANNEL or group_size % RUN == 0:
        return []
    return [f"takes groups of a multiple of {RUN} weights, or whole rows ({PER_CHANNEL}), not of {group_size}"]


def tile_words(packed: Tensor) -> Tensor:
    """Canonical words [..., N, K / 8] in tiles, [..., ceil(K / 128), N, 16] int32; inputs beyond K have the code 0."""
    codes = unpack_int4(packed)
    codes = F.pad(codes, (0, -codes.shape[-1] % TILE))
    runs = codes.unflatten(-1, (-1, TILE // RUN, RUN // 2, 2)).movedim(-5, -4)  # tiles, N, runs, words, two inputs
    return pack_int4(runs.movedim(-3, -1).flatten(-2).contiguous()).squeeze(-1)


def scale_rows(scales: Tensor) -> Tensor:
    """Canonical scales [..., N, G] as [..., G, N] bfloat16."""
    return scales.detach().to(torch.bfloat16).transpose(-1, -2).contiguous()


class TiledWeight:
    """One INT4 weight in tiles."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._group_size = facts["group_size"]
        self._weights: dict[str, Tensor | int] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weight; `part` is None."""
        packed, scales = tensors["packed"], tensors["scales"]
        check_int4("int4_matmul", packed, scales, self._group_size)
        self._weights = {"words": tile_words(packed), "group_scales": scale_rows(scales)}

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of the kernel."""
        if not self._weights:
            raise InputError("int4_matmul on cuda: the weight never arrived")
        return self._weights


def check_width(name: str, width: int, expected: int) -> None:
    """Raises InputError unless rows of `width` numbers fill the tiles of a weight."""
    if -(-width // TILE) * TILE != expected:
        raise InputError(f"{name}: rows of {width} numbers, and a weight of {expected - TILE + 1} to {expected} inputs")


# -- INT4 ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program computes: so many outputs of so many rows, and how.

    Attributes:
        outputs, rows: of the tile.
        warps, stages: that compute it, and loads that run ahead.
        inputs: that are multiplied at a time.
    """

    outputs: int
    rows: int
    warps: int
    stages: int
    inputs: int = RUN


def int4_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of INT4 products for so many rows of x in `dtype`, which may be int8.

    128 rows leave room for two programs a multiprocessor of Hopper: one decodes while the other multiplies. On Blackwell, gate
    and up of 128 rows need more than its 512 columns of tensor memory."""
    least = power_of_two(rows, least=16)
    if dtype == torch.float32:
        return Tiles(32, 16, 4, 2)
    if dtype != torch.bfloat16:
        return Tiles(64, min(least, 32), 4, 2)
    if generation() == LARGE:
        most = 128 if (capability() or HOPPER)[0] == HOPPER[0] else 64
        return Tiles(64, min(least, most), 4, 4 if least <= FEW_ROWS else 2)
    return Tiles(64, min(least, 64), 4, 3)


def segments_of(tiles: int, blocks: int) -> tuple[int, int]:
    """(tiles of a segment, segments) for a weight of `blocks` blocks of outputs. Segments are equally long."""
    segment = next(n for n in range(1, tiles + 1) if tiles % n == 0 and (n == tiles or n * PROGRAMS >= tiles * blocks))
    return segment, tiles // segment


def _int4_not_supported(*, group_size: int, **_: Any) -> list[str]:
    return group_reasons(group_size)


def _fake_int4(x: Tensor, *, group_size: int, words: Tensor, group_scales: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[1]))


@triton(int4_matmul, not_supported=_int4_not_supported, prepare=TiledWeight, fake=_fake_int4)
def int4_matmul_triton(x: Tensor, *, group_size: int, words: Tensor, group_scales: Tensor) -> Tensor:
    """Up to 64 rows, segments of the inputs are summed by programs of their own; the order of all sums is the same beyond."""
    tiles, outputs, _ = words.shape
    width = x.shape[-1]
    check_width("int4_matmul", width, tiles * TILE)
    check_shapes("int4_matmul", group_scales=(group_scales, (groups_of(width, group_size)[0], outputs)))
    rows_RK = rows_of(x)
    rows = rows_RK.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    shape = int4_tiles(rows, x.dtype)
    segment, segments = segments_of(tiles, -(-outputs // 64))
    apart = segments > 1 and rows <= FEW_ROWS
    sums = torch.empty((segments, rows, outputs), dtype=torch.float32, device=x.device) if apart else y
    launch(
        kernels("matmul").int4_products,
        (-(-outputs // shape.outputs), -(-rows // shape.rows), segments if apart else 1),
        rows_RK,
        words,
        group_scales,
        sums,
        rows,
        rows_RK.stride(0),
        OUTPUTS=outputs,
        WIDTH=width,
        GROUP=groups_of(width, group_size)[1],
        SEGMENTS=1 if apart else segments,
        SEGMENT=segment,
        BLOCK_N=shape.outputs,
        BLOCK_R=shape.rows,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if apart:
        add_segments(sums, y)
    return y


def add_segments(sums: Tensor, y: Tensor) -> None:
    """Adds the segments [S, ...] in order into y."""
    block = 1024
    launch(
        kernels("matmul").add_segments,
        (-(-y.numel() // block),),
        sums,
        y,
        y.numel(),
        SEGMENTS=sums.shape[0],
        BLOCK=block,
        num_warps=4,
    )


# -- INT8 ----------------------------------------------------------------------------------------------------------------

WIDEST_INT8 = 2**17
"""From here on, sums of products of codes could leave 32 bits."""
STEP = 128
"""Inputs that a product of codes takes at a time."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [R, K] and scales float32 [R] of the rows of x, as `glm5_port.operators.int4.quantize_rows`."""
    rows_RK = rows_of(x)
    codes_RK = torch.empty(rows_RK.shape, dtype=torch.int8, device=x.device)
    scales_R = torch.empty(rows_RK.shape[:1], dtype=torch.float32, device=x.device)
    launch(
        kernels("matmul").quantize_rows,
        (rows_RK.shape[0],),
        rows_RK,
        codes_RK,
        scales_R,
        rows_RK.stride(0),
        SMALLEST=SMALLEST_ROW,
        WIDTH=rows_RK.shape[1],
        BLOCK=min(power_of_two(rows_RK.shape[1]), 4096),
        num_warps=4,
    )
    return codes_RK, scales_R


def _int8_not_supported(*, width_in: int, **_: Any) -> list[str]:
    return [f"takes fewer than {WIDEST_INT8} inputs, not {width_in}"] if width_in >= WIDEST_INT8 else []


@triton(int8_matmul, not_supported=_int8_not_supported)
def int8_matmul_triton(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    outputs, width = weight.shape
    check_shapes("int8_matmul", x=(x, (*x.shape[:-1], width)), weight_scale=(weight_scale, (outputs,)))
    codes_RK, row_scales_R = quantize_rows(x)
    rows = codes_RK.shape[0]
    weight_NK, scales_N = dense(weight), weight_scale.detach().to(torch.float32).contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    block_rows = min(power_of_two(rows, least=16), 128)
    block_outputs = 64 if block_rows <= FEW_ROWS else 128
    tiles = -(-width // STEP)
    segment, segments = segments_of(tiles, -(-outputs // block_outputs)) if rows <= FEW_ROWS else (tiles, 1)
    apart = segments > 1
    sums = torch.empty((segments, rows, outputs), dtype=torch.int32, device=x.device) if apart else y
    module = kernels("matmul")
    launch(
        module.int8_products,
        (-(-outputs // block_outputs), -(-rows // block_rows), segments),
        codes_RK,
        row_scales_R,
        weight_NK,
        scales_N,
        sums,
        rows,
        weight_NK.stride(0),
        OUTPUTS=outputs,
        WIDTH=width,
        SEGMENT=segment,
        APART=apart,
        BLOCK_R=block_rows,
        BLOCK_N=block_outputs,
        BLOCK_K=STEP,
        num_warps=4 if block_rows <= FEW_ROWS else 8,
        num_stages=3,
    )
    if apart:
        launch(
            module.add_whole_segments,
            (-(-outputs // 256), rows),
            sums,
            row_scales_R,
            scales_N,
            y,
            rows,
            OUTPUTS=outputs,
            SEGMENTS=segments,
            BLOCK=256,
            num_warps=2,
        )
    return y
