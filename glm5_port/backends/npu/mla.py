"""Prologue and output of latent attention: npu_mla_prolog_v3 where its widths fit, else products, norms and rotation one by one.

npu_mla_prolog_v3 rotates neighbouring channels and writes all first members of the pairs, then all second ones. Here pairs stay
in place, so its rotated outputs are put back in order; that is why it writes rows of its own (cache_mode "TND"), which then go
into the pages by `write_cache`, and a token without a slot is left out there.

Shape legend as in `glm5_port.operators.mla`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu.attention import LATENT_512, POWER_OF_TWO_HEADS, ROPE_64
from glm5_port.backends.npu.cache import WRITABLE, write_cache_aclnn
from glm5_port.backends.npu.contracts.attention import MLA_PROLOG
from glm5_port.backends.npu.contracts.small import (
    FORMAT_CAST,
    RMS_NORM,
    ROTARY_MUL,
    SCATTER_ND_UPDATE,
    TRANSPOSE_BATCHMATMUL,
)
from glm5_port.backends.npu.linear import PRODUCT_DTYPES, Transposed, per_head_rules, product_per_head
from glm5_port.backends.npu.norm import rms_norm_aclnn
from glm5_port.backends.npu.nz import to_nz
from glm5_port.backends.npu.rope import both_channels, rotate_aclnn
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.mla import (
    PROJECTION_WEIGHTS,
    attention_output,
    check_projection,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
)

HIDDEN_WIDTHS = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
QUERY_LATENTS = (1536, 2048)
NOPE_WIDTHS = (128, 192)

_STEPS = Needs((RMS_NORM, ROTARY_MUL), (PRODUCT_DTYPES,))
_PER_HEAD = per_head_rules("nope_dim", "latent_dim")
_PROLOG_RULES = (
    dtype_among(torch.bfloat16),
    Rule(
        "hidden width",
        f"wants a hidden size of {', '.join(map(str, HIDDEN_WIDTHS))}, not {{width}}",
        lambda *, width, **_: width in HIDDEN_WIDTHS,
    ),
    Rule(
        "query latent",
        f"wants a query latent of {' or '.join(map(str, QUERY_LATENTS))}, not {{query_latent_dim}}",
        lambda *, query_latent_dim, **_: query_latent_dim in QUERY_LATENTS,
    ),
    Rule(
        "nope width",
        f"wants a nope part of {' or '.join(map(str, NOPE_WIDTHS))}, not {{nope_dim}}",
        lambda *, nope_dim, **_: nope_dim in NOPE_WIDTHS,
    ),
    LATENT_512,
    ROPE_64,
    POWER_OF_TWO_HEADS,
    Rule("rotation", "rotates neighbouring channels only", lambda *, rope_interleaved, **_: rope_interleaved),
)


# -- step by step --------------------------------------------------------------------------------------------------------


@aclnn(mla_project, _STEPS)
def mla_project_aclnn(
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
    query_residual = rms_norm_aclnn(F.linear(hidden, q_a), q_a_norm, latent_norm_eps)
    query = F.linear(query_residual, q_b).unflatten(-1, (q_b.shape[0] // (nope_dim + rope_dim), nope_dim + rope_dim))
    query_rope = rotate_aclnn(query[..., nope_dim:], cos, sin, interleaved=rope_interleaved, start=0)
    latent, rope_key = F.linear(hidden, kv_a).split([latent_dim, rope_dim], dim=-1)
    latent = rms_norm_aclnn(latent, kv_a_norm, latent_norm_eps)
    rope_key = rotate_aclnn(rope_key[:, None], cos, sin, interleaved=rope_interleaved, start=0)[:, 0]
    return query[..., :nope_dim].contiguous(), query_rope, latent, rope_key, query_residual


def _absorbed(query_nope: Tensor, w_uk: Tensor) -> Tensor:
    """Queries [T, H, N] into the latent space: w_uk [H, N, C] is laid out as the vendor's product reads it."""
    if query_nope.shape[0] == 0:
        return query_nope.new_empty((0, w_uk.shape[0], w_uk.shape[2]))
    return product_per_head(query_nope, w_uk)


