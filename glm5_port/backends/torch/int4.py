"""Portable quantised products. Weights are decoded a block of rows or an expert at a time, never as a whole.

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; C blocks taken at
once; B rows of a block; G groups of a row; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.torch.chunks import chunk_size, recomputed, spans, wants_gradient
from glm5_port.backends.torch.moe import combine, cut_into_blocks
from glm5_port.operators.int4 import (
    check_activation_groups,
    check_int4,
    expert_mlp_int4,
    expert_mlp_int4_w4a8,
    int4_dequantize,
    int4_matmul,
    int4_quantize,
    int8_matmul,
    quantize_rows,
)
from glm5_port.operators.linear import silu_and_multiply
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, dequantize_packed, groups_of, quantize_packed
from glm5_port.quant.packing import CODES_PER_WORD, unpack_int4
from glm5_port.registry import PORTABLE

EXACT_INPUTS = 1024
"""So many products of two 8-bit codes sum to less than 2^24, which float32 holds exactly, in any order; and every code is exact
in the narrower formats (TF32, bfloat16) that a device may multiply float32 in."""

_ROW_BY_ROW = ("deterministic", "batch_invariant", "thread_invariant")


@int4_quantize.implement(PORTABLE, variant="eager", promises=_ROW_BY_ROW)
def int4_quantize_eager(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor]:
    return quantize_packed(weight, Int4Rule(rule, group_size), check=False)


@int4_dequantize.implement(PORTABLE, variant="eager", promises=_ROW_BY_ROW)
def int4_dequantize_eager(packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    check_int4("int4_dequantize", packed, scales, group_size)
    return dequantize_packed(packed, scales)


# -- one product ---------------------------------------------------------------------------------------------------------


def _product_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 holds decoded weights as they are; float16 would not."""
    return x.dtype if x.dtype == torch.bfloat16 else accumulation_dtype(x)


