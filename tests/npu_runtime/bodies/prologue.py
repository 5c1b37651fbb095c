"""The projections of latent attention in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.npu_runtime.bodies.calling import body, in_nz, require
from tests.npu_runtime.bodies.small import half_layout, normalised

WIDTHS = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
ROPE, LATENT = 64, 512


def check(a: Any, heads: int, nope: int) -> None:
    """The documented rules for bfloat16 weights and caches."""
    require(a.weight_quant_mode == a.kv_cache_quant_mode == a.query_quant_mode == 0, "no body for quantised weights or caches")
    require(a.token_x.shape[-1] in WIDTHS, "a hidden width of 1024, 2048, ... 8192")
    require(a.weight_dq.shape[1] in (1536, 2048), "a query latent of 1536 or 2048")
    require(heads in POWERS and nope in (128, 192), "1, 2, 4, ... 128 heads with a nope part of 128 or 192")
    require(a.weight_uk.shape[2] == LATENT and a.rope_sin.shape[-1] == ROPE, "a latent of 512 and a rope part of 64")
    tensors = (a.token_x, a.weight_dq, a.weight_uq_qr, a.weight_uk, a.weight_dkv_kr, a.rmsnorm_gamma_cq, a.rmsnorm_gamma_ckv)
    require(all(t.dtype == torch.bfloat16 for t in (*tensors, a.rope_sin, a.rope_cos, a.kv_cache, a.kr_cache)), "bfloat16")
    require(all(in_nz(t) for t in (a.weight_dq, a.weight_uq_qr, a.weight_dkv_kr)), "the three large weights in FRACTAL_NZ")
    require(not in_nz(a.weight_uk), "weight_uk in ND")
    rest = (a.token_x, a.weight_uk, a.rmsnorm_gamma_cq, a.rmsnorm_gamma_ckv, a.rope_sin, a.rope_cos, a.kv_cache, a.kr_cache)
    require(all(t.is_contiguous() for t in rest), "contiguous tensors")
    require(a.rope_sin.shape == a.rope_cos.shape == (*a.token_x.shape[:-1], ROPE), "angles for each token")
    require(a.kv_cache.shape[-2:] == (1, LATENT) and a.kr_cache.shape[-2:] == (1, ROPE), "caches of one head, 512 and 64 wide")


def rows_of_cache(a: Any, tokens: int) -> Tensor:
    """Which row of the caches, seen as [rows, width], each token goes to."""
    require(a.cache_mode in ("PA_BSND", "TND", "BSND"), "no body for this cache_mode")
    available = a.kv_cache.numel() // LATENT
    if a.cache_mode != "PA_BSND":
        require(a.cache_index is None, "no cache_index where rows are not paged")
        require(available == tokens and a.kr_cache.numel() // ROPE == tokens, "a row of the cache for each token")
        return torch.arange(tokens)
    require(a.cache_index is not None and a.cache_index.dtype == torch.int64, "cache_index of int64")
    require(a.kv_cache.shape[1] % 16 == 0 and 16 <= a.kv_cache.shape[1] <= 1024, "pages of 16 to 1024 rows, whole 16s")
    rows = a.cache_index.reshape(-1)
    require(bool(((rows >= 0) & (rows < available)).all()), "cache_index inside the cache")
    require(rows.unique().numel() == rows.numel(), "rows of the cache that differ")
    return rows


@body("npu_mla_prolog_v3", kernels=("aclnnMlaPrologV3WeightNz",))
def mla_prolog_v3(a: Any) -> tuple[Tensor | None, ...]:
    heads, nope, _ = a.weight_uk.shape
    check(a, heads, nope)
    x = a.token_x.reshape(-1, a.token_x.shape[-1])
    tokens, leading, narrow = x.shape[0], a.token_x.shape[:-1], torch.bfloat16
    sin, cos = a.rope_sin.reshape(-1, ROPE), a.rope_cos.reshape(-1, ROPE)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.float() @ right.float()).to(narrow)

    query_norm = normalised(product(x, a.weight_dq), a.rmsnorm_gamma_cq, a.rmsnorm_epsilon_cq)[0].to(narrow)
    query = product(query_norm, a.weight_uq_qr).view(tokens, heads, nope + ROPE)
    absorbed = torch.einsum("thn,hnc->thc", query[..., :nope].float(), a.weight_uk.float()) * a.qc_qr_scale
    turned = half_layout(query[..., nope:], cos[:, None], sin[:, None]) * a.qc_qr_scale
    stored = product(x, a.weight_dkv_kr)
    latent = normalised(stored[:, :LATENT], a.rmsnorm_gamma_ckv, a.rmsnorm_epsilon_ckv)[0] * a.kc_scale
    rows = rows_of_cache(a, tokens)
    a.kv_cache.view(-1, LATENT)[rows] = latent.to(narrow)
    a.kr_cache.view(-1, ROPE)[rows] = half_layout(stored[:, LATENT:], cos, sin).to(narrow)
    return (
        absorbed.to(narrow).view(*leading, heads, LATENT),
        turned.to(narrow).view(*leading, heads, ROPE),
        None,
        query_norm.view(*leading, -1) if a.query_norm_flag else None,
        None,
    )
