"""Multi-head latent attention: projections, the dense attention in both forms, and the output projection.

Shape legend: T tokens; D hidden size; H heads; Q query latent; C latent; N nope part of a head; R rope part; V value part;
B sequences; L positions that the block table covers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout, gather_rows, locate_tokens, slots_at, write_cache
from glm5_port.operators.norm import accumulation_dtype, rms_norm
from glm5_port.operators.rope import rotate
from glm5_port.operators.softmax import visible_softmax
from glm5_port.operators.sparse_attention import check_attention
from glm5_port.registry import LONG_SUMS

PROJECTION_WEIGHTS = ("q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm")
PROJECTION_FACTS: dict[str, Any] = {
    "width": lambda hidden, **_: hidden.shape[-1],
    "query_latent_dim": lambda q_a, **_: q_a.shape[0],
    "latent_dim": lambda kv_a_norm, **_: kv_a_norm.shape[0],
    "rope_dim": lambda cos, **_: 2 * cos.shape[-1],
    "rope_interleaved": lambda rope_interleaved, **_: rope_interleaved,
}
ATTENTION_FACTS: dict[str, Any] = {
    "heads": lambda query_rope, **_: query_rope.shape[1],
    "rope_dim": lambda query_rope, **_: query_rope.shape[2],
    "page_size": lambda latent_cache, **_: latent_cache[0].shape[1],
    "cache_format": lambda cache_format, **_: cache_format,
}


# -- projections -------------------------------------------------------------------------------------------------------


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T summed in the accumulation dtype and rounded once."""
    wide = accumulation_dtype(x)
    return F.linear(x.to(wide), weight.to(wide)).to(x.dtype)


def check_projection(
    hidden: Tensor, q_a: Tensor, q_b: Tensor, kv_a: Tensor, kv_a_norm: Tensor, cos: Tensor, nope_dim: int
) -> None:
    """Raises InputError unless the weights of the projections fit each other, the hidden rows and the angles."""
    rope_dim = 2 * cos.shape[-1]
    fits = (
        hidden.dim() == 2
        and q_a.shape[1] == kv_a.shape[1] == hidden.shape[1]
        and q_b.shape[1] == q_a.shape[0]
        and nope_dim > 0
        and q_b.shape[0] % (nope_dim + rope_dim) == 0
        and kv_a.shape[0] == kv_a_norm.shape[0] + rope_dim
        and cos.shape[0] == hidden.shape[0]
    )
    if not fits:
        raise InputError(
            f"mla projections: hidden {tuple(hidden.shape)}, q_a {tuple(q_a.shape)}, q_b {tuple(q_b.shape)}, kv_a "
            f"{tuple(kv_a.shape)}, kv_a_norm {tuple(kv_a_norm.shape)}, cos {tuple(cos.shape)}, nope part {nope_dim} do not fit\n"
            "  supported: hidden [T, D], q_a [Q, D], q_b [H * (N + R), Q], kv_a [C + R, D], kv_a_norm [C], cos [T, R / 2]"
        )


def _project_fake(hidden: Tensor, q_a: Tensor, q_b: Tensor, kv_a_norm: Tensor, cos: Tensor, nope_dim: int) -> tuple[Tensor, ...]:
    tokens, rope_dim = hidden.shape[0], 2 * cos.shape[-1]
    heads = q_b.shape[0] // (nope_dim + rope_dim)
    shapes = (
        (tokens, heads, nope_dim),
        (tokens, heads, rope_dim),
        (tokens, kv_a_norm.shape[0]),
        (tokens, rope_dim),
        (tokens, q_a.shape[0]),
    )
    return tuple(hidden.new_empty(shape) for shape in shapes)


