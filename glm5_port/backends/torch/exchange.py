"""Portable dispatch_tokens and combine_tokens: torch.distributed.

One exchange serves all forms that send tokens: `_spread` sends a row to each of its targets, `_return` brings sums back. The
form "hierarchical" is one between machines and one inside; "all_to_all" makes a row of each choice first. Counts of rows are
asked from the device, because collectives take them from the host.

Shape legend: T rows that leave; k choices of a row; P ranks of a group; M largest number of targets of a row; R rows that arrive;
D hidden size; W bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from glm5_port import collectives
from glm5_port.backends.torch.moe import combine
from glm5_port.operators.exchange import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    HIERARCHICAL,
    check_exchange,
    combine_tokens,
    dequantise_groups,
    dispatch_tokens,
    in_eight_bits,
    quantise_groups,
    slots_of,
)
from glm5_port.registry import PORTABLE

PURPOSE = "experts"


def find_groups(names: str) -> list[dist.ProcessGroup]:
    """Process groups by their names."""
    resolve: Callable[[str], dist.ProcessGroup] = vars(dist.distributed_c10d)["_resolve_process_group"]  # no public door yet
    return [resolve(name) for name in names.split()]


# --- rows as bytes --------------------------------------------------------------------------------------------------------


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """[T, ...] tensors of any dtypes -> [T, W] bytes: one message instead of several."""
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten(1) for tensor in tensors], dim=1)


def unpack(rows_RW: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `pack`, with the rows that arrived."""
    widths = [tensor.element_size() * tensor.shape[1] for tensor in like]
    parts = rows_RW.split(widths, dim=1)
    return [part.contiguous().view(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def _message(hidden: Tensor, bits: int) -> list[Tensor]:
    return list(quantise_groups(hidden)) if bits == 8 else [hidden]


def _route_bytes(rows: Sequence[Tensor]) -> int:
    """Of a packed row, its route weights and ids: the last two parts."""
    return sum(part.element_size() * part.shape[1] for part in rows[-2:])


def _hidden(message: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return dequantise_groups(message[0], message[1], dtype) if len(message) == 2 else message[0]


# --- rows to their targets -------------------------------------------------------------------------------------------------


def _spread(rows: Sequence[Tensor], targets_Tk: Tensor, group: dist.ProcessGroup) -> tuple[list[Tensor], list[Tensor]]:
    """Sends each row once to every rank that one of its choices names; -1 names none.

    Returns:
        The rows that arrived, by sender and then in the sender's order, and what `_return` needs: for each row and target the
        place of its copy, whether there is one, and the counts of rows sent and received.
    """
    ranks, (count, choices) = group.size(), targets_Tk.shape
    wanted_TP = torch.zeros((count, ranks + 1), dtype=torch.bool, device=targets_Tk.device)
    wanted_TP.scatter_(1, torch.where(targets_Tk >= 0, targets_Tk, ranks).long(), True)
    wanted_PT = wanted_TP[:, :ranks].T
    token_R = wanted_PT.nonzero()[:, 1]
    sent = wanted_PT.sum(1)
    received = collectives.exchange_counts(sent, group)
    send, receive = torch.stack([sent, received]).tolist()
    packed_RW = pack([tensor[token_R] for tensor in rows])
    arrived = unpack(collectives.all_to_all(packed_RW, send, receive, group, PURPOSE, _route_bytes(rows)), rows)
    place_TP = (wanted_PT.flatten().cumsum(0) - 1).view(ranks, count).T
    chosen_TM = wanted_PT.T.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : min(ranks, choices)]
    used_TM = wanted_PT.T.gather(1, chosen_TM)
    place_TM = torch.where(used_TM, place_TP.gather(1, chosen_TM), 0)
    return arrived, [place_TM, used_TM, torch.tensor(send), torch.tensor(receive)]


def _return(results_RD: Tensor, trace: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The way back of `_spread`: the sum of each row's results over its targets, in the order of ranks."""
    place_TM, used_TM, sent, received = trace
    back = collectives.all_to_all(results_RD, received.tolist(), sent.tolist(), group, PURPOSE)
    if not back.shape[0]:
        return back.new_zeros(place_TM.shape[0], back.shape[1])
    return combine(back, place_TM, used_TM, torch.ones_like(place_TM, dtype=torch.float32), back.dtype)


# --- the operators -----------------------------------------------------------------------------------------------------------


@dispatch_tokens.implement(PORTABLE, variant="torch_distributed", promises=("deterministic",))
def dispatch_tokens_torch_distributed(
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
    check_exchange(form, bits)
    every_row = torch.arange(ids.shape[0] * (ranks if form == ALL_GATHER else 1), device=ids.device)
    if ranks == 1:
        local = slots_of(ids, placement, every_row).to(ids.dtype)
        return in_eight_bits(hidden, bits if form != ALL_REDUCE else 16).clone(), route_weights.clone(), local, []
    found = find_groups(groups)
    here = found[0].rank() // expert_tensor
    trace: list[Tensor] = []
    if form == ALL_REDUCE:
        slots_Tk = slots_of(ids, placement, every_row)
        return hidden.clone(), route_weights.clone(), _places(slots_Tk, here, slots).to(ids.dtype), trace
    if form == ALL_GATHER:
        sent = [*_message(hidden, bits), route_weights, ids]
        *message, route_weights, ids = unpack(collectives.all_gather(pack(sent), found[0], PURPOSE, _route_bytes(sent)), sent)
        slots_Tk = slots_of(ids, placement, every_row)
        return _hidden(message, hidden.dtype), route_weights, _places(slots_Tk, here, slots).to(ids.dtype), trace
    slots_Tk = slots_of(ids, placement, every_row).to(ids.dtype)
    sent = [*_message(hidden, bits), route_weights, slots_Tk]
    if form == ALL_TO_ALL:
        choices = ids.shape[1]
        sent = [part.repeat_interleave(choices, dim=0) for part in sent[:-2]] + [part.reshape(-1, 1) for part in sent[-2:]]
    if form == HIERARCHICAL:
        group_Tk = torch.where(sent[-1] >= 0, sent[-1] // slots, -1)
        sent, trace = _spread(sent, torch.where(group_Tk >= 0, group_Tk // node_ranks, -1), found[2])
        group_Tk = torch.where(sent[-1] >= 0, sent[-1] // slots, -1)
        inside = (group_Tk >= 0) & (group_Tk // node_ranks == found[0].rank() // node_ranks)
        targets_Tk, group = torch.where(inside, group_Tk % node_ranks, -1), found[1]
    else:
        targets_Tk, group = torch.where(sent[-1] >= 0, sent[-1] // slots, -1), found[0]
    arrived, last = _spread(sent, targets_Tk, group)
    *message, route_weights, slots_Rk = arrived
    return _hidden(message, hidden.dtype), route_weights, _places(slots_Rk, here, slots).to(ids.dtype), trace + last


def _places(slots_Tk: Tensor, here: int, slots: int) -> Tensor:
    """Places on expert group `here`; -1 for slots elsewhere."""
    return torch.where((slots_Tk >= 0) & (slots_Tk // slots == here), slots_Tk % slots, -1)


@combine_tokens.implement(PORTABLE, variant="torch_distributed", promises=("deterministic",))
def combine_tokens_torch_distributed(
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
    check_exchange(form, bits)
    if form == ALL_REDUCE or ranks == 1:
        return in_eight_bits(results, bits if form == ALL_GATHER else 16).clone()
    found = find_groups(groups)
    if form == ALL_GATHER and bits == 16:
        return collectives.reduce_scatter(results, found[0], PURPOSE)
    if form == ALL_GATHER:
        sent = list(quantise_groups(results))
        arrived = collectives.all_to_all(pack(sent), [tokens] * ranks, [tokens] * ranks, found[0], PURPOSE)
        codes, scales = unpack(arrived, sent)
        wide = torch.promote_types(results.dtype, torch.float32)
        return collectives.sum_parts(dequantise_groups(codes, scales, wide).unflatten(0, (ranks, -1)), results.dtype)
    if form == HIERARCHICAL:
        return _return(_return(results, trace[4:], found[1]), trace[:4], found[2])
    back = _return(results, trace, found[0])
    if form == ALL_TO_ALL and tokens:
        return collectives.sum_parts(back.unflatten(0, (tokens, -1)).transpose(0, 1), back.dtype)
    return back
