"""Norms, rotation, activation, the product of each head, and the write into the cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.npu_runtime.bodies.calling import body, require

FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def normalised(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x times the reciprocal of its root mean square, times gamma; and that reciprocal. Both float32."""
    dims = tuple(range(-gamma.dim(), 0))
    reciprocal = torch.rsqrt(x.float().square().mean(dims, keepdim=True) + epsilon)
    return x.float() * reciprocal * gamma.float(), reciprocal


@body("npu_rms_norm", kernels=("aclnnRmsNorm",))
def rms_norm(a: Any) -> tuple[Tensor, Tensor]:
    require(a.input.dtype in FLOATING, "input of float16, bfloat16 or float32")
    require(a.gamma.dtype in (a.input.dtype, torch.float32), "gamma in the dtype of input, or float32")
    require(a.input.shape[-a.gamma.dim() :] == a.gamma.shape, "gamma in the shape of the last dimensions of input")
    y, reciprocal = normalised(a.input, a.gamma, a.epsilon)
    return y.to(a.input.dtype), reciprocal


@body("npu_add_rms_norm", kernels=("aclnnAddRmsNorm",))
def add_rms_norm(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    require(a.x1.dtype == a.x2.dtype == a.gamma.dtype, "one dtype")
    require(a.x1.numel() > 0, "no empty tensors")
    total = (a.x1.float() + a.x2.float()).to(a.x1.dtype)
    y, reciprocal = normalised(total, a.gamma, a.epsilon)
    return y.to(a.x1.dtype), reciprocal, total


@body("npu_swiglu", kernels=("aclnnSwiGlu",))
def swiglu(a: Any) -> Tensor:
    require(a.input.shape[a.dim] % 2 == 0, "an even dimension")
    first, second = a.input.float().chunk(2, dim=a.dim)
    return (F.silu(first) * second).to(a.input.dtype)


def swapped(x: Tensor, mode: str) -> Tensor:
    """(-b, a) for each pair (a, b): neighbours when interleaved, halves otherwise."""
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@body("npu_rotary_mul", kernels=("aclnnRotaryPositionEmbedding", "aclnnRotaryPositionEmbeddingV2"), chips=("A2", "A3"))
def rotary_mul(a: Any) -> Tensor:
    require(a.rotary_mode in ("half", "interleave"), "rotary_mode half or interleave")
    require(a.rotate is None, "no body with a rotation matrix")
    require(a.input.dim() in (3, 4) and a.r1.dim() == a.input.dim() and a.r1.shape == a.r2.shape, "as many dimensions")
    require(a.input.shape[-1] % 2 == 0 and a.input.shape[-1] == a.r1.shape[-1] <= 896, "an even width of 896 at most")
    x = a.input.float()
    return (x * a.r1.float() + swapped(x, a.rotary_mode) * a.r2.float()).to(a.input.dtype)


@body("npu_interleave_rope", kernels=("aclnnInterleaveRope",), chips=("A2", "A3"))
def interleave_rope(a: Any) -> Tensor:
    batch, _, length, width = a.x.shape
    require(width == 64 and a.cos.shape[-1] == 64, "a width of 64")
    require(a.cos.shape == a.sin.shape and a.cos.shape[0] == batch and a.cos.shape[1] == 1, "cos and sin [B, 1, S, 64]")
    require(a.cos.shape[2] in (1, length), "angles for each token, or one")
    require(a.x.dtype == a.cos.dtype == a.sin.dtype and a.x.dtype in FLOATING[:2], "one 16-bit dtype")
    return half_layout(a.x, a.cos, a.sin).to(a.x.dtype)


def half_layout(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring channels and writes all first members, then all second members. float32."""
    first_then_second = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1).float()
    return first_then_second * cos.float() + swapped(first_then_second, "half") * sin.float()


@body("npu_transpose_batchmatmul", kernels=("aclnnTransposeBatchMatMul", "aclnnTransposeBatchMatMulWeightNz"), chips=("A2", "A3"))
def transpose_batchmatmul(a: Any) -> Tensor:
    require(a.bias is None and a.scale is None, "no body with bias or scale")
    require(a.input.dtype == a.weight.dtype and a.input.dtype in FLOATING, "one floating dtype")
    first, second = a.perm_x1 or [0, 1, 2], a.perm_x2 or [0, 1, 2]
    require(list(first) in ([0, 1, 2], [1, 0, 2]), "perm_x1 should be [0, 1, 2] or [1, 0, 2]")
    require(list(second) == [0, 1, 2], "perm_x2 should be [0, 1, 2]")
    require(list(a.perm_y or [1, 0, 2]) == [1, 0, 2], "perm_y should be [1, 0, 2]")
    heads, inputs, outputs = a.weight.shape
    require(inputs % 16 == 0 and outputs % 16 == 0, "widths in whole 16s")
    require(inputs < 65536 and (list(first) == [0, 1, 2] or inputs * heads < 65536), "rows of fewer than 65536 numbers")
    product = (a.input.permute(first).float() @ a.weight.float()).permute(1, 0, 2)
    split = a.batch_split_factor or 1
    if split > 1:
        tokens = product.shape[0]
        product = product.reshape(tokens, split, heads * outputs // split).transpose(0, 1)
    return product.to(a.input.dtype)


@body("npu_scatter_nd_update", kernels=("aclnnScatterNdUpdate",), chips=("A2", "A3"))
def scatter_nd_update(a: Any) -> Tensor:
    a.input = a.input.clone()
    scatter_nd_update_(a)
    return a.input


@body("npu_scatter_nd_update_", kernels=("aclnnScatterNdUpdate",), chips=("A2", "A3"))
def scatter_nd_update_(a: Any) -> None:
    depth = a.indices.shape[-1]
    require(a.indices.dim() >= 2 and depth <= a.input.dim(), "indices of two dimensions or more, no longer than input has")
    require(a.updates.shape == (*a.indices.shape[:-1], *a.input.shape[depth:]), "updates in the shape of what they replace")
    require(a.updates.dtype == a.input.dtype and a.indices.dtype in (torch.int32, torch.int64), "dtypes")
    allowed = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)
    require(a.input.dtype in allowed, "input of a documented dtype")
    places = a.indices.reshape(-1, depth).long()
    require(all(bool(((p >= 0) & (p < size)).all()) for p, size in zip(places.T, a.input.shape, strict=False)), "indices inside")
    a.input[tuple(places.T)] = a.updates.reshape(-1, *a.input.shape[depth:])


@body("_npu_dtype_cast", kernels=("aclnnCast",))
def dtype_cast(a: Any) -> Tensor:
    """What torch's softmax casts with when a wider result is asked for."""
    return a.input.to(a.dtype)
