"""Choosing experts, sorting rows by expert, the products of all experts, and putting rows back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.npu_runtime.bodies.calling import body, require, undefined
from tests.npu_runtime.bodies.quantised import antiquantised, quantised_rows, scale_values, unpacked

FLOATING = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 65535


@body("npu_moe_gating_top_k", kernels=("aclnnMoeGatingTopK", "aclnnMoeGatingTopKV2"), chips=("A2", "A3"))
def moe_gating_top_k(a: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    require(a.x.dim() == 2 and a.x.dtype in FLOATING, "x of two dimensions, floating")
    tokens, experts = a.x.shape
    require(a.bias is None or (a.bias.dtype == a.x.dtype and a.bias.shape == (experts,)), "bias [experts] in the dtype of x")
    require(
        a.renorm == 0 and a.norm_type in (0, 1) and a.group_select_mode in (0, 1), "renorm 0, norm_type and group mode 0 or 1"
    )
    require(experts <= 2048 and experts % a.group_count == 0, "2048 experts at most, in whole groups")
    size = experts // a.group_count
    require(size > 2 and 1 <= a.k_group <= a.group_count, "groups of more than 2 experts")
    require(1 <= a.k <= a.k_group * size, "k within the experts of the kept groups")
    require(-(-size // 32) * 32 * a.group_count <= 2048, "groups that padded to whole 32s hold 2048 experts at most")
    require(a.input_ids is None and a.tid2eid is None, "no body with a table of tokens")
    x = a.x.float()
    scores = torch.sigmoid(x) if a.norm_type == 1 else x.softmax(-1)
    biased = scores if a.bias is None else scores + a.bias.float()
    if a.k_group < a.group_count:
        grouped = biased.view(tokens, a.group_count, size)
        best = grouped.sort(dim=-1, descending=True).values
        strength = best[..., :2].sum(-1) if a.group_select_mode == 1 else best[..., 0]
        kept = strength.sort(dim=-1, descending=True, stable=True).indices[:, : a.k_group]
        dropped = torch.ones(tokens, a.group_count, dtype=torch.bool).scatter(1, kept, False)
        biased = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, : a.k]
    weights = scores.gather(1, chosen)
    if a.norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + a.eps)
    return (weights * a.routed_scaling_factor).to(a.x.dtype), chosen.int(), scores if a.out_flag else None


@body("npu_moe_init_routing_v2", kernels=("aclnnMoeInitRoutingV3",), chips=("A2", "A3"))
def moe_init_routing_v2(a: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    require(a.x.dim() == 2 and a.x.dtype in (*FLOATING, torch.int8), "x of two dimensions")
    require(a.expert_idx.dim() == 2 and a.expert_idx.dtype == torch.int32, "expert_idx of two dimensions, int32")
    require(a.drop_pad_mode == 0, "no body with dropped rows")
    require(a.quant_mode in (-1, 1), "no body but unquantised and dynamic int8")
    require(a.expert_num > 0 and bool(((a.expert_idx >= 0) & (a.expert_idx < a.expert_num)).all()), "experts below expert_num")
    require(a.expert_num <= (5120 if a.expert_tokens_num_type == 2 else 10240), "10240 experts at most, 5120 as pairs")
    first, last = list(a.active_expert_range) or [0, a.expert_num]
    require(0 <= first <= last <= a.expert_num, "a range of experts inside expert_num")
    flat, choices, width = a.expert_idx.reshape(-1).long(), a.expert_idx.shape[1], a.x.shape[1]
    inside = (flat >= first) & (flat < last)
    sorted_rows = torch.where(flat >= first, flat, a.expert_num).sort(stable=True).indices
    order = sorted_rows[: int(inside.sum())]
    limit = flat.numel() if a.active_num in (-1, 0) else min(a.active_num, flat.numel())
    rows = undefined((limit, width), torch.int8 if a.quant_mode == 1 else a.x.dtype)
    scales = undefined((limit,), torch.float32)
    moved = a.x[order[:limit] // choices]
    if a.quant_mode == 1:
        smooth = a.scale is not None and moved.numel() > 0
        factor = a.scale.expand(last - first, width)[flat[order[:limit]] - first] if smooth else 1.0
        rows[: moved.shape[0]], scales[: moved.shape[0]] = quantised_rows(moved.float() * factor)
    else:
        rows[: moved.shape[0]] = moved
        if a.scale is not None:
            scales[: moved.shape[0]] = a.scale[order[:limit] // choices]
    if a.row_idx_type == 0:
        index = torch.full((flat.numel(),), -1, dtype=torch.int32)
        index[order] = torch.arange(order.numel(), dtype=torch.int32)
    else:
        index = sorted_rows.int()  # its tail is not defined; the vendor's own tests read it as the sort going on
    counts = torch.bincount(flat[order] - first, minlength=last - first)
    return rows, index, _counted(a, counts, first), scales if a.quant_mode == 1 or a.scale is not None else None


def _counted(a: Any, counts: Tensor, first: int) -> Tensor | None:
    if not a.expert_tokens_num_flag:
        return None
    if a.expert_tokens_num_type == 0:
        return counts.cumsum(0)
    if a.expert_tokens_num_type == 1:
        return counts
    pairs = torch.zeros(a.expert_num, 2, dtype=torch.int64)
    present = counts.nonzero()[:, 0]
    pairs[: present.numel(), 0], pairs[: present.numel(), 1] = present + first, counts[present]
    return pairs


@body(
    "npu_moe_finalize_routing",
    kernels=("aclnnMoeFinalizeRouting", "aclnnMoeFinalizeRoutingV2", "aclnnMoeFinalizeRoutingV3", "aclnnMoeFinalizeRoutingV4"),
    chips=("A2",),
)
def moe_finalize_routing(a: Any) -> Tensor:
    dtype, width, mode = a.expanded_permuted_rows.dtype, a.expanded_permuted_rows.shape[-1], a.drop_pad_mode or 0
    others = [t for t in (a.skip1, a.skip2, a.bias, a.scales) if t is not None]
    require(all(t.dtype == dtype for t in others) and dtype in FLOATING, "one floating dtype")
    require(a.expanded_src_to_dst_row.dtype == torch.int32, "row numbers of int32")
    require(a.skip2 is None or a.skip1 is not None, "skip2 only beside skip1")
    require(
        a.expanded_permuted_rows.dim() == (3 if mode in (1, 3) else 2), "rows [E, C, H] in the dropping modes, else [rows, H]"
    )
    rows = a.expanded_permuted_rows.reshape(-1, width).float()
    choices = a.scales.shape[1] if a.scales is not None else 1
    tokens = a.expanded_src_to_dst_row.numel() // choices
    places = a.expanded_src_to_dst_row.long()
    places = places.view(choices, tokens).T if mode in (0, 1) else places.view(tokens, choices)
    lowest = -1 if mode in (1, 3) else 0
    require(bool(((places >= lowest) & (places < rows.shape[0])).all()), f"row numbers from {lowest} to the last row")
    out = torch.zeros(tokens, width)
    for skip in (a.skip1, a.skip2):
        out = out if skip is None else out + skip.float()
    for choice in range(choices):
        place = places[:, choice]
        row = torch.where((place >= 0)[:, None], rows[place.clamp(min=0)], 0.0)
        if a.bias is not None:
            row = row + a.bias.float()[a.export_for_source_row[:, choice].long()]
        out = out + (row if a.scales is None else a.scales[:, choice, None].float() * row)
    return out.to(dtype)


GROUPED_KERNELS = tuple(f"aclnnGroupedMatmul{version}" for version in ("", "V2", "V3", "V4", "V5", "WeightNz"))
ACTIVATIONS = {0: lambda y: y, 1: F.relu, 2: lambda y: F.gelu(y, approximate="tanh"), 5: F.silu}


def _group_ends(a: Any) -> list[int] | None:
    if a.group_list is None:
        return None
    if isinstance(a.group_list, Tensor):
        require(a.group_list.dtype == torch.int64 and a.group_list.dim() == 1, "group_list of int64, one dimension")
        require(a.group_type in (0, -1), "group_type 0 (rows), given explicitly")
        values = a.group_list.tolist()
        if a.group_list_type == 1:
            require(len(values) != 1, "counts of more than one group")
            values = torch.tensor(values).cumsum(0).tolist()
        else:
            require(not a.group_list_type, "no body for pairs of group and count")
    else:
        values = list(a.group_list)
    require(all(x <= y for x, y in zip([0, *values], values, strict=False)), "groups in order")
    return values


def _matrices(a: Any) -> list[Tensor]:
    weights = [unpacked(t) if t.dtype == torch.int32 else t for t in a.weight]
    if len(weights) == 1 and weights[0].dim() == 3:
        require(len(weights[0]) <= 1024, "1024 groups at most")
        return list(weights[0])
    require(len(weights) <= 128, "128 weights at most")
    return weights


def _of_group(values: Any, group: int, groups: int) -> Tensor | None:
    """What belongs to a group: an entry of a list, or a row of its only tensor."""
    if not values:
        return None
    return values[group] if len(values) == groups and (groups > 1 or values[0].shape[0] != 1) else values[0][group]


@body("npu_grouped_matmul", "npu_grouped_matmul.List", kernels=GROUPED_KERNELS, chips=("A2", "A3"))
def grouped_matmul(a: Any) -> list[Tensor]:
    matrices, ends = _matrices(a), _group_ends(a)
    require(all(t.shape[-1] <= WIDEST for t in (*a.x, *matrices)), "last dimensions of 65535 at most")
    require(a.split_item in (0, 1, 2, 3) and a.act_type in ACTIVATIONS, "split_item 0 to 3, an activation with a body")
    require(a.offset in (None, []), "no offset")
    packed_x, single_out = len(a.x) == 1 and ends is not None, a.split_item in (2, 3)
    starts = [0, *(ends or [])[:-1]]
    xs = [a.x[0][s:e] for s, e in zip(starts, ends, strict=True)] if packed_x else list(a.x)
    require(len(xs) == len(matrices), "as many groups as weights")
    token_scale = a.per_token_scale[0] if a.per_token_scale else None
    results = []
    for group, (x, weight) in enumerate(zip(xs, matrices, strict=True)):
        mine = None if token_scale is None else token_scale[starts[group] : (ends or [0])[group]]
        results.append(ACTIVATIONS[a.act_type](_group_product(a, x, weight, group, len(matrices), mine)))
    dtype = _result_dtype(a)
    if not single_out:
        return [result.to(dtype) for result in results]
    total = a.x[0].shape[0] if packed_x else sum(x.shape[0] for x in xs)
    out = undefined((total, matrices[0].shape[-1]), dtype)
    start = 0
    for result in results:
        out[start : start + result.shape[0]] = result.to(dtype)
        start += result.shape[0]
    return [out]


def _result_dtype(a: Any) -> torch.dtype:
    if isinstance(a.output_dtype, torch.dtype):
        return a.output_dtype
    if a.output_dtype is not None:
        return _by_number(a.output_dtype)
    require(a.x[0].dtype != torch.int8 or not a.per_token_scale, "output_dtype, where rows are quantised")
    return a.x[0].dtype


def _by_number(number: int) -> torch.dtype:
    """torch's numbers of dtypes, as the front end passes them."""
    import torch_npu  # noqa: F401 - its numbers from 256 on are other types

    numbers = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
    require(number in numbers, f"no body for results of dtype number {number}")
    return numbers[number]


