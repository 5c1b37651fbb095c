"""INT4 products by ONNX Runtime's kernels.

Both kernels multiply by q * s in float32, and the operators by bf16(q * s). `int4_matmul` adds what rounding changes: with
s = m 2^e and m in 128..255, q * s has at most 11 bits, so that bf16(q * s) = q * s + r 2^e with r in -4..4, which is an INT4
weight again. `expert_mlp_int4` leaves it out, since between its products there is no place for it, and takes bfloat16 activations
only, whose results are rounded as coarsely as the weights.

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; N, K outputs and inputs
of a weight; G groups of a row; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.onnxruntime.sessions import DOMAIN, Session, build, session_of
from glm5_port.backends.torch.chunks import chunk_size, spans
from glm5_port.errors import InputError
from glm5_port.operators.int4 import check_int4, expert_mlp_int4, int4_matmul
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4

BACKEND = "onnxruntime"
GROUP_SIZES = (16, 32, 64, 128, 256)


def _as_bytes(packed: Tensor) -> Tensor:
    """The same memory as bytes, two codes each: the layout of both kernels."""
    return packed.contiguous().view(torch.uint8)


def _group_reasons(group_size: int) -> list[str]:
    if group_size in GROUP_SIZES:
        return []
    return [f"group size {group_size} (ONNX Runtime takes {', '.join(map(str, GROUP_SIZES))})"]


# -- one product ---------------------------------------------------------------------------------------------------------


def matmul_not_supported(*, group_size: int, dtype: torch.dtype, **_: Any) -> list[str]:
    """Pure."""
    reasons = _group_reasons(group_size)
    if dtype == torch.float64:
        reasons.append("computes in float32; float64 activations want more")
    return reasons


def rounding_remainders(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """bf16(q * s) - q * s as an INT4 weight: canonical words [N, K / 8] and scales [N, G] float32, powers of two.

    Raises:
        InputError: bf16(q * s) overflows; no rule of this library makes such scales.
    """
    wide = scales.to(torch.float32)
    exponents = wide.nan_to_num(1.0).abs().clamp_min(2.0**-126).frexp().exponent - 8
    steps = torch.ldexp(torch.ones_like(wide, dtype=torch.float64), exponents)
    words = torch.empty_like(packed)
    for first, end in spans(packed.shape[0], chunk_size(packed.shape[1] * CODES_PER_WORD * 24, packed.shape[0])):
        codes = unpack_int4(packed[first:end]).unflatten(-1, (wide.shape[1], -1))
        products = codes.to(torch.float32) * wide[first:end, :, None]
        rounded = products.to(torch.bfloat16)
        if (rounded.isinf() & wide[first:end, :, None].isfinite()).any():
            raise InputError("int4_matmul on onnxruntime: scales so large that bf16(q * s) overflows")
        gap = (rounded.to(torch.float64) - products.to(torch.float64)) / steps[first:end, :, None]
        words[first:end] = pack_int4(gap.nan_to_num(0.0).to(torch.int8).flatten(-2))
    return words, steps.to(torch.float32)


class MatMulWeight:
    """Our bytes as they are with float32 scales, and the rounding of bf16(q * s) as a second weight: twice the memory of the
    canonical one, besides what the session keeps in its own layout."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._group_size = facts["group_size"]
        self._weights: dict[str, Tensor | int] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weight; `part` is None."""
        packed, scales = tensors["packed"], tensors["scales"]
        check_int4("int4_matmul", packed, scales, self._group_size)
        remainders, steps = rounding_remainders(packed, scales)
        self._weights = {
            "codes": _as_bytes(packed),
            "code_scales": scales.to(torch.float32).contiguous(),
            "remainders": _as_bytes(remainders),
            "steps": steps.contiguous(),
        }

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of `int4_matmul_nbits`."""
        if not self._weights:
            raise InputError("int4_matmul on onnxruntime: the weight never arrived")
        return self._weights