@aclnn(mla_prologue, Needs((*_STEPS.uses, TRANSPOSE_BATCHMATMUL), _PER_HEAD), variant="aclnn_steps", rank=150)
def mla_prologue_steps(
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
    query_nope, *rest = mla_project_aclnn(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved, nope_dim=w_uk.shape[1],
    )  # fmt: skip
    query_rope, latent, rope_key, query_residual = rest
    return _absorbed(query_nope, w_uk), query_rope, latent, rope_key, query_residual


@aclnn(
    mla_prologue_into_cache,
    Needs((*_STEPS.uses, TRANSPOSE_BATCHMATMUL, SCATTER_ND_UPDATE), (*_PER_HEAD, WRITABLE)),
    variant="aclnn_steps",
    rank=150,
)
def mla_prologue_into_cache_steps(
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
    query_latent, query_rope, latent, rope_key, query_residual = mla_prologue_steps(
        hidden, q_a, q_a_norm, q_b, kv_a, kv_a_norm, w_uk, cos, sin,
        latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved,
    )  # fmt: skip
    write_cache_aclnn([latent, rope_key], latent_cache, slots, cache_format=cache_format)
    return query_latent, query_rope, query_residual


# -- in one kernel -------------------------------------------------------------------------------------------------------


class PrologWeights:
    """Preparation for npu_mla_prolog_v3: the three projections transposed to [in, out] and cast to the blocked format, one after
    the other, so that only one exists twice."""

    MATRICES = {"q_a": "weight_dq", "q_b": "weight_uq_qr", "kv_a": "weight_dkv_kr"}  # noqa: RUF012 - never changed

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is not None:
            raise InputError(f"mla_prologue on npu: part {part} arrived, but this operator takes its weights whole")
        for name, theirs in self.MATRICES.items():
            self._tensors[theirs] = to_nz(tensors[name].t().contiguous())
        self._tensors["weight_uk"] = tensors["w_uk"].contiguous()
        self._tensors["gamma_cq"] = tensors["q_a_norm"].to(torch.bfloat16).contiguous()
        self._tensors["gamma_ckv"] = tensors["kv_a_norm"].to(torch.bfloat16).contiguous()

    def finish(self) -> dict[str, Tensor | int]:
        if not self._tensors:
            raise InputError(f"weights missing: {', '.join((*PROJECTION_WEIGHTS, 'w_uk'))}")
        return dict(self._tensors)


def _pairs_in_place(halves: Tensor) -> Tensor:
    """First members, then second members of the pairs -> each pair together."""
    return halves.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _fake_prologue(hidden: Tensor, cos: Tensor, sin: Tensor, **others: Any) -> tuple[Tensor, ...]:
    heads, _, latent = others["weight_uk"].shape
    tokens, rope = hidden.shape[0], 2 * cos.shape[-1]
    shapes = (
        (tokens, heads, latent),
        (tokens, heads, rope),
        (tokens, latent),
        (tokens, rope),
        (tokens, others["gamma_cq"].shape[0]),
    )
    return tuple(hidden.new_empty(shape) for shape in shapes)


@aclnn(mla_prologue, Needs((MLA_PROLOG, FORMAT_CAST), _PROLOG_RULES), prepare=PrologWeights, fake=_fake_prologue)
def mla_prologue_aclnn(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    latent_norm_eps: float,
    rope_interleaved: bool,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The angles become bfloat16, as the vendor wants them and Hugging Face has them."""
    tokens, latent_dim, rope_dim = hidden.shape[0], weight_uk.shape[2], 2 * cos.shape[-1]
    if tokens == 0:
        query_latent, query_rope, latent, rope_key, query_residual = _fake_prologue(
            hidden, cos, sin, weight_uk=weight_uk, gamma_cq=gamma_cq
        )
        return query_latent, query_rope, latent, rope_key, query_residual
    latent = hidden.new_zeros((tokens, 1, latent_dim))
    rope_key = hidden.new_zeros((tokens, 1, rope_dim))
    query_latent, query_rope, _, query_residual, _ = call(
        MLA_PROLOG,
        hidden.contiguous(),
        weight_dq,
        weight_uq_qr,
        weight_uk,
        weight_dkv_kr,
        gamma_cq,
        gamma_ckv,
        both_channels(sin, interleaved=False).to(hidden.dtype),
        both_channels(cos, interleaved=False).to(hidden.dtype),
        latent,
        rope_key,
        rmsnorm_epsilon_cq=latent_norm_eps,
        rmsnorm_epsilon_ckv=latent_norm_eps,
        cache_mode="TND",
        query_norm_flag=True,
        weight_quant_mode=0,
        kv_cache_quant_mode=0,
    )
    return query_latent, _pairs_in_place(query_rope), latent.squeeze(1), _pairs_in_place(rope_key.squeeze(1)), query_residual


def _fake_into_cache(
    hidden: Tensor, cos: Tensor, sin: Tensor, latent_cache: list[Tensor], slots: Tensor, **others: Any
) -> tuple[Tensor, ...]:
    query_latent, query_rope, _, _, query_residual = _fake_prologue(hidden, cos, sin, **others)
    return query_latent, query_rope, query_residual


@aclnn(
    mla_prologue_into_cache,
    Needs((MLA_PROLOG, FORMAT_CAST, SCATTER_ND_UPDATE), (*_PROLOG_RULES, WRITABLE)),
    prepare=PrologWeights,
    fake=_fake_into_cache,
)
def mla_prologue_into_cache_aclnn(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: list[Tensor],
    slots: Tensor,
    *,
    latent_norm_eps: float,
    rope_interleaved: bool,
    cache_format: str,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    query_latent, query_rope, latent, rope_key, query_residual = mla_prologue_aclnn(
        hidden, cos, sin, latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved,
        weight_dq=weight_dq, weight_uq_qr=weight_uq_qr, weight_uk=weight_uk, weight_dkv_kr=weight_dkv_kr,
        gamma_cq=gamma_cq, gamma_ckv=gamma_ckv,
    )  # fmt: skip
    write_cache_aclnn([latent, rope_key], latent_cache, slots, cache_format=cache_format)
    return query_latent, query_rope, query_residual


# -- output --------------------------------------------------------------------------------------------------------------


def _output_weights(facts: Mapping[str, Any]) -> Transposed:
    return Transposed("w_uv", "o")


@aclnn(
    attention_output,
    Needs((TRANSPOSE_BATCHMATMUL,), per_head_rules("latent_dim", "value_dim")),
    prepare=_output_weights,
    fake=lambda latent_out, w_uv_transposed, o: latent_out.new_empty(latent_out.shape[0], o.shape[0]),
)
def attention_output_aclnn(latent_out: Tensor, w_uv_transposed: Tensor, o: Tensor) -> Tensor:
    heads, latent_dim, value_dim = w_uv_transposed.shape
    if latent_out.shape[1:] != (heads, latent_dim) or o.shape[1] != heads * value_dim:
        raise InputError(
            f"attention_output: latent_out {tuple(latent_out.shape)}, w_uv {(heads, value_dim, latent_dim)}, o {tuple(o.shape)} "
            "do not fit\n  supported: latent_out [T, H, C], w_uv [H, V, C], o [D, H * V]"
        )
    if latent_out.shape[0] == 0:
        return latent_out.new_empty((0, o.shape[0]))
    return F.linear(product_per_head(latent_out, w_uv_transposed).flatten(1), o)
