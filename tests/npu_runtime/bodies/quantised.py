"""Quantised products, and the quantisation of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.npu_runtime.bodies.calling import body, in_nz, require, undefined

NARROW = (torch.float16, torch.bfloat16)
WIDEST = 65535
QINT8, QUINT4X2 = 12, 16
"""torch's numbers of quantised dtypes."""
RESULTS = {None: torch.int8, 1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
"""torch's numbers of dtypes that the quantised product may return."""


def unpacked(words: Tensor) -> Tensor:
    """[..., 8 n] int8 of [..., n] int32: nibble i of word j is column 8 j + i, two's complement."""
    nibbles = torch.stack([(words >> (4 * place)) & 0xF for place in range(8)], dim=-1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def scale_values(scale: Tensor) -> Tensor:
    """float32 numbers whose bits lie in the low half of int64."""
    return scale.contiguous().view(torch.float32)[..., ::2].contiguous()


def antiquantised(weight: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(weight + offset) * scale, rounded to the dtype of the rows that it multiplies; in float32. Scales by column, or by column
    and group of inputs."""
    shifted = weight.float()
    if scale.dim() == 2 and scale.shape[0] > 1:
        require(weight.shape[0] % scale.shape[0] == 0 or scale.dim() == 2, "groups of inputs")
        size = -(-weight.shape[0] // scale.shape[0])
        scale = scale.repeat_interleave(size, dim=0)[: weight.shape[0]]
        offset = None if offset is None else offset.repeat_interleave(size, dim=0)[: weight.shape[0]]
    shifted = shifted if offset is None else shifted + offset.float()
    return (shifted * scale.float()).to(dtype).float()


def quantised_rows(x: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Codes and scale of each row: its largest magnitude becomes `largest`. A row of zeros has scale 0 and codes that nobody
    defined."""
    scale = x.abs().amax(-1) / largest
    codes = (x / scale[..., None]).round()
    return torch.where((scale > 0)[..., None], codes, undefined(x.shape, torch.int8).float()).to(torch.int8), scale


@body("npu_dynamic_quant", kernels=("aclnnDynamicQuant", "aclnnDynamicQuantV2", "aclnnDynamicQuantV4"), chips=("A2", "A3"))
def dynamic_quant(a: Any) -> tuple[Tensor, Tensor]:
    require(a.input.dtype in NARROW, "input of 16 bits")
    require(a.input.dim() >= 2 and a.input.numel() > 0, "two dimensions or more, not empty")
    require(a.dst_type in (None, 1, QUINT4X2) and a.quant_mode == "pertoken", "no body but int8 and packed 4 bits by row")
    x = a.input.float()
    if a.smooth_scales is not None:
        require(a.smooth_scales.dtype == a.input.dtype, "smooth_scales in the dtype of input")
        x = x * _smooth(a, x)
    if a.dst_type == QUINT4X2:
        require(x.shape[-1] % 8 == 0, "a last dimension in whole 8s")
        codes, scale = quantised_rows(x, largest=7)
        return packed(codes), scale
    return quantised_rows(x)


def _smooth(a: Any, x: Tensor) -> Tensor:
    if a.group_index is None:
        return a.smooth_scales.float()
    ends = a.group_index.tolist()
    counts = torch.tensor([end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    require(ends == sorted(ends) and ends[-1] == x.numel() // x.shape[-1], "group_index that ends at the last row")
    return a.smooth_scales.float().repeat_interleave(counts, dim=0).view_as(x)


def packed(codes: Tensor) -> Tensor:
    """[..., n] int32 of [..., 8 n] codes of 4 bits: the inverse of `unpacked`."""
    nibbles = codes.unflatten(-1, (-1, 8)).long() & 0xF
    words = sum(nibbles[..., place] << (4 * place) for place in range(8))
    return ((words + 2**31) % 2**32 - 2**31).to(torch.int32)


@body("npu_quantize", kernels=("aclnnAscendQuant", "aclnnAscendQuantV3"))
def quantize(a: Any) -> Tensor:
    require(not a.div_mode and a.axis >= -1, "no body but multiplication along the last axis")
    require(not in_nz(a.input), "no body for FRACTAL_NZ")
    require(a.dtype in (torch.qint8, torch.quint4x2, QINT8, QUINT4X2), "results of int8 or packed 4 bits")
    scaled = a.input.float() * a.scales.float()
    codes = (scaled if a.zero_points is None else scaled + a.zero_points.float()).round()
    if a.dtype in (torch.qint8, QINT8):
        return codes.clamp(-128, 127).to(torch.int8)
    return packed(codes.clamp(-8, 7))


_NOTHING, _WHOLE, _EITHER = (None,), (torch.int32, None), (torch.int32, torch.bfloat16, torch.float32, None)
_ENCODED, _WIDE = (torch.int64, torch.float32), (torch.float32, torch.bfloat16)
COMBINATIONS = (
    (_ENCODED, _NOTHING, _WHOLE, _NOTHING, (torch.float16,)),
    (_ENCODED, (torch.float32, None), _WHOLE, _NOTHING, (torch.int8,)),
    (_WIDE, _NOTHING, _EITHER, (torch.float32, None), (torch.bfloat16,)),
    ((torch.float32,), _NOTHING, _EITHER, (torch.float32,), (torch.float16,)),
    (_WIDE, _NOTHING, _WHOLE, _NOTHING, (torch.int32,)),
)
PACKED_COMBINATIONS = (
    (_ENCODED, _NOTHING, _WHOLE, _NOTHING, (torch.float16,)),
    ((torch.float32,), (torch.float16, None), _NOTHING, (torch.float32,), (torch.bfloat16, torch.float16)),
)
"""Table 2 of the page of npu_quant_matmul: dtypes of (scale, offset, bias, pertoken_scale, result) that go together, for int8 and
for packed 4 bits."""


def unpacked_right(left: Tensor, right: Tensor) -> Tensor:
    """[inputs, outputs] of packed 4 bits: eight outputs a word, or eight inputs a word in a matrix that is seen transposed."""
    if right.shape[0] == 8 * left.shape[-1]:
        require(right.is_contiguous(), "packed x2 without gaps")
        return unpacked(right)
    require(right.shape[0] == left.shape[-1] and right.t().is_contiguous(), "packed x2 [k, n / 8], or [k / 8, n] transposed")
    return unpacked(right.t()).t()


@body("npu_trans_quant_param", kernels=("aclnnTransQuantParamV2", "aclnnTransQuantParamV3"))
def trans_quant_param(a: Any) -> Tensor:
    require(not a.round_mode, "no body but cut scales")
    scale = encoded_scale(a.scale)
    if a.offset is None:
        return scale
    offset = a.offset.float().round().clamp(-256, 255).long() & 0x1FF
    return (scale & 0x4000FFFFFFFF) | (offset << 37)


def encoded_scale(scale: Tensor) -> Tensor:
    """float32 cut to 19 bits, in the low half of int64; bit 46 marks the form."""
    return (scale.float().contiguous().view(torch.int32).long() & 0xFFFFE000) | 1 << 46


@body(
    "npu_quant_matmul",
    kernels=(
        *("aclnnQuantMatmulV3", "aclnnQuantMatmulV4", "aclnnQuantMatmulV5", "aclnnQuantMatmulWeightNz"),
        *("aclnnTransQuantParamV2", "aclnnTransQuantParamV3"),  # the front end encodes float32 scales of float16 results itself
    ),
    chips=("A2", "A3"),
)
def quant_matmul(a: Any) -> Tensor:
    require(a.x1.dtype == a.x2.dtype and a.x1.dtype in (torch.int8, torch.int32), "x1 and x2 of int8, or both packed")
    require(all(t.numel() > 0 for t in (a.x1, a.x2, a.scale)), "no empty tensors")
    require(a.x1.shape[-1] <= WIDEST and a.x2.shape[-1] <= WIDEST, "last dimensions of 65535 at most")
    require(a.scale.dtype in (torch.float32, torch.bfloat16, torch.int64) and a.scale.dim() == 1, "scale of one dimension")
    require(a.output_dtype in RESULTS and not a.group_sizes and a.y_scale is None, "a result with a body")
    dtype = RESULTS[a.output_dtype]
    require(dtype != torch.bfloat16 or a.scale.dtype != torch.int64, "scale of float32 or bfloat16 for results of bfloat16")
    given = (a.scale.dtype, *(None if t is None else t.dtype for t in (a.offset, a.bias, a.pertoken_scale)), dtype)
    table = PACKED_COMBINATIONS if a.x1.dtype == torch.int32 else COMBINATIONS
    require(any(all(one in allowed for one, allowed in zip(given, row, strict=True)) for row in table), f"dtypes {given}")
    left, right = (unpacked(a.x1), unpacked_right(a.x1, a.x2)) if a.x1.dtype == torch.int32 else (a.x1, a.x2)
    product, bias = left.double() @ right.double(), a.bias
    if bias is not None and bias.dtype == torch.int32:
        product, bias = product + bias.double(), None
    if dtype == torch.int32:
        return product.to(torch.int32)
    scale = (
        encoded_scale(a.scale)
        if dtype == torch.float16 and a.pertoken_scale is None and a.scale.dtype != torch.int64
        else a.scale
    )
    out = product.float() * (scale_values(scale) if scale.dtype == torch.int64 else scale.float())
    out = out if a.pertoken_scale is None else out * a.pertoken_scale[..., None]
    out = out if bias is None else out + bias.float()
    out = out if a.offset is None else out + a.offset.float()
    return out.round().clamp(-128, 127).to(torch.int8) if dtype == torch.int8 else out.to(dtype)


@body(
    "npu_weight_quant_batchmatmul",
    kernels=("aclnnWeightQuantBatchMatmulV2", "aclnnWeightQuantBatchMatmulV3", "aclnnWeightQuantBatchMatmulNz"),
    chips=("A2", "A3"),
)
def weight_quant_batchmatmul(a: Any) -> Tensor:
    weight = unpacked(a.weight) if a.weight.dtype == torch.int32 else a.weight
    inputs, outputs, group = *weight.shape, a.antiquant_group_size
    require(a.x.dim() == 2 and a.x.dtype in NARROW, "x of two dimensions and 16 bits")
    require(weight.dtype == torch.int8 and a.x.shape[1] == inputs, "weight of int8 or packed int32, as deep as x")
    require(inputs <= WIDEST and outputs <= WIDEST and a.inner_precise in (0, 1), "65535 inputs and outputs at most")
    require(group == 0 or (32 <= group <= inputs - 1 and group % 32 == 0), "groups of 32 to inputs - 1 in whole 32s, or 0")
    require(a.antiquant_scale.dtype == a.x.dtype, "antiquant_scale in the dtype of x")
    scale = a.antiquant_scale.reshape(-1, outputs) if a.antiquant_scale.numel() > 1 else a.antiquant_scale
    require(group == 0 or scale.shape == (-(-inputs // group), outputs), "a scale for each group of inputs")
    offset = None if a.antiquant_offset is None else a.antiquant_offset.reshape(scale.shape)
    require(a.quant_scale is None and a.quant_offset is None, "no body with a quantised result")
    if group:
        decoded = antiquantised(weight, *(_by_input(t, group, inputs) for t in (scale, offset)), a.x.dtype)
    else:
        decoded = antiquantised(weight, scale, offset, a.x.dtype)
    require(a.bias is None or a.bias.dtype == (torch.float32 if a.x.dtype == torch.bfloat16 else torch.float16), "bias dtype")
    out = a.x.float() @ decoded
    return (out if a.bias is None else out + a.bias.float()).to(a.x.dtype)


def _by_input(values: Tensor | None, group: int, inputs: int) -> Tensor | None:
    return None if values is None else values.repeat_interleave(group, dim=0)[:inputs]


@body("npu_dequant_swiglu_quant", kernels=("aclnnDequantSwigluQuant", "aclnnDequantSwigluQuantV2"), chips=("A2", "A3"))
def dequant_swiglu_quant(a: Any) -> tuple[Tensor, Tensor]:
    tokens, half = a.x.shape[0], a.x.shape[1] // 2
    require(a.x.dim() == 2 and a.x.dtype in (torch.int32, *NARROW) and a.x.shape[1] % 2 == 0, "x [tokens, 2 H]")
    require(a.swiglu_mode in (0, 1, 2) and a.dst_type in (None, 1), "swiglu_mode 0, 1 or 2, and no body but for int8")
    require(a.quant_mode == 1 and a.quant_offset is None, "no body but dynamic quantisation")
    is_whole = a.x.dtype == torch.int32
    require(is_whole or (a.bias is None and a.activation_scale is None), "bias and activation_scale for x of int32 only")
    require(a.bias is None or a.bias.dtype == torch.int32, "bias of int32")
    require(a.bias is None or a.group_index is None, "no bias with groups")
    x, rows = (a.x if a.bias is None else a.x + a.bias).float(), tokens
    if a.group_index is not None:
        require(half % 64 == 0 and half <= 10496, "whole 64s, 10496 at most, with groups")
        counts = a.group_index
        rows = int(counts.sum())
        require(rows <= tokens and counts.dtype == torch.int64, "counts of int64 that fit the rows")
        groups = torch.arange(counts.numel()).repeat_interleave(counts)
    else:
        groups = torch.zeros(rows, dtype=torch.long)
    x = x[:rows]
    if a.weight_scale is not None:
        require(a.weight_scale.dtype == torch.float32, "weight_scale of float32")
        x = x * a.weight_scale.reshape(-1, 2 * half)[groups]
    if is_whole:
        require(a.activation_scale is not None and a.activation_scale.dtype == torch.float32, "activation_scale of float32")
        x = x * a.activation_scale.reshape(-1, 1)[:rows]
    out = _activated(a, x)
    out = out if a.quant_scale is None else out * a.quant_scale.float().reshape(-1, half)[groups]
    codes, scale = undefined((tokens, half), torch.int8), undefined((tokens,), torch.float32)
    codes[:rows], scale[:rows] = quantised_rows(out)
    return codes, scale


def _activated(a: Any, x: Tensor) -> Tensor:
    """The three forms of swiglu: plain on halves, with limits on neighbours, with limits on halves."""
    if a.swiglu_mode == 1:
        gate, up = x[:, ::2], x[:, 1::2]
    else:
        gate, up = x.chunk(2, dim=-1) if a.activate_left else reversed(x.chunk(2, dim=-1))
    if a.swiglu_mode == 0:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=a.clamp_limit), up.clamp(-a.clamp_limit, a.clamp_limit)
    return gate * torch.sigmoid(a.glu_alpha * gate) * (up + a.glu_bias)
