"""The experts: tokens sorted by npu_moe_init_routing_v2, both products by npu_grouped_matmul, summed by token.

    expert_mlp              weights as they are, read through a transposed view
    expert_mlp_int4         W4A16: codes of 4 bits beside a scale for each group of inputs
    expert_mlp_int4_w4a8    W4A8: a scale for each output, rows quantised by npu_dynamic_quant

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; R = T * k routed rows;
G groups of inputs; N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.experts import GROUPED_MATMUL, INIT_ROUTING
from glm5_port.backends.npu.contracts.kinds import FLOATING, HALF, WIDEST
from glm5_port.backends.npu.contracts.quantised import DYNAMIC_QUANT, INT4PACK
from glm5_port.backends.npu.contracts.small import SWIGLU
from glm5_port.backends.npu.linear import swiglu
from glm5_port.backends.npu.quantised import SCALES_ARE_BFLOAT16, pack_for_npu, quantise_rows
from glm5_port.backends.npu.routing import sort_by_expert, weigh_and_sum
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.errors import InputError
from glm5_port.operators.int4 import check_int4, check_scale_a_row, expert_mlp_int4, expert_mlp_int4_w4a8
from glm5_port.operators.moe import expert_mlp
from glm5_port.quant.int4 import PER_CHANNEL

_SIZES = (
    Rule("groups", "multiplies by 2 to 1024 experts, not {experts}", lambda *, experts, **_: 2 <= experts <= 1024),
    Rule(
        "widths",
        f"wants widths up to {WIDEST}, not {{width}} and twice {{width_between}}",
        lambda *, width, width_between, **_: width <= WIDEST and 2 * width_between <= WIDEST,
    ),
)
_PACKED_WIDTHS = Rule(
    "packed widths",
    "packs eight codes along the outputs: widths in whole 8s and whole 4s between, not {width} and {width_between}",
    lambda *, width, width_between, **_: width % 8 == 0 and (2 * width_between) % 8 == 0,
)
SCALE_PER_OUTPUT = Rule(
    "group size",
    "takes one scale for each output (group size -1), not groups of {group_size}: vllm-ascend has given up groups here too",
    lambda *, group_size, **_: group_size == PER_CHANNEL,
)
SCALE_PER_ROW = Rule(
    "activation groups",
    "npu_dynamic_quant makes one activation scale a row (activation group size -1), not groups of {activation_group_size}",
    lambda *, activation_group_size, **_: activation_group_size == PER_CHANNEL,
)


def _apply(
    hidden: Tensor, route_weights: Tensor, ids: Tensor, experts: int, gate_up: Callable[..., Tensor], down: Callable[..., Tensor]
) -> Tensor:
    """Sorts, multiplies, activates, multiplies and sums. Products are called with rows and the counts of each expert's."""
    if ids.numel() == 0 or hidden.numel() == 0:
        return torch.zeros_like(hidden)
    sent = sort_by_expert(hidden, ids, experts)
    results_RD = down(swiglu(gate_up(sent.rows_RD, sent.counts_E)), sent.counts_E)
    return weigh_and_sum(results_RD, sent, route_weights)


def _grouped(rows: Tensor, weight: Tensor, counts: Tensor, *, output_dtype: torch.dtype, **scales: list[Tensor]) -> Tensor:
    """[R, in] by the experts' [E, in, out] in one call; rows beyond the counts are left unwritten."""
    (y,) = call(
        GROUPED_MATMUL,
        [rows],
        [weight],
        group_list=counts,
        split_item=3,
        group_type=0,
        group_list_type=1,
        output_dtype=output_dtype,
        **scales,
    )
    product: Tensor = y
    return product


