"""Portable route_experts and expert_mlp.

Two ways to group tokens by expert, neither of which asks the device how many went where:

    grouped_mm    rows sorted by expert, then `torch.nn.functional.grouped_mm`; bfloat16, and widths of whole 16-byte units
    eager         rows sorted by expert and cut into blocks of one expert each; a block multiplies a copy of its expert

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; R = T * k routed
rows; S blocks; B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.torch.chunks import chunk_size, recomputed, wants_gradient
from glm5_port.operators.linear import silu_and_multiply
from glm5_port.operators.moe import check_routing, expert_mlp, keep_best_groups, route_experts, routing_scores
from glm5_port.registry import PORTABLE


@route_experts.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def route_experts_eager(
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
    check_routing(gate.shape[0], top_k, groups, groups_kept)
    scores_TE = routing_scores(hidden, gate)
    biased_TE = scores_TE + correction_bias
    if groups_kept < groups:
        biased_TE = keep_best_groups(biased_TE, groups, groups_kept)
    ids_Tk = biased_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k]  # topk would not keep the order of ties
    weights_Tk = scores_TE.gather(1, ids_Tk)
    if renormalise:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return weights_Tk * scale, ids_Tk.to(torch.int32)


@dataclass(frozen=True, slots=True)
class Grouping:
    """The routed rows sorted by expert.

    Attributes:
        tokens_R: the token of each sorted row.
        place_Tk: the sorted row of each choice.
        experts_Tk: the expert of each choice, E where the id is out of range.
        starts: [E + 1], the first sorted row of each expert; rows from starts[E] on belong to no expert.
    """

    tokens_R: Tensor
    place_Tk: Tensor
    experts_Tk: Tensor
    starts: Tensor


def group_by_expert(ids: Tensor, experts: int) -> Grouping:
    """Sorts the routed rows by expert on the device, keeping their order within an expert."""
    experts_Tk = torch.where((ids >= 0) & (ids < experts), ids, experts).long()
    sorted_R, order_R = experts_Tk.flatten().sort(stable=True)
    rows_R = torch.arange(order_R.shape[0], device=ids.device)
    place_Tk = torch.empty_like(rows_R).scatter(0, order_R, rows_R).view(ids.shape)
    starts = torch.searchsorted(sorted_R, torch.arange(experts + 1, device=ids.device))
    return Grouping(order_R // ids.shape[1], place_Tk, experts_Tk, starts)


def combine(results_RD: Tensor, place_Tk: Tensor, used_Tk: Tensor, route_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums each token's weighted results in routing order, in float32 (or wider), and rounds once.

    Args:
        results_RD: the experts' results in any order; rows that no used choice names may hold anything.
        place_Tk: which row of `results_RD` holds a choice; any row where the choice is not used.
        used_Tk: whether a choice counts.
        route_weights: [T, k].
        dtype: of the sum.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total_TD = torch.zeros((place_Tk.shape[0], results_RD.shape[1]), dtype=wide, device=results_RD.device)
    for choice in range(place_Tk.shape[1]):
        used_T1 = used_Tk[:, choice, None]
        result_TD = torch.where(used_T1, results_RD[place_Tk[:, choice]], 0.0)  # before the product: NaN * 0 is NaN
        total_TD = total_TD + result_TD.to(wide) * torch.where(used_T1, route_weights[:, choice, None], 0.0).to(wide)
    return total_TD.to(dtype)


def _grouped_mm_not_supported(**facts: Any) -> list[str]:
    reasons = []
    if facts["dtype"] != torch.bfloat16:
        reasons.append(f"grouped_mm takes bfloat16, not {facts['dtype']}")
    if facts["width"] % 8 or facts["width_between"] % 8:
        reasons.append(
            f"grouped_mm wants rows of whole 16-byte units; the widths {facts['width']} and {facts['width_between']} are not "
            "both multiples of 8"
        )
    return reasons


@expert_mlp.implement(
    PORTABLE,
    variant="grouped_mm",
    rank=50,
    not_supported=_grouped_mm_not_supported,
    differentiable=True,
    promises=("deterministic",),
)
def expert_mlp_grouped_mm(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Memory: R rows of 2 D + 3 F elements, linear in T and independent of E. Callers bound T by chunked prefill."""
    experts = gate_up.shape[0]
    groups = group_by_expert(ids, experts)
    ends = groups.starts[1:].to(torch.int32)
    used_R1 = (torch.arange(groups.tokens_R.shape[0], device=ids.device) < groups.starts[-1]).unsqueeze(1)
    rows_RD = torch.where(used_R1, hidden[groups.tokens_R], 0.0)  # also keeps the unwritten gradient of unused rows out
    between_RF = silu_and_multiply(F.grouped_mm(rows_RD, gate_up.transpose(1, 2), offs=ends))
    results_RD = F.grouped_mm(between_RF, down.transpose(1, 2), offs=ends)
    return combine(results_RD, groups.place_Tk, groups.experts_Tk < experts, route_weights, hidden.dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The routed rows cut into blocks of one expert each.

    Attributes:
        tokens_SB: the token of each row. Rows beyond an expert's own hold any token: they are computed and not used.
        experts_S: the expert of each block.
        place_Tk: the row of each choice in the blocks laid end to end; 0 where the choice is not used.
        used_Tk: whether a choice's id is in range.
    """

    tokens_SB: Tensor
    experts_S: Tensor
    place_Tk: Tensor
    used_Tk: Tensor


def cut_into_blocks(ids: Tensor, experts: int) -> Blocks:
    """Blocks of ceil(R / E) rows, so that at most 2 E blocks cover any routing: their number must be known without asking the
    device. The price is blocks that are computed and not used. The block size depends on T."""
    rows = ids.numel()
    groups = group_by_expert(ids, experts)
    block_rows = max(1, -(-rows // experts))
    blocks = (rows + min(experts, rows) * (block_rows - 1)) // block_rows  # no routing fills more

    blocks_E = (groups.starts.diff() + block_rows - 1) // block_rows
    ends_E = blocks_E.cumsum(0)
    blocks_S = torch.arange(blocks, device=ids.device)
    experts_S = torch.searchsorted(ends_E, blocks_S, right=True).clamp(max=experts - 1)
    first_row_S = groups.starts[experts_S] + (blocks_S - (ends_E - blocks_E)[experts_S]) * block_rows
    rows_SB = first_row_S.unsqueeze(1) + torch.arange(block_rows, device=ids.device)
    tokens_SB = groups.tokens_R[rows_SB.clamp(max=rows - 1)]

    expert_Tk = groups.experts_Tk.clamp(max=experts - 1)
    place_Tk = (ends_E - blocks_E)[expert_Tk] * block_rows + groups.place_Tk - groups.starts[expert_Tk]
    used_Tk = groups.experts_Tk < experts
    return Blocks(tokens_SB, experts_S, torch.where(used_Tk, place_Tk, 0), used_Tk)


def _compute_blocks(hidden: Tensor, tokens_CB: Tensor, experts_C: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    between_CBF = silu_and_multiply(hidden[tokens_CB] @ gate_up[experts_C].transpose(1, 2))
    return between_CBF @ down[experts_C].transpose(1, 2)


@expert_mlp.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def expert_mlp_eager(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In blocks of one expert (`cut_into_blocks`), each with a copy of its expert.

    Memory: up to 2 R rows of D elements for the results (and as many for joining them), and WORKSPACE_BYTES (one block at
    least) for copies of experts. Training computes blocks again in the backward pass instead of keeping the copies, and each
    run of blocks makes one gradient of all experts before it is summed. The block size depends on T, so a token's result may
    differ by rounding between batches.
    """
    cut = cut_into_blocks(ids, gate_up.shape[0])
    blocks, block_rows = cut.tokens_SB.shape
    block_elements = gate_up[0].numel() + down[0].numel() + block_rows * (hidden.shape[1] + 3 * down.shape[2])
    chunk = chunk_size(block_elements * hidden.element_size(), blocks)
    gradient = wants_gradient(hidden, gate_up, down)
    results = [hidden.new_empty((0, block_rows, hidden.shape[1]))]
    for experts_C, tokens_CB in zip(cut.experts_S.split(chunk), cut.tokens_SB.split(chunk), strict=True):
        results.append(recomputed(_compute_blocks, hidden, tokens_CB, experts_C, gate_up, down, gradient=gradient))
    return combine(torch.cat(results).flatten(0, 1), cut.place_Tk, cut.used_Tk, route_weights, hidden.dtype)