def _group_product(a: Any, x: Tensor, weight: Tensor, group: int, groups: int, token_scale: Tensor | None) -> Tensor:
    """One group's rows times its weight, in float32, by the formula of its dtypes."""
    bias = _of_group(a.bias, group, groups)
    if a.antiquant_scale:
        require(bool(a.antiquant_offset), "antiquant_offset beside antiquant_scale")
        scale, offset = _of_group(a.antiquant_scale, group, groups), _of_group(a.antiquant_offset, group, groups)
        require(scale.dtype == offset.dtype == x.dtype, "antiquant_scale and antiquant_offset in the dtype of x")
        product = x.float() @ antiquantised(weight, scale, offset, x.dtype)
        return product if bias is None else product + bias.float()
    if x.dtype != torch.int8:
        require(x.dtype == weight.dtype and x.dtype in FLOATING, "x and weight of one floating dtype")
        allowed = torch.float16 if x.dtype == torch.float16 else torch.float32
        require(bias is None or bias.dtype == allowed, "bias of float16 for float16, else of float32")
        product = x.float() @ weight.float()
        return product if bias is None else product + bias.float()
    scale = _of_group(a.scale, group, groups)
    if a.weight[0].dtype == torch.int32:
        return _four_bits_by_eight(x, weight, scale, bias, token_scale)
    return _eight_bits(x, weight, scale, bias, token_scale)


