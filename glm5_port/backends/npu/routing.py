"""route_experts by npu_moe_gating_top_k, and the way of tokens to their experts and back.

Shape legend: T tokens; D hidden size; E experts; k choices per token; R = T * k routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu.contracts.experts import FINALIZE_ROUTING, GATING_TOP_K, INIT_ROUTING, padded_groups_fit
from glm5_port.backends.npu.contracts.kinds import FLOATING
from glm5_port.backends.npu.machine import machine
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.backends.torch.moe import combine
from glm5_port.operators.moe import check_routing, route_experts

_ROUTING_RULES = (
    dtype_among(*FLOATING),
    Rule("experts", "chooses among up to 2048 experts, not {experts}", lambda *, experts, **_: experts <= 2048),
    Rule("group size", "wants groups of more than 2 experts, not {experts} in {groups}", lambda *, experts, groups, **_: (
        experts // groups > 2
    )),
    Rule("padded groups", "groups padded to whole 32s may hold 2048 experts, not {experts} in {groups}", (
        lambda *, experts, groups, **_: padded_groups_fit(experts, groups)
    )),
    Rule("renormalise", "always divides by the sum of the chosen scores", lambda *, renormalise, **_: renormalise),
)  # fmt: skip


@aclnn(route_experts, Needs((GATING_TOP_K,), _ROUTING_RULES))
def route_experts_aclnn(
    hidden: Tensor,
    gate: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int,
    groups: int,
    groups_kept: int,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The vendor's own reference takes equal scores by the lower id; that its kernel does is nowhere promised."""
    check_routing(gate.shape[0], top_k, groups, groups_kept)
    tokens = hidden.shape[0]
    if tokens == 0:
        return hidden.new_empty((0, top_k), dtype=torch.float32), hidden.new_empty((0, top_k), dtype=torch.int32)
    weights_Tk, ids_Tk, _ = call(
        GATING_TOP_K,
        F.linear(hidden.to(torch.float32), gate.to(torch.float32)),
        top_k,
        bias=correction_bias.to(torch.float32),
        k_group=groups_kept,
        group_count=groups,
        group_select_mode=1,
        renorm=0,
        norm_type=1,
        out_flag=False,
        routed_scaling_factor=scale,
        eps=1e-20,
    )
    return weights_Tk, ids_Tk


@dataclass(frozen=True, slots=True)
class Sorted:
    """Tokens sorted by expert.

    Attributes:
        rows_RD: each choice's token, sorted by expert. Rows beyond the experts' own hold anything.
        counts_E: int64, rows of each expert, as npu_grouped_matmul takes them.
        place_Tk: int32, the sorted row of each choice; -1 where the id is out of range.
    """

    rows_RD: Tensor
    counts_E: Tensor
    place_Tk: Tensor


def sort_by_expert(hidden: Tensor, ids: Tensor, experts: int) -> Sorted:
    """The vendor wants ids below the number of experts, so ids out of range become one expert more, which is not active. Its
    rows are left at the end: counts then sum to less than R, as they do in every engine with expert parallelism, although the
    page of npu_grouped_matmul speaks of a sum of R."""
    known_Tk = torch.where((ids >= 0) & (ids < experts), ids, experts).to(torch.int32)
    rows_RD, place_R, counts_E, _ = call(
        INIT_ROUTING,
        hidden.contiguous(),
        known_Tk,
        active_num=ids.numel(),
        expert_num=experts + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=0,
    )
    return Sorted(rows_RD, counts_E, place_R.view(ids.shape))


def weigh_and_sum(results_RD: Tensor, sent: Sorted, route_weights: Tensor) -> Tensor:
    """Each token's results by its weights, in float32, rounded once to the dtype of `results_RD`.

    npu_moe_finalize_routing takes weights in the dtype of the rows, so rows become float32 and not weights 16 bits. Its
    documents list A2 alone; elsewhere torch's own kernels sum."""
    tokens, choices = route_weights.shape
    if FINALIZE_ROUTING.missing(machine()):
        return combine(results_RD, sent.place_Tk.clamp_min(0).long(), sent.place_Tk >= 0, route_weights, results_RD.dtype)
    used_Tk = sent.place_Tk >= 0
    summed: Tensor = call(
        FINALIZE_ROUTING,
        results_RD.to(torch.float32).view(choices, tokens, -1),
        None,
        None,
        None,
        torch.where(used_Tk, route_weights, 0.0).to(torch.float32),
        sent.place_Tk.reshape(-1),
        None,
        drop_pad_mode=3,
    )
    return summed.to(results_RD.dtype)