def _project(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return F.linear(x, dequantize_packed(packed, scales).to(x.dtype))


@int4_matmul.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def int4_matmul_eager(x: Tensor, packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """Memory: WORKSPACE_BYTES for decoded rows; in training they are decoded again in the backward pass."""
    check_int4("int4_matmul", packed, scales, group_size)
    x_wide, gradient = x.to(_product_dtype(x)), wants_gradient(x)
    rows = chunk_size(packed.shape[1] * CODES_PER_WORD * (2 + x_wide.element_size()), packed.shape[0])
    pieces = [
        recomputed(_project, x_wide, packed[first:end], scales[first:end], gradient=gradient).to(x.dtype)
        for first, end in spans(packed.shape[0], rows)
    ]
    return torch.cat(pieces, dim=-1)


@int8_matmul.implement(PORTABLE, variant="eager", promises=_ROW_BY_ROW)
def int8_matmul_eager(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 products over stretches of `EXACT_INPUTS` inputs, summed as integers: exact on any device that multiplies
    float32, whether or not it multiplies integers."""
    codes, scales = quantize_rows(x)
    wide, out = accumulation_dtype(x), weight.shape[0]
    pieces = []
    for first, end in spans(out, chunk_size(4 * EXACT_INPUTS, out)):
        sums = torch.zeros((*x.shape[:-1], end - first), dtype=torch.int32, device=x.device)
        for start, stop in spans(x.shape[-1], EXACT_INPUTS):
            stretch = F.linear(codes[..., start:stop].to(torch.float32), weight[first:end, start:stop].to(torch.float32))
            sums += stretch.to(torch.int32)
        pieces.append((sums.to(wide) * (scales.to(wide) * weight_scale[first:end].to(wide))).to(x.dtype))
    return torch.cat(pieces, dim=-1)


# -- experts -------------------------------------------------------------------------------------------------------------


def _in_blocks(
    compute: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    ids: Tensor,
    route_weights: Tensor,
    weights: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Routed rows in blocks of one expert (`backends.torch.moe`), each with its expert decoded.

    Args:
        compute: (rows of the blocks, their experts, weights) -> [C, B, D].
        rows: tensors with a row per token; `compute` gets [C, B, ...] of each.
        weights: the four weight tensors of the operator.
        dtype: of the result.
    """
    gate_up_packed, _, down_packed, _ = weights
    cut = cut_into_blocks(ids, gate_up_packed.shape[0])
    decoded = max(gate_up_packed[0].numel(), down_packed[0].numel()) * CODES_PER_WORD
    chunk = chunk_size(decoded * (2 + max(rows[0].element_size(), 4)), cut.experts_S.shape[0])
    results = [torch.empty((0, *cut.tokens_SB.shape[1:], down_packed.shape[1]), dtype=dtype, device=ids.device)]
    for experts_C, tokens_CB in zip(cut.experts_S.split(chunk), cut.tokens_SB.split(chunk), strict=True):
        results.append(recomputed(compute, rows, tokens_CB, experts_C, weights, gradient=wants_gradient(*rows)).to(dtype))
    return combine(torch.cat(results).flatten(0, 1), cut.place_Tk, cut.used_Tk, route_weights, dtype)


def _by_expert(rows_CBI: Tensor, packed: Tensor, scales: Tensor, experts_C: Tensor) -> Tensor:
    """Rows by their blocks' experts, bf16(q * s)."""
    weight_COI = dequantize_packed(packed[experts_C], scales[experts_C]).to(rows_CBI.dtype)
    return rows_CBI @ weight_COI.transpose(1, 2)


def _compute_int4(rows: tuple[Tensor], tokens_CB: Tensor, experts_C: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    gate_up_packed, gate_up_scales, down_packed, down_scales = weights
    between_CBF = silu_and_multiply(_by_expert(rows[0][tokens_CB], gate_up_packed, gate_up_scales, experts_C))
    return _by_expert(between_CBF, down_packed, down_scales, experts_C)


@expert_mlp_int4.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def expert_mlp_int4_eager(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    gate_up_packed: Tensor,
    gate_up_scales: Tensor,
    down_packed: Tensor,
    down_scales: Tensor,
    *,
    group_size: int,
) -> Tensor:
    """Memory: up to 2 R rows of D elements for the results (and as many for joining them), and WORKSPACE_BYTES (one expert at
    least) for decoded experts. An expert is decoded once for each of its blocks. The block size depends on T, so a token's
    result may differ by rounding between batches."""
    check_int4("expert_mlp_int4, gate_up", gate_up_packed, gate_up_scales, group_size)
    check_int4("expert_mlp_int4, down", down_packed, down_scales, group_size)
    weights = (gate_up_packed, gate_up_scales, down_packed, down_scales)
    return _in_blocks(_compute_int4, (hidden.to(_product_dtype(hidden)),), ids, route_weights, weights, hidden.dtype)


def _codes_by_expert(
    codes_CBGI: Tensor, steps_CBG1: Tensor, packed: Tensor, scales: Tensor, experts_C: Tensor, wide: torch.dtype
) -> Tensor:
    """Quantised rows by their blocks' experts, q * s unrounded: one scale a row (G = 1), or one for each group of the weights."""
    weight_COI = unpack_int4(packed[experts_C]).to(wide)
    weight_COI.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[experts_C].to(wide).unsqueeze(-1))
    codes, steps = codes_CBGI.to(wide), steps_CBG1.to(wide)
    if codes.shape[2] == 1:
        return (codes.squeeze(2) @ weight_COI.transpose(1, 2)) * steps.squeeze(2)
    return (codes * steps).flatten(2) @ weight_COI.transpose(1, 2)


def _quantized(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes [..., G, I] and scales [..., G, 1] of groups of `size`; -1: of whole rows, G = 1."""
    return quantize_rows(x.unflatten(-1, (groups_of(x.shape[-1], size)[0], -1)))


def _compute_w4a8(
    rows: tuple[Tensor, Tensor, Tensor], tokens_CB: Tensor, experts_C: Tensor, weights: tuple[Tensor, ...], *, size: int
) -> Tensor:
    codes, steps, like = rows
    gate_up_packed, gate_up_scales, down_packed, down_scales = weights
    wide = accumulation_dtype(like)
    gate_up_CBF = _codes_by_expert(codes[tokens_CB], steps[tokens_CB], gate_up_packed, gate_up_scales, experts_C, wide)
    between = _quantized(silu_and_multiply(gate_up_CBF.to(like.dtype)), size)
    return _codes_by_expert(*between, down_packed, down_scales, experts_C, wide)


@expert_mlp_int4_w4a8.implement(PORTABLE, variant="eager", promises=("deterministic",))
def expert_mlp_int4_w4a8_eager(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    gate_up_packed: Tensor,
    gate_up_scales: Tensor,
    down_packed: Tensor,
    down_scales: Tensor,
    *,
    group_size: int,
    activation_group_size: int = PER_CHANNEL,
) -> Tensor:
    """Codes multiply in float32: under one scale a row, sums of one group are exact, as integers would be. Memory as
    `expert_mlp_int4_eager`."""
    check_activation_groups("expert_mlp_int4_w4a8", activation_group_size, group_size)
    check_int4("expert_mlp_int4_w4a8, gate_up", gate_up_packed, gate_up_scales, group_size)
    check_int4("expert_mlp_int4_w4a8, down", down_packed, down_scales, group_size)
    weights = (gate_up_packed, gate_up_scales, down_packed, down_scales)
    compute = partial(_compute_w4a8, size=activation_group_size)
    rows = (*_quantized(hidden, activation_group_size), hidden.detach())
    return _in_blocks(compute, rows, ids, route_weights, weights, hidden.dtype)
