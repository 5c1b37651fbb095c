"""Quantised products: INT4 weights with wide or INT8 activations, and INT8 weights with INT8 activations.

INT4 weights are what `glm5_port.quant.int4` makes: canonical words of eight codes, and one bfloat16 scale for each group of
consecutive inputs of one output row.

Shape legend: D hidden size; F intermediate size of one expert; E experts; T tokens; k choices per token; g inputs of a group;
... any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.linear import linear, silu_and_multiply
from glm5_port.operators.moe import expert_mlp, mix_experts
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, dequantize, groups_of, quantize_packed
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4
from glm5_port.registry import LONG_SUMS, Budget

SMALLEST_ROW = 2.0**-100
"""Rows (or groups) of activations whose largest magnitude is below count as zeros, so that no scale is subnormal."""

REQUANTISED = Budget(
    summation=2.0**16,
    why="the values between the products become 8-bit codes: a sum that ends on the other side of k + 1/2 moves a code by one, "
    "which is 1/254 of the largest value under its scale",
)
"""The budget of operators that quantise what they computed."""


def check_int4(name: str, packed: Tensor, scales: Tensor, group_size: int) -> None:
    """Raises InputError unless the scales are those of groups of `group_size` (`PER_CHANNEL`: rows) of the packed weight."""
    width = packed.shape[-1] * CODES_PER_WORD
    groups, _ = groups_of(width, group_size, name=name)
    if packed.dtype != torch.int32 or scales.shape != (*packed.shape[:-1], groups):
        raise InputError(
            f"{name}: packed {tuple(packed.shape)} {packed.dtype} with scales {tuple(scales.shape)}; group size {group_size} "
            f"wants int32 words and scales {(*packed.shape[:-1], groups)}.\n"
            "  The group size, or the order of dimensions, is not the one that the weight was stored with."
        )


# -- weights -------------------------------------------------------------------------------------------------------------


def _fake_quantize(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor]:
    width = weight.shape[-1]
    packed = weight.new_empty((*weight.shape[:-1], width // CODES_PER_WORD), dtype=torch.int32)
    return packed, weight.new_empty((*weight.shape[:-1], groups_of(width, group_size)[0]), dtype=torch.bfloat16)


@operator(
    facts={
        "width": lambda weight, **_: weight.shape[-1],
        "group_size": lambda group_size, **_: group_size,
        "rule": lambda rule, **_: rule,
    },
    fake=_fake_quantize,
    budget=Budget(factor=1.0, floor=0.0),
)
def int4_quantize(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor]:
    """Quantises a weight and packs the codes.

    w = bf16(weight); s = the rule's scale of each group; q = w / s rounded half to even: |q| counts the k = 0, 1, 2, ... with
    |w| > (k + 1/2) |s|, or |w| = (k + 1/2) |s| for odd k. float32 holds these products exactly.

    Args:
        weight: [..., in], any floating dtype; float64 is rounded to float32 first.
        group_size: inputs that share a scale; -1: a whole row.
        rule: "amax7", "signed8" or "mse" (`glm5_port.quant.int4`).

    Returns:
        packed: [..., in / 8] int32, canonical words.
        scales: [..., in / g] bfloat16.

    Contract:
        Bit for bit: an implementation has no freedom. A group with NaN, infinity or a magnitude above 2^127 has the scale NaN
        and codes 0, since raising would wait for the device; `glm5_port.quant.quantize` raises. No rows: empty results.

    Raises:
        InputError: an unknown rule, or a group size that does not divide the rows.

    Source: glm5_port.quant.int4.
    """
    _, scales = quantize_packed(weight, Int4Rule(rule, group_size), check=False)
    step = scales.to(torch.float32).unsqueeze(-1)
    w = weight.to(torch.bfloat16).to(torch.float32).unflatten(-1, (scales.shape[-1], -1))
    size = torch.zeros_like(w)
    for k in range(8):
        boundary = (k + 0.5) * step.abs()
        size += (w.abs() >= boundary) if k % 2 else (w.abs() > boundary)
    lowest = -8 if rule == "signed8" else -7
    codes = torch.where((w < 0) == (step < 0), size, -size).clamp(lowest, 7)
    return pack_int4(codes.to(torch.int8).flatten(-2)), scales


@operator(
    facts={
        "width": lambda packed, **_: packed.shape[-1] * CODES_PER_WORD,
        "group_size": lambda group_size, **_: group_size,
    },
    fake=lambda packed, scales, group_size: packed.new_empty(
        (*packed.shape[:-1], packed.shape[-1] * CODES_PER_WORD), dtype=torch.bfloat16
    ),
    budget=Budget(factor=1.0, floor=0.0),
)
def int4_dequantize(packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """The weight that codes and scales stand for: bf16(q * s).

    Args:
        packed: [..., in / 8] int32, canonical words; all sixteen codes are valid.
        scales: [..., in / g] bfloat16 (or wider, holding bfloat16 values). May be negative.
        group_size: inputs that share a scale; -1: a whole row.

    Returns:
        [..., in] bfloat16.

    Contract:
        Bit for bit: the exact product, rounded once, half to even. A NaN scale makes its group NaN. No rows: an empty result.

    Raises:
        InputError: scales that do not fit the words and the group size.

    Source: glm5_port.quant.int4; equal to `decompress` of compressed-tensors.
    """
    check_int4("int4_dequantize", packed, scales, group_size)
    return dequantize(unpack_int4(packed), scales)


# -- one product ---------------------------------------------------------------------------------------------------------


@operator(
    facts={
        "width_in": lambda packed, **_: packed.shape[1] * CODES_PER_WORD,
        "width_out": lambda packed, **_: packed.shape[0],
        "group_size": lambda group_size, **_: group_size,
    },
    fake=lambda x, packed, scales, group_size: x.new_empty((*x.shape[:-1], packed.shape[0])),
    weights=("packed", "scales"),
    budget=LONG_SUMS,
)
def int4_matmul(x: Tensor, packed: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """Projects each row by an INT4 weight (W4A16).

    y = x W^T with W = bf16(q * s), accumulated in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [..., in], any floating dtype.
        packed: [out, in / 8] int32, canonical words.
        scales: [out, in / g] bfloat16.
        group_size: inputs that share a scale; -1: a whole row.

    Returns:
        [..., out] in the dtype of x.

    Contract:
        As `linear` of the dequantised weight; float16 activations do not narrow the weight. Gradients reach x.

    Raises:
        InputError: scales that do not fit the words and the group size.

    Source: the W4A16 kernels of the engines, which round q * s to bfloat16 before the product. Kernels that keep it wider
    (ONNX Runtime, kt-kernel) compute another operator.
    """
    return linear.reference(x, int4_dequantize.reference(packed, scales, group_size=group_size))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit activations, one scale a row: codes int8 [..., in] and scales float32 [..., 1].

    s = amax / 127 in float32, q = x / s (a float32 quotient) rounded half to even. Rows below 2^-100 have s = 1 and q = 0; rows
    that hold NaN or infinity s = NaN and q = 0, so that all they become is NaN.
    """
    x = x.detach().to(torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    scales = torch.where(amax < SMALLEST_ROW, 1.0, torch.where(amax.isfinite(), amax / 127, float("nan")))
    codes = (x / scales).round().nan_to_num(0.0, 0.0, 0.0).to(torch.int8)
    return codes, scales


@operator(
    facts={"width_in": lambda weight, **_: weight.shape[1], "width_out": lambda weight, **_: weight.shape[0]},
    fake=lambda x, weight, weight_scale: x.new_empty((*x.shape[:-1], weight.shape[0])),
    weights=("weight", "weight_scale"),
)
def int8_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Projects each row, quantised to 8 bits as it comes, by an INT8 weight (W8A8, dynamic per token).

    y = (sum over the inputs of q_x * q_w) * s_x * s_w: the sum in integers, the rest in float32 (float64 for float64 inputs),
    rounded once. s_x = amax / 127 of the row and q_x = x / s_x rounded half to even, both in float32 whatever the dtype of x.

    Args:
        x: [..., in], any floating dtype; wider than float32 is rounded to it before quantising.
        weight: [out, in] int8.
        weight_scale: [out] float32.

    Returns:
        [..., out] in the dtype of x.

    Contract:
        The integer sum is exact: `in` is below 2^17, so that it fits 32 bits. Rows are independent. A row whose largest
        magnitude is below 2^-100 gives zeros; a row with NaN or infinity is all NaN. No gradients: rounding has none.

    Raises:
        Nothing of its own; shapes that do not fit raise torch's error.

    Source: W8A8_DYNAMIC of msModelSlim and vllm-ascend, and the per-token, per-channel INT8 path of the other engines.
    """
    wide = accumulation_dtype(x)
    codes, scales = quantize_rows(x)
    sums = F.linear(codes.to(torch.float64), weight.to(torch.float64))  # whole numbers below 2^53: exact in any order
    return (sums.to(wide) * (scales.to(wide) * weight_scale.to(wide))).to(x.dtype)


# -- experts -------------------------------------------------------------------------------------------------------------


_EXPERT_FACTS = {
    "width": lambda gate_up_packed, **_: gate_up_packed.shape[2] * CODES_PER_WORD,
    "width_between": lambda down_packed, **_: down_packed.shape[2] * CODES_PER_WORD,
    "experts": lambda gate_up_packed, **_: gate_up_packed.shape[0],
    "top_k": lambda ids, **_: ids.shape[1],
    "group_size": lambda group_size, **_: group_size,
}
_EXPERT_WEIGHTS = ("gate_up_packed", "gate_up_scales", "down_packed", "down_scales")


def _fake_experts(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


@operator(facts=_EXPERT_FACTS, fake=_fake_experts, weights=_EXPERT_WEIGHTS, budget=LONG_SUMS)
def expert_mlp_int4(
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
    """`expert_mlp` with INT4 experts and wide activations (W4A16).

    y_t = sum over j of route_weights[t, j] * gated_mlp(hidden_t; bf16(q * s) of expert ids[t, j]), summed in routing order in
    float32 (float64 for float64 inputs) and rounded once.

    Args:
        hidden: [T, D], any floating dtype.
        route_weights: [T, k] float32 (or wider).
        ids: [T, k] int32; an id outside 0..E-1 contributes nothing.
        gate_up_packed: [E, 2F, D / 8] int32, canonical words; per expert the rows of the gate projection, then those of up.
        gate_up_scales: [E, 2F, D / g] bfloat16.
        down_packed: [E, D, F / 8] int32.
        down_scales: [E, D, F / g] bfloat16.
        group_size: inputs that share a scale; -1: a whole row.

    Returns:
        [T, D] in the dtype of hidden.

    Contract:
        As `expert_mlp` of the dequantised experts; float16 activations do not narrow the weights. Gradients reach hidden and
        route_weights.

    Raises:
        InputError: scales that do not fit the words and the group size.

    Source: Kimi-K2 and GLM-5 INT4 checkpoints as vLLM, SGLang and vllm-ascend serve them.
    """
    gate_up = int4_dequantize.reference(gate_up_packed, gate_up_scales, group_size=group_size)
    down = int4_dequantize.reference(down_packed, down_scales, group_size=group_size)
    return expert_mlp.reference(hidden, route_weights, ids, gate_up, down)


def check_activation_groups(name: str, activation_group_size: int, group_size: int) -> None:
    """Raises InputError unless activations have a scale a row, or one for each group of the weights."""
    if activation_group_size not in (PER_CHANNEL, group_size):
        raise InputError(
            f"{name}: activations in groups of {activation_group_size}, and weights in groups of {group_size}.\n"
            f"  activation_group_size is {PER_CHANNEL} (one scale for a whole row) or the group size of the weights."
        )


def check_scale_a_row(name: str, activation_group_size: int) -> None:
    """Raises InputError for groups of activations, in implementations that know one scale a row only."""
    if reasons := scale_a_row_reasons(activation_group_size):
        raise InputError(f"{name}: {reasons[0]}; bind it with the facts that it is called with.")


def scale_a_row_reasons(activation_group_size: int) -> list[str]:
    """Why an implementation that knows one activation scale a row cannot; empty when it can."""
    if activation_group_size == PER_CHANNEL:
        return []
    return [
        f"quantises activations with one scale a row (activation group size {PER_CHANNEL}), not groups of {activation_group_size}"
    ]


def int4_int8_product(x: Tensor, packed: Tensor, scales: Tensor, *, by_groups: bool) -> Tensor:
    """x W^T of rows, or groups of them, quantised to 8 bits, by W = q * s unrounded, in float32 (or wider) and the dtype of x."""
    wide, groups = accumulation_dtype(x), scales.shape[-1]
    weight = unpack_int4(packed).to(wide).unflatten(-1, (groups, -1)) * scales.to(wide).unsqueeze(-1)
    if by_groups:
        group_codes, group_scales = quantize_rows(x.unflatten(-1, (groups, -1)))
        return F.linear((group_codes.to(wide) * group_scales.to(wide)).flatten(-2), weight.flatten(-2)).to(x.dtype)
    codes, row_scales = quantize_rows(x)
    return (F.linear(codes.to(wide), weight.flatten(-2)) * row_scales.to(wide)).to(x.dtype)


@operator(
    facts={**_EXPERT_FACTS, "activation_group_size": lambda activation_group_size=PER_CHANNEL, **_: activation_group_size},
    fake=_fake_experts,
    weights=_EXPERT_WEIGHTS,
    budget=REQUANTISED,
)
def expert_mlp_int4_w4a8(
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
    """`expert_mlp` with INT4 experts and 8-bit activations, quantised per token as they come (W4A8).

    Each product is (sum over the inputs of q_x * (q_w * s_w)) * s_x, rounded to the working dtype: activations as in
    `int8_matmul`, one scale for a whole row; q_w * s_w is exact and not rounded to bfloat16. With activation_group_size g it is
    sum over the groups j of (sum over the inputs of group j of q_x * q_w) * s_w,j * s_x,j: inputs g * j .. g * (j + 1) - 1 of a
    row have a scale s_x,j of their own, made as that of a whole row. First the token's hidden state is quantised, then
    silu(gate) * up, rounded to the working dtype, of each of its experts. Combined as in `expert_mlp`.

    Args:
        hidden: [T, D], any floating dtype.
        route_weights: [T, k] float32 (or wider).
        ids: [T, k] int32; an id outside 0..E-1 contributes nothing.
        gate_up_packed: [E, 2F, D / 8] int32, canonical words; per expert the rows of the gate projection, then those of up.
        gate_up_scales: [E, 2F, D / g] bfloat16.
        down_packed: [E, D, F / 8] int32.
        down_scales: [E, D, F / g] bfloat16.
        group_size: inputs that share a scale; -1: a whole row, what the W4A8 kernels of Ascend want.
        activation_group_size: inputs that share an activation scale; -1: a whole row, else equal to group_size.

    Returns:
        [T, D] in the dtype of hidden.

    Contract:
        Routing as in `expert_mlp`. A token with NaN or infinity is all NaN, in groups too: its group's scale is NaN. A row or
        group whose largest magnitude is below 2^-100 has codes 0. The products of codes of one group are whole numbers: an
        implementation may sum them in integers. No gradients reach hidden.

    Raises:
        InputError: scales that do not fit the words and the group size; activation groups that are not those of the weights.

    Source: W4A8_DYNAMIC of vllm-ascend (rows), the AMX and AVX-VNNI paths of kt-kernel (rows and groups of 32).
    """
    check_activation_groups("expert_mlp_int4_w4a8", activation_group_size, group_size)
    check_int4("expert_mlp_int4_w4a8, gate_up", gate_up_packed, gate_up_scales, group_size)
    check_int4("expert_mlp_int4_w4a8, down", down_packed, down_scales, group_size)

    by_groups = activation_group_size != PER_CHANNEL

    def result_of(expert: int) -> Tensor:
        gate_up = int4_int8_product(hidden, gate_up_packed[expert], gate_up_scales[expert], by_groups=by_groups)
        return int4_int8_product(silu_and_multiply(gate_up), down_packed[expert], down_scales[expert], by_groups=by_groups)

    return mix_experts(hidden, route_weights, ids, gate_up_packed.shape[0], result_of)
