"""Tokens to their experts and back, over a process group.

A dispatch brings every token to the ranks that hold its experts, `expert_mlp` computes there, and a combine brings the sums back.
Both are declared by what they mean where one rank has every expert; forms and groups say how a rank of many does the same.

Shape legend: T tokens of this rank; D hidden size; k choices of a token; E experts; C copies of the most copied expert; R tokens
that arrived here; G channel groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError, did_you_mean
from glm5_port.registry import Budget

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, DEDUPLICATED, HIERARCHICAL = (
    "all_reduce",
    "all_gather",
    "all_to_all",
    "deduplicated",
    "hierarchical",
)
FORMS = (ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, DEDUPLICATED, HIERARCHICAL)
SCALE_GROUP = 128
"""Channels that share a float32 scale in an exchange of 8 bits."""
LARGEST_CODE = 127


def quantise_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits: codes = round(x / s) with s = amax / 127 over each run of 128 channels, in float32.

    |x - s codes| <= s / 2 = amax / 254 for finite x. A group of zeros has s = 0 and codes 0; a NaN or an infinity makes its whole
    group NaN.

    Returns:
        codes [..., D] int8 and scales [..., G] float32.
    """
    groups = -(-x.shape[-1] // SCALE_GROUP)
    wide = torch.nn.functional.pad(x.float(), (0, groups * SCALE_GROUP - x.shape[-1])).unflatten(-1, (groups, SCALE_GROUP))
    scales = wide.abs().amax(-1) / LARGEST_CODE
    codes = torch.where(scales[..., None] > 0, wide / scales[..., None], 0.0).nan_to_num(0.0).round()
    return codes.to(torch.int8).flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def dequantise_groups(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows from `quantise_groups`, multiplied in float32 and rounded to `dtype`."""
    spread = scales.repeat_interleave(SCALE_GROUP, dim=-1)[..., : codes.shape[-1]]
    return (codes.float() * spread).to(dtype)


def in_eight_bits(x: Tensor, bits: int) -> Tensor:
    """What arrives of rows that are sent in 8 bits; `x` itself otherwise."""
    return dequantise_groups(*quantise_groups(x), x.dtype) if bits == 8 else x


def check_exchange(form: str, bits: int) -> None:
    """Raises InputError for an unknown form or width."""
    if form not in FORMS:
        raise InputError(f"form={form!r}: no such exchange{did_you_mean(form, FORMS)}\n  supported: {', '.join(FORMS)}")
    if bits not in (8, 16):
        raise InputError(f"bits={bits}: an exchange is in 16 bits (the working dtype) or in 8")


def slots_of(ids: Tensor, placement: Tensor, rows: Tensor) -> Tensor:
    """The slot of each choice: of an expert's copies, row t takes copy t mod C, so that all senders share them evenly. -1 for ids
    outside 0 .. E - 1.

    Args:
        ids: [T, k].
        placement: [E, C].
        rows: [T], which row of the exchange each token is.
    """
    used = (ids >= 0) & (ids < placement.shape[0])
    copies = (rows % placement.shape[1]).unsqueeze(1).expand(ids.shape)
    return torch.where(used, placement[torch.where(used, ids, 0).long(), copies], -1)


_FACTS = {
    "form": lambda form, **_: form,
    "bits": lambda bits, **_: bits,
    "ranks": lambda ranks, **_: ranks,
    "node_ranks": lambda node_ranks, **_: node_ranks,
    "expert_tensor": lambda expert_tensor, **_: expert_tensor,
}


def _arriving(tokens: int, form: str, ranks: int) -> int | torch.SymInt:
    """Rows that arrive, where that does not depend on the data."""
    if form == ALL_GATHER:
        return tokens * ranks
    if form == ALL_REDUCE or ranks == 1:
        return tokens
    return torch.library.get_ctx().new_dynamic_size()


def _dispatch_fake(hidden: Tensor, route_weights: Tensor, ids: Tensor, form: str, ranks: int) -> tuple[Tensor, ...]:
    rows = _arriving(hidden.shape[0], form, ranks)
    choices = 1 if form == ALL_TO_ALL and ranks > 1 else ids.shape[1]
    return hidden.new_empty(rows, hidden.shape[1]), route_weights.new_empty(rows, choices), ids.new_empty(rows, choices)


@operator(
    facts={
        **_FACTS,
        "width": lambda hidden, **_: hidden.shape[1],
        "experts": lambda placement, **_: placement.shape[0],
        "top_k": lambda ids, **_: ids.shape[1],
    },
    fake=lambda hidden, route_weights, ids, placement, *, form, bits, slots, ranks, node_ranks, expert_tensor, groups: (
        *_dispatch_fake(hidden, route_weights, ids, form, ranks),
        [],
    ),
    budget=Budget(),
)
def dispatch_tokens(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    placement: Tensor,
    *,
    form: str,
    bits: int,
    slots: int,
    ranks: int,
    node_ranks: int,
    expert_tensor: int,
    groups: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Brings each token to the ranks that hold its experts.

    On one rank: hidden as it is (in 8 bits: rounded as `quantise_groups` does), and ids' = placement[ids, t mod C].

    Args:
        hidden: [T, D], this rank's tokens, any floating dtype.
        route_weights: [T, k] float32 (or wider), from `route_experts`.
        ids: [T, k] int32, experts; an id outside 0 .. E - 1 is no choice.
        placement: [E, C] int32: the slots that hold each expert, in turns where some have fewer copies than others. Slot s lies
            on expert group s // slots, at place s % slots.
        form: "all_reduce" (every rank has every token: nothing travels), "all_gather" (every rank gets every token),
            "all_to_all" (a copy for each choice), "deduplicated" (a copy for each rank with a chosen expert) or "hierarchical" (a
            copy for each machine with one, fanned out inside).
        bits: 16 sends the working dtype; 8 sends INT8 codes and a float32 scale for each run of 128 channels.
        slots: of one expert group.
        ranks: of the process group.
        node_ranks: of the group, on one machine.
        expert_tensor: ranks that share one expert's width: rank r is part of expert group r // expert_tensor.
        groups: names of torch.distributed process groups, separated by blanks: that of all ranks, and for "hierarchical" those of
            this rank's machine and of the ranks with its place on each machine. Not read when ranks = 1.

    Returns:
        hidden [R, D], route weights [R, k] and ids [R, k] (places on this rank, outside 0 .. slots - 1 where a choice is not
        here) of the tokens that arrived, and what the same implementation's `combine_tokens` needs to send sums back. In the form
        "all_to_all" on more than one rank a row is one choice (k = 1).

    Contract:
        In 16 bits rows arrive bit for bit. In 8 bits every element is within amax / 254 of its 128 channels, before the result is
        rounded to the working dtype. Every rank of the group calls with equal k, D and placement; T may differ between ranks but
        in the form "all_gather". No tokens are fine. The order of arrivals is fixed by ranks and rows. Deterministic. No
        gradients.

    Raises:
        InputError: an unknown form or width.

    Source: DeepEP (dispatch and combine, node by node in its high-throughput form), vLLM's allgather_reducescatter; INT8 per 128
    channels as their FP8 dispatch.
    """
    check_exchange(form, bits)
    local = slots_of(ids, placement, torch.arange(ids.shape[0], device=ids.device))
    return in_eight_bits(hidden, bits if form != ALL_REDUCE else 16).clone(), route_weights.clone(), local.to(ids.dtype), []


@operator(
    facts={**_FACTS, "width": lambda results, **_: results.shape[1]},
    fake=lambda results, trace, *, tokens, form, bits, ranks, node_ranks, expert_tensor, groups: results.new_empty(
        tokens, results.shape[1]
    ),
    budget=Budget(),
)
def combine_tokens(
    results: Tensor,
    trace: list[Tensor],
    *,
    tokens: int,
    form: str,
    bits: int,
    ranks: int,
    node_ranks: int,
    expert_tensor: int,
    groups: str,
) -> Tensor:
    """Brings the experts' weighted sums back to the rank of each token and adds them up.

    y_t = sum over the ranks that computed choices of t of their result, in float32 (float64 for float64 inputs), rounded once.
    On one rank: results as they are (in 8 bits and the form "all_gather": rounded as `quantise_groups` does).

    Args:
        results: [R, D], for each row that `dispatch_tokens` brought, in its order.
        trace: the fourth result of that dispatch.
        tokens: T of that dispatch.
        form, bits, ranks, node_ranks, expert_tensor, groups: of that dispatch. 8 bits apply to the form "all_gather"; sums of the
            other forms return in the working dtype.

    Returns:
        [T, D] in the dtype of results. In the form "all_reduce" the sum over ranks is left to the caller, who has more to add.

    Contract:
        A token without a choice gives zeros. Sums are taken in the order of ranks, inside a machine first in the form
        "hierarchical". In 8 bits every rank's part is within amax / 254 of its 128 channels. Deterministic. No gradients.

    Raises:
        InputError: an unknown form or width.

    Source: as `dispatch_tokens`; engines combine in 16 bits but quantise a reduce-scatter (Flash Communication).
    """
    check_exchange(form, bits)
    return in_eight_bits(results, bits if form == ALL_GATHER else 16).clone()