@operator(
    facts={
        **PROJECTION_FACTS,
        "nope_dim": lambda nope_dim, **_: nope_dim,
        "heads": lambda q_b, cos, nope_dim, **_: q_b.shape[0] // (nope_dim + 2 * cos.shape[-1]),
    },
    fake=lambda hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin, *, latent_norm_eps, rope_interleaved, nope_dim: (
        _project_fake(hidden, q_a, q_b, kv_a_norm, cos, nope_dim)
    ),
    weights=PROJECTION_WEIGHTS,
    budget=LONG_SUMS,
)
def mla_project(
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
    """Projects hidden rows to queries and to the latent row that is cached; the expanded form's first step.

    query_residual = rms_norm(q_a x); q = q_b query_residual, per head [nope | rope]; [c | k] = kv_a x;
    latent = rms_norm(c); query_rope and rope_key = rotate(rope part), rope_key without a norm. Each named value is rounded
    to the working dtype; sums run in float32 (float64 for float64 inputs).

    Args:
        hidden: [T, D], the block's normalised input.
        q_a: [Q, D].
        q_a_norm: [Q].
        q_b: [H * (N + R), Q], rows head by head, nope before rope.
        kv_a: [C + R, D], rows latent before rope key.
        kv_a_norm: [C].
        cos: [T, R / 2], of `rotary_angles`.
        sin: [T, R / 2].
        latent_norm_eps: of both norms; Hugging Face uses 1e-6, the serving engines `rms_norm_eps` (1e-5).
        rope_interleaved: True for GLM-5.
        nope_dim: N.

    Returns:
        (query_nope [T, H, N], query_rope [T, H, R], latent [T, C], rope_key [T, R], query_residual [T, Q]), dtype of hidden.
        query_residual also feeds the indexer.

    Contract:
        Rows are independent. NaN stays in its row. No tokens: empty results. Deterministic.

    Raises:
        InputError: shapes that do not fit.

    Source: GLM-5 `GlmMoeDsaAttention`; DeepSeek-V2 for the form.
    """
    check_projection(hidden, q_a, q_b, kv_a, kv_a_norm, cos, nope_dim)
    rope_dim, latent_dim = 2 * cos.shape[-1], kv_a_norm.shape[0]
    query_residual = rms_norm.reference(_matmul(hidden, q_a), q_a_norm, latent_norm_eps)
    heads = q_b.shape[0] // (nope_dim + rope_dim)
    query = _matmul(query_residual, q_b).view(hidden.shape[0], heads, nope_dim + rope_dim)
    query_nope, query_rope = query.split([nope_dim, rope_dim], dim=-1)
    latent, rope_key = _matmul(hidden, kv_a).split([latent_dim, rope_dim], dim=-1)
    latent = rms_norm.reference(latent, kv_a_norm, latent_norm_eps)
    query_rope = rotate.reference(query_rope, cos, sin, interleaved=rope_interleaved, start=0)
    rope_key = rotate.reference(rope_key[:, None], cos, sin, interleaved=rope_interleaved, start=0)[:, 0]
    return query_nope.contiguous(), query_rope, latent, rope_key, query_residual


PROLOGUE_FACTS: dict[str, Any] = {
    **PROJECTION_FACTS,
    "heads": lambda w_uk, **_: w_uk.shape[0],
    "nope_dim": lambda w_uk, **_: w_uk.shape[1],
}


def _prologue_fake(hidden: Tensor, q_a: Tensor, q_b: Tensor, kv_a_norm: Tensor, w_uk: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
    _, *rest = _project_fake(hidden, q_a, q_b, kv_a_norm, cos, w_uk.shape[1])
    return hidden.new_empty(hidden.shape[0], w_uk.shape[0], w_uk.shape[2]), *rest


@operator(
    facts=PROLOGUE_FACTS,
    fake=lambda hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin, *, latent_norm_eps, rope_interleaved: _prologue_fake(
        hidden, q_a, q_b, kv_a_norm, w_uk, cos
    ),
    weights=(*PROJECTION_WEIGHTS, "w_uk"),
    budget=LONG_SUMS,
)
def mla_prologue(
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
    """`mla_project` with the nope part of the queries absorbed into the latent space.

    query_latent[t, h] = query_nope[t, h] @ w_uk[h]; the rest as `mla_project`.

    Args:
        hidden: as in `mla_project`, and so are q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin and the two options.
        w_uk: [H, N, C], the key half of kv_b, split by head.

    Returns:
        (query_latent [T, H, C], query_rope [T, H, R], latent [T, C], rope_key [T, R], query_residual [T, Q]), dtype of hidden.

    Contract:
        As `mla_project`.

    Raises:
        InputError: shapes that do not fit.

    Source: the absorbed form of DeepSeek-V2's paper, as the serving engines use it.
    """
    query_nope, query_rope, latent, rope_key, query_residual = mla_project.reference(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved, nope_dim=w_uk.shape[1],
    )  # fmt: skip
    wide = accumulation_dtype(hidden)
    query_latent = torch.einsum("thn,hnc->thc", query_nope.to(wide), w_uk.to(wide)).to(hidden.dtype)
    return query_latent, query_rope, latent, rope_key, query_residual


def _into_cache_fake(
    hidden: Tensor, q_a: Tensor, q_b: Tensor, kv_a_norm: Tensor, w_uk: Tensor, cos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    query_latent, query_rope, _, _, query_residual = _prologue_fake(hidden, q_a, q_b, kv_a_norm, w_uk, cos)
    return query_latent, query_rope, query_residual


@operator(
    facts={
        **PROLOGUE_FACTS,
        "page_size": lambda latent_cache, **_: latent_cache[0].shape[1],
        "cache_format": lambda cache_format, **_: cache_format,
    },
    fake=lambda hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin, latent_cache, slots, *, latent_norm_eps, rope_interleaved, cache_format: (  # noqa: E501
        _into_cache_fake(hidden, q_a, q_b, kv_a_norm, w_uk, cos)
    ),
    weights=(*PROJECTION_WEIGHTS, "w_uk"),
    mutates=("latent_cache",),
    budget=LONG_SUMS,
)
def mla_prologue_into_cache(
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
    """`mla_prologue` that writes the latent row straight into the paged cache: one operator, so that fused kernels fit.

    (query_latent, query_rope, latent, rope_key, query_residual) = mla_prologue(...); write_cache([latent, rope_key], ...).

    Args:
        hidden: as in `mla_prologue`, and so are the weights, cos, sin and the first two options.
        latent_cache: fields of the layout, each [pages, page_size, W]. Written.
        slots: [T] int64, as in `write_cache`; -1 is not written.
        cache_format: name of a latent `CacheLayout`.

    Returns:
        (query_latent [T, H, C], query_rope [T, H, R], query_residual [T, Q]), dtype of hidden.

    Contract:
        As `mla_prologue` and `write_cache`. An implementation may quantise the unrounded latent.

    Raises:
        InputError: shapes that do not fit, unknown cache_format, or widths that the layout cannot store.

    Source: composition; fused as in `npu_mla_prolog_v3`.
    """
    query_latent, query_rope, latent, rope_key, query_residual = mla_prologue.reference(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved,
    )  # fmt: skip
    write_cache.reference([latent, rope_key], latent_cache, slots, cache_format=cache_format)
    return query_latent, query_rope, query_residual


# -- dense attention ---------------------------------------------------------------------------------------------------


def _rows_of_sequence(
    latent_cache: list[Tensor], block_table: Tensor, lengths: Tensor, sequence: int, cache_format: str, dtype: torch.dtype
) -> list[Tensor]:
    """[latent [L, C], rope_key [L, R]] of one sequence, zeros beyond its length."""
    page_size = latent_cache[0].shape[1]
    positions = torch.arange(block_table.shape[1] * page_size, device=block_table.device)
    slots = slots_at(block_table, torch.full_like(positions[0], sequence), positions, page_size)
    unwritten = positions >= lengths[sequence]
    rows = gather_rows(cache_layout(LATENT, cache_format), latent_cache, slots, dtype)
    return [row.masked_fill(unwritten[:, None], 0.0) for row in rows]


def _causal(positions: Tensor, keys: int) -> Tensor:
    """[T, 1, L]: which keys of its own sequence each token sees."""
    return (torch.arange(keys, device=positions.device) <= positions[:, None])[:, None, :]


@operator(
    facts={
        **ATTENTION_FACTS,
        "nope_dim": lambda query_nope, **_: query_nope.shape[2],
        "value_dim": lambda w_uv, **_: w_uv.shape[1],
        "latent_dim": lambda w_uk, **_: w_uk.shape[2],
    },
    fake=lambda query_nope, query_rope, latent_cache, w_uk, w_uv, block_table, query_starts, lengths, *, scale, cache_format: (
        query_nope.new_empty(*query_nope.shape[:2], w_uv.shape[1])
    ),
    weights=("w_uk", "w_uv"),
    budget=LONG_SUMS,
)
def mla_attention_expanded(
    query_nope: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    cache_format: str,
) -> Tensor:
    """Dense causal attention on keys and values expanded from the latent: the cheaper form for long prefills.

    key[u, h] = [w_uk[h] latent[u] | rope_key[u]]; value[u, h] = w_uv[h] latent[u];
    out[t, h] = sum over u <= position of t of softmax_u(scale * query[t, h] . key[u, h]) value[u, h]. All in float32 (float64
    for float64 inputs), rounded once; an implementation may round keys, values and weights to the working dtype.

    Args:
        query_nope: [T, H, N], of `mla_project`.
        query_rope: [T, H, R], rotated.
        latent_cache: fields of the layout, each [pages, page_size, W].
        w_uk: [H, N, C].
        w_uv: [H, V, C].
        block_table: [B, N] int32, page ids; entries beyond a sequence's pages may be anything. Its width bounds the positions
            that are considered, and the cost.
        query_starts: [B + 1] int32; tokens at or beyond the last are padding.
        lengths: [B] int32, cached tokens a sequence, this call's included.
        scale: multiplies the scores; GLM-5: 256^-0.5.
        cache_format: name of a latent `CacheLayout`.

    Returns:
        [T, H, V] in the dtype of query_nope.

    Contract:
        Token at position p sees keys 0 .. p of its own sequence. Padding gives zeros. Cached rows at or beyond a sequence's
        length never reach the result, whatever they hold; NaN in a row below the length may reach every token of that
        sequence, and no other sequence. Equal to `mla_attention_absorbed` followed by w_uv in exact arithmetic. Sequences are
        independent. No tokens: an empty result. Deterministic.

    Raises:
        InputError: unknown cache_format, or shapes that do not fit.

    Source: GLM-5 `GlmMoeDsaAttention` (Hugging Face computes this form); DeepSeek-V2.
    """
    check_attention(query_nope, query_rope, latent_cache, block_table, query_starts, lengths)
    wide = accumulation_dtype(query_nope)
    sequences, positions = locate_tokens(query_starts, lengths, query_nope.shape[0])
    out = query_nope.new_zeros(*query_nope.shape[:2], w_uv.shape[1], dtype=wide)
    for sequence in range(lengths.shape[0]):
        latent, rope_key = _rows_of_sequence(latent_cache, block_table, lengths, sequence, cache_format, wide)
        key_nope = torch.einsum("uc,hnc->uhn", latent, w_uk.to(wide))
        value = torch.einsum("uc,hvc->uhv", latent, w_uv.to(wide))
        scores = torch.einsum("thn,uhn->thu", query_nope.to(wide), key_nope)
        scores = scores + torch.einsum("thr,ur->thu", query_rope.to(wide), rope_key)
        weights = visible_softmax(scores * scale, _causal(positions, latent.shape[0]))
        attended = torch.einsum("thu,uhv->thv", weights, value)
        is_own = (sequences == sequence) & (positions >= 0)  # padding counts as sequence 0 and keeps its zeros
        out = torch.where(is_own[:, None, None], attended, out)
    return out.to(query_nope.dtype)


@operator(
    facts={**ATTENTION_FACTS, "latent_dim": lambda query_latent, **_: query_latent.shape[2]},
    fake=lambda query_latent, *_, **__: query_latent.new_empty(query_latent.shape),
    budget=LONG_SUMS,
)
def mla_attention_absorbed(
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
    """Dense causal attention in the latent space, one key for all heads: the cheaper form for decoding.

    out[t, h] = sum over u <= position of t of softmax_u(scale * (query_latent[t, h] . latent[u] + query_rope[t, h] .
    rope_key[u])) latent[u], in float32 (float64 for float64 inputs), rounded once.

    Args:
        query_latent: [T, H, C], of `mla_prologue`.
        query_rope: as in `mla_attention_expanded`, and so are the others.

    Returns:
        [T, H, C] in the dtype of query_latent; `attention_output` takes it from here.

    Contract:
        As `mla_attention_expanded`.

    Raises:
        InputError: unknown cache_format, or shapes that do not fit.

    Source: the absorbed form of DeepSeek-V2's paper, as the serving engines use it.
    """
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    wide = accumulation_dtype(query_latent)
    sequences, positions = locate_tokens(query_starts, lengths, query_latent.shape[0])
    out = query_latent.new_zeros(query_latent.shape, dtype=wide)
    for sequence in range(lengths.shape[0]):
        latent, rope_key = _rows_of_sequence(latent_cache, block_table, lengths, sequence, cache_format, wide)
        scores = torch.einsum("thc,uc->thu", query_latent.to(wide), latent)
        scores = scores + torch.einsum("thr,ur->thu", query_rope.to(wide), rope_key)
        weights = visible_softmax(scores * scale, _causal(positions, latent.shape[0]))
        attended = torch.einsum("thu,uc->thc", weights, latent)
        is_own = (sequences == sequence) & (positions >= 0)  # padding counts as sequence 0 and keeps its zeros
        out = torch.where(is_own[:, None, None], attended, out)
    return out.to(query_latent.dtype)


# -- output ------------------------------------------------------------------------------------------------------------


@operator(
    facts={
        "heads": lambda w_uv, **_: w_uv.shape[0],
        "value_dim": lambda w_uv, **_: w_uv.shape[1],
        "latent_dim": lambda w_uv, **_: w_uv.shape[2],
        "width": lambda o, **_: o.shape[0],
    },
    fake=lambda latent_out, w_uv, o: latent_out.new_empty(latent_out.shape[0], o.shape[0]),
    weights=("w_uv", "o"),
    budget=LONG_SUMS,
)
def attention_output(latent_out: Tensor, w_uv: Tensor, o: Tensor) -> Tensor:
    """Takes latent attention results to hidden rows: per head out of the latent space, then the output projection.

    value[t, h] = w_uv[h] latent_out[t, h], rounded to the working dtype; y[t] = o . concatenation over h of value[t, h]. Sums
    run in float32 (float64 for float64 inputs).

    Args:
        latent_out: [T, H, C], of `mla_attention_absorbed` or `sparse_mla_attention`.
        w_uv: [H, V, C], the value half of kv_b, split by head.
        o: [D, H * V].

    Returns:
        [T, D] in the dtype of latent_out.

    Contract:
        Rows are independent. NaN stays in its row. No tokens: an empty result. Deterministic.

    Raises:
        InputError: shapes that do not fit.

    Source: GLM-5 `kv_b_proj` (value rows) and `o_proj`.
    """
    check_output(latent_out, w_uv, o)
    wide = accumulation_dtype(latent_out)
    value = torch.einsum("thc,hvc->thv", latent_out.to(wide), w_uv.to(wide)).to(latent_out.dtype)
    return _matmul(value.flatten(1), o)


def check_output(latent_out: Tensor, w_uv: Tensor, o: Tensor) -> None:
    """Raises InputError unless the attention result fits both weights."""
    fits = (
        latent_out.dim() == w_uv.dim() == 3
        and latent_out.shape[1:] == (w_uv.shape[0], w_uv.shape[2])
        and o.shape[1] == w_uv.shape[0] * w_uv.shape[1]
    )
    if not fits:
        raise InputError(
            f"attention_output: latent_out {tuple(latent_out.shape)}, w_uv {tuple(w_uv.shape)}, o {tuple(o.shape)} do not fit\n"
            "  supported: latent_out [T, H, C], w_uv [H, V, C], o [D, H * V]"
        )
