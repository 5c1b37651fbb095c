"""Native prologues of attention and indexer: products, norms, rotation and the write into the cache by their own kernels.

Composed in Python: a product reads a hundred times the bytes of what stands between two of them, so that fusing these would save
nothing that shows.

Shape legend as in `glm5_port.operators.mla`; J index heads; X index head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5_port.backends.cpu.cache import write_cache_native
from glm5_port.backends.cpu.extension import MATRIX, native
from glm5_port.backends.cpu.matmul import linear_native
from glm5_port.backends.cpu.norm import normalise
from glm5_port.backends.cpu.rope import rotated
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.indexer import indexer_prologue
from glm5_port.operators.mla import check_projection, mla_project, mla_prologue, mla_prologue_into_cache


@native(indexer_prologue, isas=MATRIX)
def indexer_prologue_native(isa: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    linear = linear_native(isa)

    def run(
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
        query_TJX = linear(query_residual, wq_b).unflatten(1, (heads, head_dim))
        key_TX, _ = normalise(isa, linear(hidden, wk), k_norm_weight, k_norm_eps, bias=k_norm_bias)
        query_TJX = rotated(isa, query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
        key_TX = rotated(isa, key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
        head_weights_TJ = linear(hidden.float(), weights_proj.float()) * (heads * head_dim) ** -0.5
        return query_TJX, key_TX, head_weights_TJ

    return run


@native(mla_project, isas=MATRIX)
def mla_project_native(isa: int) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    linear = linear_native(isa)

    def run(
        hidden: Tensor,
        q_a: Tensor,
        q_a_norm: Tensor,
        q_b: Tensor,
        kv_a: Tensor,
        kv_a_norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        latent_norm_eps: float,
        rope_interleaved: bool,
        nope_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        check_projection(hidden, q_a, q_b, kv_a, kv_a_norm, cos, nope_dim)
        rope_dim, latent_dim = 2 * cos.shape[-1], kv_a_norm.shape[0]
        query_residual, _ = normalise(isa, linear(hidden, q_a), q_a_norm, latent_norm_eps)
        query = linear(query_residual, q_b).unflatten(-1, (q_b.shape[0] // (nope_dim + rope_dim), nope_dim + rope_dim))
        query_rope = rotated(isa, query[..., nope_dim:], cos, sin, interleaved=rope_interleaved, start=0)
        row = linear(hidden, kv_a)
        latent, _ = normalise(isa, row[:, :latent_dim], kv_a_norm, latent_norm_eps)
        rope_key = rotated(isa, row[:, None, latent_dim:], cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
        return query[..., :nope_dim].contiguous(), query_rope, latent, rope_key, query_residual

    return run


@native(mla_prologue, isas=MATRIX, promises=("deterministic",))
def mla_prologue_native(isa: int) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    project = mla_project_native(isa)

    def run(
        hidden: Tensor,
        q_a: Tensor,
        q_a_norm: Tensor,
        q_b: Tensor,
        kv_a: Tensor,
        kv_a_norm: Tensor,
        w_uk: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        latent_norm_eps: float,
        rope_interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        query_nope, *rest = project(
            hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin,
            latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved, nope_dim=w_uk.shape[1],
        )  # fmt: skip
        query_rope, latent, rope_key, query_residual = rest
        query_latent = torch.bmm(query_nope.transpose(0, 1), w_uk).transpose(0, 1).contiguous()
        return query_latent, query_rope, latent, rope_key, query_residual

    return run


def _layout_not_supported(*, cache_format: str, **_: object) -> list[str]:
    return [] if cache_format in ("plain", "fp8", "int8") else [f"writes latent caches plain, fp8 and int8, not {cache_format}"]


@native(mla_prologue_into_cache, isas=MATRIX, promises=("deterministic",), not_supported=_layout_not_supported)
def mla_prologue_into_cache_native(isa: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    prologue, write = mla_prologue_native(isa), write_cache_native(isa)

    def run(
        hidden: Tensor,
        q_a: Tensor,
        q_a_norm: Tensor,
        q_b: Tensor,
        kv_a: Tensor,
        kv_a_norm: Tensor,
        w_uk: Tensor,
        cos: Tensor,
        sin: Tensor,
        latent_cache: list[Tensor],
        slots: Tensor,
        *,
        latent_norm_eps: float,
        rope_interleaved: bool,
        cache_format: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache_layout(LATENT, cache_format).check_widths([kv_a_norm.shape[0], 2 * cos.shape[-1]])
        query_latent, query_rope, latent, rope_key, query_residual = prologue(
            hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin,
            latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved,
        )  # fmt: skip
        write([latent, rope_key], latent_cache, slots, cache_format=cache_format)
        return query_latent, query_rope, query_residual

    return run
