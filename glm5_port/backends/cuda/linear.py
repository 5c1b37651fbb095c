"""Triton linear, linear_per_head, gated_mlp and attention_output.

The portable implementations go first: they call cuBLAS, which chooses among kernels made for each card and shape. These are for
what cuBLAS does not promise, a row's result that does not depend on how many rows there are, and for chips without it:
`GLM5_PORT_OP_LINEAR=triton` asks for one of them, and `GLM5_PORT_STRICT=1`, which refuses what is portable, for all.

Shape legend: R rows of x; H heads; N, K outputs and inputs of a weight; F intermediate size; ... any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.matmul import FEW_ROWS, Tiles, add_segments, segments_of
from glm5_port.backends.cuda.triton_support import LARGE, dense, generation, kernels, launch, power_of_two, rows_of, triton
from glm5_port.errors import InputError
from glm5_port.operators.linear import gated_mlp, linear, linear_per_head
from glm5_port.operators.mla import attention_output, check_output

VENDOR = "what it calls is cuBLAS, which is faster; this one promises that a row does not depend on its batch"
MOST_HEADS = 65_535
"""Of the third dimension of a grid, which holds heads by segments; more than `matmul.PROGRAMS` of them only with one segment."""


def dense_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of products in floating point for so many rows of x, on which nothing but the rows of a tile depends: a sum is taken
    over the same inputs in the same order in all of them."""
    least = power_of_two(rows, least=16)
    if dtype == torch.float32:
        return Tiles(32, 16, 4, 3, inputs=32)
    if generation() == LARGE:
        return Tiles(64, min(least, 128), 4, 4, inputs=64)
    return Tiles(64, min(least, 64), 4, 3, inputs=64)


def check_product(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises InputError unless rows [..., K] fit a weight [N, K], or rows [R, H, K] a weight [H, N, K], of one dtype: a kernel
    would read beside them."""
    fits = x.shape[-1] == weight.shape[-1] and x.dtype == weight.dtype
    if weight.dim() == 3:
        fits = fits and x.dim() == 3 and x.shape[1] == weight.shape[0]
    if not fits:
        raise InputError(
            f"{name} on cuda: rows {tuple(x.shape)} {x.dtype} and a weight {tuple(weight.shape)} {weight.dtype} do not fit\n"
            "  supported: rows [..., in] and a weight [out, in], or rows [T, heads, in] and [heads, out, in], of one dtype"
        )


def products(x_RHK: Tensor, weight_HNK: Tensor) -> Tensor:
    """[R, H, N]: the rows of each head by its own weight. Up to 64 rows, segments of the inputs are summed by programs of their
    own; the order of all sums is the same beyond."""
    rows, heads, width = x_RHK.shape
    x_RHK, weight_HNK, outputs = dense(x_RHK), weight_HNK.detach(), weight_HNK.shape[1]
    shape = dense_tiles(rows, x_RHK.dtype)
    blocks = -(-outputs // shape.outputs)
    segment, segments = segments_of(-(-width // shape.inputs), heads * blocks)
    apart = segments > 1 and rows <= FEW_ROWS
    y_RHN = torch.empty((rows, heads, outputs), dtype=x_RHK.dtype, device=x_RHK.device)
    sums = torch.empty((segments, *y_RHN.shape), dtype=torch.float32, device=x_RHK.device) if apart else y_RHN
    launch(
        kernels("linear").dense_products,
        (blocks, -(-rows // shape.rows), heads * (segments if apart else 1)),
        x_RHK, weight_HNK, sums, rows, heads, *x_RHK.stride()[:2],
        weight_HNK.stride(1), weight_HNK.stride(0), weight_HNK.stride(2),
        OUTPUTS=outputs, WIDTH=width, SEGMENTS=1 if apart else segments, SEGMENT=segment,
        BLOCK_N=shape.outputs, BLOCK_R=shape.rows, BLOCK_K=shape.inputs, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if apart:
        add_segments(sums, y_RHN)
    return y_RHN


def _product(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """[..., N] of one weight [N, K]."""
    check_product(name, x, weight)
    return products(rows_of(x)[:, None], weight[None]).view(*x.shape[:-1], weight.shape[0])


def _heads_not_supported(*, heads: int, **_: Any) -> list[str]:
    return [f"takes at most {MOST_HEADS} heads, not {heads}"] if heads > MOST_HEADS else []


@triton(linear, yields=VENDOR)
def linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    return _product("linear", x, weight)


@triton(linear_per_head, yields=VENDOR, not_supported=_heads_not_supported)
def linear_per_head_triton(x: Tensor, weight: Tensor) -> Tensor:
    check_product("linear_per_head", x, weight)
    return products(x, weight)


@triton(gated_mlp, yields=VENDOR)
def gated_mlp_triton(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Gate and up as one product, silu and its product in a kernel of their own, the second product."""
    gate_up_R2F = _product("gated_mlp", rows_of(x), gate_up)
    rows, between = gate_up_R2F.shape[0], gate_up.shape[0] // 2
    between_RF = torch.empty((rows, between), dtype=x.dtype, device=x.device)
    block = min(power_of_two(between), 1024)
    launch(
        kernels("linear").gate_rows,
        (rows, -(-between // block)),
        gate_up_R2F,
        between_RF,
        WIDTH=between,
        BLOCK=block,
        num_warps=4,
    )
    return _product("gated_mlp", between_RF, down).view(*x.shape[:-1], down.shape[0])


@triton(attention_output, yields=VENDOR, not_supported=_heads_not_supported)
def attention_output_triton(latent_out: Tensor, w_uv: Tensor, o: Tensor) -> Tensor:
    """`linear_per_head`, then `linear`."""
    check_output(latent_out, w_uv, o)
    check_product("attention_output", latent_out, w_uv)
    value_THV = products(latent_out, w_uv)
    return _product("attention_output", value_THV.flatten(1), o)