def _matmul_session(codes: Tensor, code_scales: Tensor, remainders: Tensor, steps: Tensor, group_size: int) -> Session:
    from onnx import helper

    rows, width = codes.shape[0], codes.shape[1] * 2
    shape: dict[str, Any] = {"K": width, "N": rows, "bits": 4, "block_size": group_size, "accuracy_level": 0}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "code_scales"], ["by_codes"], domain=DOMAIN, **shape),
        helper.make_node("MatMulNBits", ["finite_x", "remainders", "steps"], ["by_remainders"], domain=DOMAIN, **shape),
        helper.make_node("Add", ["by_codes", "by_remainders"], ["y"]),
    ]
    blocks = (rows, code_scales.shape[1], group_size // 2)
    weights = {
        "codes": codes.view(blocks),
        "code_scales": code_scales,
        "remainders": remainders.view(blocks),
        "steps": steps,
    }
    return build(nodes, {"x": width, "finite_x": width}, rows, weights)


def _fake_matmul(x: Tensor, *, group_size: int, codes: Tensor, code_scales: Tensor, remainders: Tensor, steps: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@int4_matmul.implement(
    BACKEND,
    variant="matmul_nbits",
    not_supported=matmul_not_supported,
    promises=("deterministic",),
    prepare=MatMulWeight,
    fake=_fake_matmul,
)
def int4_matmul_nbits(
    x: Tensor, *, group_size: int, codes: Tensor, code_scales: Tensor, remainders: Tensor, steps: Tensor
) -> Tensor:
    """Two `MatMulNBits` in float32 (accuracy level 0): by q * s, and by what rounding to bfloat16 adds. The second sees zeros
    for infinities, which by a remainder of 0 would give NaN."""
    session = session_of(codes, lambda: _matmul_session(codes, code_scales, remainders, steps, group_size))
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
    y = session.run({"x": rows, "finite_x": rows.nan_to_num(0.0, 0.0, 0.0)})
    return y.view(*x.shape[:-1], codes.shape[0]).to(x.dtype)


# -- experts -------------------------------------------------------------------------------------------------------------


def experts_not_supported(*, group_size: int, dtype: torch.dtype, experts: int, top_k: int, **_: Any) -> list[str]:
    """Pure."""
    reasons = _group_reasons(group_size)
    if dtype != torch.bfloat16:
        reasons.append(f"QMoE does not round q * s to bfloat16, which results in {str(dtype).removeprefix('torch.')} would show")
    if top_k > experts:
        reasons.append(f"{top_k} choices of {experts} experts (QMoE chooses each expert once)")
    return reasons


class ExpertWeights:
    """Experts as `QMoE` wants them: bytes in our order of codes, gate and up rows interleaved, float32 scales."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes one expert."""
        experts = self._facts["experts"]
        if part is None or not 0 <= part < experts:
            raise InputError(f"expert_mlp_int4 on onnxruntime: part {part} arrived; expected experts 0 to {experts - 1}")
        for name in ("gate_up", "down"):
            packed, scales = tensors[f"{name}_packed"], tensors[f"{name}_scales"]
            check_int4(f"expert_mlp_int4, {name}", packed, scales, self._facts["group_size"])
            for kind, canonical in (("codes", _as_bytes(packed)), ("scales", scales.to(torch.float32))):
                ours = canonical if name == "down" else interleaved(canonical)
                place = f"{name}_{kind}"
                if place not in self._tensors:
                    self._tensors[place] = ours.new_empty((experts, *ours.shape))
                self._tensors[place][part] = ours
        self._seen.add(part)

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of `expert_mlp_int4_qmoe`."""
        if absent := set(range(self._facts["experts"])) - self._seen:
            raise InputError(f"expert_mlp_int4 on onnxruntime: experts missing: {sorted(absent)}")
        return {**self._tensors, "top_k": self._facts["top_k"]}


def interleaved(rows: Tensor) -> Tensor:
    """gate 0, up 0, gate 1, ... from the gate rows followed by the up rows."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def qmoe_node(inputs: Mapping[str, str], output: str, *, top_k: int, group_size: int, renormalise: bool = False) -> Any:
    """One `QMoE` node: choices by `scores`, mixed by `route_weights`; silu(gate) * up of interleaved rows.

    Args:
        inputs: names for x, scores, gate_up_codes, gate_up_scales, down_codes, down_scales, route_weights.
        output: its name.
        top_k: choices.
        group_size: inputs that share a scale.
        renormalise: the weights of a token's choices are divided by their sum.
    """
    from onnx import helper

    order = ["x", "scores", "gate_up_codes", "gate_up_scales", "", "down_codes", "down_scales", *[""] * 7, "route_weights"]
    return helper.make_node(
        "QMoE",
        [inputs[name] if name else "" for name in order],
        [output],
        domain=DOMAIN,
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=int(renormalise),
        expert_weight_bits=4,
        block_size=group_size,
    )


def _experts_session(weights: Mapping[str, Tensor], top_k: int, group_size: int) -> Session:
    experts, _, half_width = weights["gate_up_codes"].shape
    names = {name: name for name in ("x", "scores", "route_weights", *weights)}
    node = qmoe_node(names, "y", top_k=top_k, group_size=group_size)
    return build([node], {"x": half_width * 2, "scores": experts, "route_weights": experts}, half_width * 2, weights)


def _fake_experts(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


@expert_mlp_int4.implement(
    BACKEND,
    variant="qmoe",
    not_supported=experts_not_supported,
    promises=("deterministic",),
    prepare=ExpertWeights,
    fake=_fake_experts,
)
def expert_mlp_int4_qmoe(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    *,
    group_size: int,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    top_k: int,
) -> Tensor:
    """`QMoE` in float32. It chooses `top_k` different experts by score: the ids of a token get the highest scores, and the places
    of ids that are out of range or repeated go to experts of weight 0."""
    weights = {
        "gate_up_codes": gate_up_codes,
        "gate_up_scales": gate_up_scales,
        "down_codes": down_codes,
        "down_scales": down_scales,
    }
    session = session_of(gate_up_codes, lambda: _experts_session(weights, top_k, group_size))
    experts = gate_up_codes.shape[0]
    used_Tk = (ids >= 0) & (ids < experts)
    places_Tk = ids.clamp(0, experts - 1).to(torch.int64)
    ranks_Tk = torch.arange(top_k, 0, -1, dtype=torch.float32).expand(ids.shape) * used_Tk
    zeros_TE = torch.zeros((ids.shape[0], experts), dtype=torch.float32)
    scores_TE = zeros_TE.scatter_reduce(1, places_Tk, ranks_Tk, "amax")
    mixed_TE = zeros_TE.scatter_add(1, places_Tk, route_weights.to(torch.float32).masked_fill(~used_Tk, 0.0))
    y_TD = session.run({"x": hidden, "scores": scores_TE, "route_weights": mixed_TE})
    return y_TD.masked_fill(~used_Tk.any(1, keepdim=True), 0.0).to(hidden.dtype)