@aclnn(expert_mlp, Needs((INIT_ROUTING, GROUPED_MATMUL, SWIGLU), (dtype_among(*FLOATING), *_SIZES)))
def expert_mlp_aclnn(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    def product(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda rows, counts: _grouped(rows, weight.transpose(1, 2), counts, output_dtype=rows.dtype)

    return _apply(hidden, route_weights, ids, gate_up.shape[0], product(gate_up), product(down))


# -- INT4 ----------------------------------------------------------------------------------------------------------------


class PackedExperts:
    """Preparation of INT4 experts: codes [E, in, out / 8] in the vendor's words, and scales as the product wants them. Memory
    for all is taken when the first expert arrives; one expert at a time exists unpacked.

    Args:
        facts: of the operator.
        scales_of: (codes [in, out] int32, scales [out, groups]) -> name suffix -> one expert's tensor.
    """

    def __init__(self, facts: Mapping[str, Any], scales_of: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        self._experts: int = facts["experts"]
        self._group_size: int = facts["group_size"]
        self._scales_of = scales_of
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is None or not 0 <= part < self._experts:
            raise InputError(f"experts on npu: part {part} arrived; expected experts 0 to {self._experts - 1}")
        for name in ("gate_up", "down"):
            packed, scales = tensors[f"{name}_packed"], tensors[f"{name}_scales"]
            check_int4(f"experts on npu, {name}", packed, scales, self._group_size)
            codes, words = pack_for_npu(packed)
            for suffix, value in {"words": words, **self._scales_of(codes, scales)}.items():
                key = f"{name}_{suffix}"
                if key not in self._tensors:
                    self._tensors[key] = value.new_empty((self._experts, *value.shape))
                self._tensors[key][part].copy_(value)
        self._seen.add(part)

    def finish(self) -> dict[str, Tensor | int]:
        if absent := set(range(self._experts)) - self._seen:
            raise InputError(f"experts on npu: experts missing: {sorted(absent)}")
        return dict(self._tensors)


def _fake(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


def _w4a16_weights(facts: Mapping[str, Any]) -> PackedExperts:
    """Scales [G, N], or [N] for one scale an output; offsets of zero beside them, since the product wants both."""

    def scales_of(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        by_group = scales.t().contiguous().to(torch.bfloat16)
        by_group = by_group.squeeze(0) if by_group.shape[0] == 1 else by_group
        return {"scales": by_group, "offsets": torch.zeros_like(by_group)}

    return PackedExperts(facts, scales_of)


@aclnn(
    expert_mlp_int4,
    Needs((INIT_ROUTING, GROUPED_MATMUL, SWIGLU, INT4PACK), (SCALES_ARE_BFLOAT16, *_SIZES, _PACKED_WIDTHS)),
    prepare=_w4a16_weights,
    fake=_fake,
)
def expert_mlp_int4_aclnn(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    *,
    group_size: int,
    gate_up_words: Tensor,
    gate_up_scales: Tensor,
    gate_up_offsets: Tensor,
    down_words: Tensor,
    down_scales: Tensor,
    down_offsets: Tensor,
) -> Tensor:
    def product(words: Tensor, scales: Tensor, offsets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda rows, counts: _grouped(
            rows, words, counts, output_dtype=rows.dtype, antiquant_scale=[scales], antiquant_offset=[offsets]
        )

    gate_up = product(gate_up_words, gate_up_scales, gate_up_offsets)
    return _apply(hidden, route_weights, ids, gate_up_words.shape[0], gate_up, product(down_words, down_scales, down_offsets))


def encoded_scale(scale: Tensor) -> Tensor:
    """float32 in the low half of a 64-bit word: how the vendor's integer products take a scale."""
    words = scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    return words & 0xFFFFFFFF


def _w4a8_weights(facts: Mapping[str, Any]) -> PackedExperts:
    """Scales [1, N], encoded, and the assist bias [N]: the kernel splits a row's code into 16 * high + low and takes 8 from the
    low half to have it signed, so 8 times the sum of q * s of a column has to be given back."""

    def scales_of(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        scale = scales.to(torch.float32).squeeze(-1)
        return {"scales": encoded_scale(scale).unsqueeze(0), "bias": 8.0 * codes.sum(0).to(torch.float32) * scale}

    return PackedExperts(facts, scales_of)


@aclnn(
    expert_mlp_int4_w4a8,
    Needs(
        (INIT_ROUTING, GROUPED_MATMUL, SWIGLU, INT4PACK, DYNAMIC_QUANT),
        (dtype_among(*HALF), *_SIZES, _PACKED_WIDTHS, SCALE_PER_OUTPUT, SCALE_PER_ROW),
    ),
    prepare=_w4a8_weights,
    fake=_fake,
)
def expert_mlp_int4_w4a8_aclnn(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    *,
    group_size: int,
    activation_group_size: int = PER_CHANNEL,
    gate_up_words: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_words: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
) -> Tensor:
    check_scale_a_row("expert_mlp_int4_w4a8 on npu", activation_group_size)

    def product(words: Tensor, scales: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def run(rows: Tensor, counts: Tensor) -> Tensor:
            codes, row_scales = quantise_rows(rows)
            return _grouped(
                codes, words, counts, output_dtype=rows.dtype, scale=[scales], bias=[bias], per_token_scale=[row_scales]
            )

        return run

    gate_up = product(gate_up_words, gate_up_scales, gate_up_bias)
    return _apply(hidden, route_weights, ids, gate_up_words.shape[0], gate_up, product(down_words, down_scales, down_bias))
