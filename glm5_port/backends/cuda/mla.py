"""Triton prologues of attention and indexer: products by cuBLAS, and one kernel for what stands between a product and the cache.

The norm of the latent, the rotation of its rope key and the write into the cache are one kernel, and so are the LayerNorm and the
rotation of an index key: in decoding each of these takes less time than its launch.

Shape legend as in `glm5_port.operators.mla`; J index heads; X index head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.cuda.cache import Rotation, format_not_supported, into_cache, store_index, store_latent
from glm5_port.backends.cuda.norm import rms_norm_triton
from glm5_port.backends.cuda.rope import rotate_triton
from glm5_port.backends.cuda.triton_support import triton
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.indexer import indexer_prologue
from glm5_port.operators.mla import check_projection, mla_project, mla_prologue, mla_prologue_into_cache

_PROMISES = ("deterministic",)
"""cuBLAS chooses its kernel by the number of rows, so that a row alone may differ from the same row in a batch."""


class _Projected:
    """Queries of a call, and the rows [T, C + R] before their norm and rotation."""

    def __init__(
        self,
        hidden: Tensor,
        weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        eps: float,
        interleaved: bool,
        nope_dim: int,
    ) -> None:
        q_a, q_a_norm, q_b, kv_a, kv_a_norm = weights
        check_projection(hidden, q_a, q_b, kv_a, kv_a_norm, cos, nope_dim)
        head_dim = nope_dim + 2 * cos.shape[-1]
        self.residual = rms_norm_triton(F.linear(hidden, q_a), q_a_norm, eps)
        query = F.linear(self.residual, q_b).unflatten(-1, (q_b.shape[0] // head_dim, head_dim))
        self.nope = query[..., :nope_dim]
        self.rope = rotate_triton(query[..., nope_dim:], cos, sin, interleaved=interleaved, start=0)
        row = F.linear(hidden, kv_a)
        self.latent, self.rope_key = row[:, : kv_a_norm.shape[0]], row[:, kv_a_norm.shape[0] :]
        self.rotation = Rotation(kv_a_norm, None, eps, cos, sin, interleaved)

    def finished_row(self) -> tuple[Tensor, Tensor]:
        """(latent, rope_key), normalised and rotated."""
        latent, rope_key = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.latent, self.rope_key))
        store_latent(self.latent, self.rope_key, [latent[None], rope_key[None]], None, "plain", self.rotation)
        return latent, rope_key

    def absorbed(self, w_uk: Tensor) -> Tensor:
        """[T, H, C]: the nope part of the queries in the latent space."""
        return torch.bmm(self.nope.transpose(0, 1), w_uk).transpose(0, 1).contiguous()


@triton(mla_project, promises=_PROMISES)
def mla_project_triton(
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
    weights = q_a, q_a_norm, q_b, kv_a, kv_a_norm
    made = _Projected(hidden, weights, cos, sin, latent_norm_eps, rope_interleaved, nope_dim)
    return made.nope.contiguous(), made.rope, *made.finished_row(), made.residual


@triton(mla_prologue, promises=_PROMISES)
def mla_prologue_triton(
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
    weights = q_a, q_a_norm, q_b, kv_a, kv_a_norm
    made = _Projected(hidden, weights, cos, sin, latent_norm_eps, rope_interleaved, w_uk.shape[1])
    return made.absorbed(w_uk), made.rope, *made.finished_row(), made.residual


@triton(mla_prologue_into_cache, promises=_PROMISES, not_supported=format_not_supported)
def mla_prologue_into_cache_triton(
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
    weights = q_a, q_a_norm, q_b, kv_a, kv_a_norm
    made = _Projected(hidden, weights, cos, sin, latent_norm_eps, rope_interleaved, w_uk.shape[1])
    into_cache([made.latent, made.rope_key], latent_cache, slots, cache_format, made.rotation)
    return made.absorbed(w_uk), made.rope, made.residual


@triton(indexer_prologue, promises=_PROMISES)
def indexer_prologue_triton(
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
    query_TJX = F.linear(query_residual, wq_b).unflatten(1, (heads, head_dim))
    query_TJX = rotate_triton(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
    key_TX = torch.empty((hidden.shape[0], head_dim), dtype=hidden.dtype, device=hidden.device)
    rotation = Rotation(k_norm_weight, k_norm_bias, k_norm_eps, cos, sin, rope_interleaved)
    store_index(F.linear(hidden, wk), [key_TX[None]], None, "plain", rotation)
    head_weights_TJ = F.linear(hidden.float(), weights_proj.float()) * (heads * head_dim) ** -0.5
    return query_TJX, key_TX, head_weights_TJ