def _four_bits_by_eight(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, token_scale: Tensor | None
) -> Tensor:
    """The kernel splits a row's byte into two 4-bit halves, high and low, the low one shifted by 8 to be signed: what that takes
    off, 8 times the sum of a column's weights, is what bias must put back."""
    require(scale is not None and scale.dtype == torch.int64, "scale of int64 that holds the bits of float32")
    require(bias is not None and bias.dtype == torch.float32, "bias of float32 with 8 times the sums of the columns")
    require(token_scale is not None and token_scale.dtype == torch.float32, "per_token_scale of float32")
    factors = scale_values(scale)
    factors = factors if factors.dim() == 2 else factors[None]
    require(x.shape[1] % factors.shape[0] == 0, "whole groups of inputs")
    high, low = x.float().div(16).floor(), x.float().remainder(16) - 8
    decoded = weight.float() * factors.repeat_interleave(x.shape[1] // factors.shape[0], dim=0)
    product = (16 * (high @ decoded) + low @ decoded + bias) * token_scale[:, None]
    x.copy_(undefined(x.shape, x.dtype))  # the kernel uses the rows as its workspace, says the vendor's test
    return product


def _eight_bits(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, token_scale: Tensor | None) -> Tensor:
    require(weight.dtype == torch.int8, "weight of int8 or packed int32")
    product = (x.double() @ weight.double()).float()
    if bias is not None and bias.dtype == torch.int32:
        product, bias = product + bias.float(), None
    if scale is None:
        return product
    product = product * (scale_values(scale) if scale.dtype == torch.int64 else scale.float())
    product = product if token_scale is None else product * token_scale[:, None]
    return product if bias is None else product + bias.float()
