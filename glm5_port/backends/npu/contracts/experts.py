"""Choosing experts, sorting tokens by expert, and the products of all experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import (
    A2_A3,
    FLOATING,
    WIDEST,
    dense,
    filled,
    of_dims,
    of_dtype,
    same_dtype,
    value,
    width_at_most,
)
from glm5_port.backends.npu.rules import Rule, VendorOperator


def padded_groups_fit(experts: int, groups: int) -> bool:
    """Whether groups padded to whole 32s hold 2048 experts at most."""
    return -(-experts // groups // 32) * 32 * groups <= 2048


GATING_TOP_K = VendorOperator(
    "npu_moe_gating_top_k",
    ("aclnnMoeGatingTopK", "aclnnMoeGatingTopKV2"),
    ("x", "k"),
    A2_A3,
    explicit=(
        "bias",
        "k_group",
        "group_count",
        "group_select_mode",
        "renorm",
        "norm_type",
        "out_flag",
        "routed_scaling_factor",
        "eps",
    ),
    rules=(
        of_dtype("x", *FLOATING),
        of_dims("x", 2),
        same_dtype("bias", "x"),
        of_dims("bias", 1),
        filled("x"),
        width_at_most("x", 2048),
        value("renorm", 0),
        value("norm_type", 1),  # 0 by default, a softmax
        value("group_select_mode", 1),  # 0 by default, the largest instead of the sum of two
        Rule("k_group", "1 to group_count groups kept", lambda k_group, group_count, **_: 1 <= k_group <= group_count),
        Rule(
            "k",
            "1 to the experts of the kept groups",
            lambda x, k, k_group, group_count, **_: 1 <= k <= x.shape[1] // group_count * k_group,
        ),
        Rule(
            "group size",
            "groups of more than 2 experts",
            lambda x, group_count, **_: x.shape[1] % group_count == 0 and x.shape[1] // group_count > 2,
        ),
        Rule(
            "padded groups",
            "groups that padded to whole 32s hold 2048 experts at most",
            lambda x, group_count, **_: padded_groups_fit(x.shape[1], group_count),
        ),
    ),
)
INIT_ROUTING = VendorOperator(
    "npu_moe_init_routing_v2",
    ("aclnnMoeInitRoutingV3",),
    ("x", "expert_idx"),
    A2_A3,
    explicit=(
        "active_num",
        "expert_num",
        "drop_pad_mode",
        "expert_tokens_num_type",
        "expert_tokens_num_flag",
        "quant_mode",
        "active_expert_range",
        "row_idx_type",
    ),
    rules=(
        of_dtype("x", *FLOATING),
        of_dims("x", 2),
        of_dtype("expert_idx", torch.int32),
        of_dims("expert_idx", 2),
        filled("x", "expert_idx"),
        value("drop_pad_mode", 0),
        value("expert_tokens_num_type", 1),
        value("expert_tokens_num_flag", True),
        value("row_idx_type", 0),
        value("quant_mode", -1),
        Rule("expert_num", "0 to 10240 experts", lambda expert_num, **_: 0 <= expert_num <= 10240),
        Rule(
            "active_expert_range",
            "a range of experts inside expert_num",
            lambda active_expert_range, expert_num, **_: 0 <= active_expert_range[0] <= active_expert_range[1] <= expert_num,
        ),
    ),
)
FINALIZE_ROUTING = VendorOperator(
    "npu_moe_finalize_routing",
    ("aclnnMoeFinalizeRouting", "aclnnMoeFinalizeRoutingV2", "aclnnMoeFinalizeRoutingV4"),
    (
        "expanded_permuted_rows",
        "skip1",
        "skip2",
        "bias",
        "scales",
        "expanded_src_to_dst_row",
        "export_for_source_row",
    ),
    ("A2",),
    explicit=("drop_pad_mode",),
    rules=(
        of_dtype("expanded_permuted_rows", *FLOATING),
        same_dtype("scales", "expanded_permuted_rows"),
        of_dtype("expanded_src_to_dst_row", torch.int32),
        value("drop_pad_mode", 3),  # init_routing lays row numbers out by token, and marks absent ones with -1
        of_dims("expanded_permuted_rows", 3),
        of_dims("scales", 2),
        Rule("skip2", "skip2 only beside skip1", lambda skip1, skip2, **_: skip2 is None or skip1 is not None),
    ),
)
_GROUPED = ("group_list", "split_item", "group_type", "group_list_type", "output_dtype")


def _row_dtypes(x: list[Tensor], weight: list[Tensor], **rest: Any) -> tuple[Any, ...]:
    scales = (rest.get("scale"), rest.get("antiquant_scale"))
    return (x[0].dtype, weight[0].dtype, *(None if s is None else s[0].dtype for s in scales))


_W4A8_SCALE = torch.int64
GROUPED_COMBINATIONS = (
    (torch.bfloat16, torch.bfloat16, None, None),
    (torch.float16, torch.float16, None, None),
    (torch.float32, torch.float32, None, None),
    (torch.bfloat16, torch.int32, None, torch.bfloat16),
    (torch.float16, torch.int32, None, torch.float16),
    (torch.int8, torch.int32, _W4A8_SCALE, None),
    (torch.int8, torch.int8, torch.bfloat16, None),
    (torch.int8, torch.int8, torch.float32, None),
)
"""(x, weight, scale, antiquant_scale); an int32 weight holds eight 4-bit codes a word."""
GROUPED_MATMUL = VendorOperator(
    "npu_grouped_matmul",
    ("aclnnGroupedMatmulV4", "aclnnGroupedMatmulV5"),
    ("x", "weight"),
    A2_A3,
    explicit=_GROUPED,  # group_type has no default that selects one
    rules=(
        Rule(
            "dtypes",
            "x, weight, scale and antiquant_scale in one of the documented combinations",
            lambda **a: _row_dtypes(**a) in GROUPED_COMBINATIONS,
        ),
        of_dims("x", 2),
        of_dims("weight", 3),
        dense("x"),
        filled("x"),
        width_at_most("x", WIDEST),
        width_at_most("weight", WIDEST),
        of_dtype("group_list", torch.int64),
        of_dims("group_list", 1),
        Rule("groups", "2 to 1024 groups", lambda group_list, **_: 2 <= group_list.shape[0] <= 1024),
        value("split_item", 2, 3),
        value("group_type", 0),
        value("group_list_type", 1),
        Rule(
            "antiquant_offset",
            "antiquant_offset beside antiquant_scale, in its shape and dtype",
            lambda antiquant_scale=None, antiquant_offset=None, **_: (
                antiquant_scale is None
                or (
                    antiquant_offset is not None
                    and antiquant_offset[0].shape == antiquant_scale[0].shape
                    and antiquant_offset[0].dtype == antiquant_scale[0].dtype
                )
            ),
        ),
        Rule(
            "groups of inputs",
            "whole groups of inputs",
            lambda x, antiquant_scale=None, **_: (
                antiquant_scale is None or antiquant_scale[0].dim() == 2 or x[0].shape[1] % antiquant_scale[0].shape[1] == 0
            ),
        ),
        Rule(
            "assist bias",
            "4-bit weights by 8-bit rows: float32 bias (8 * sum of q * s) and per_token_scale, and output_dtype",
            lambda x, weight, bias=None, per_token_scale=None, output_dtype=None, **_: (
                not (x[0].dtype == torch.int8 and weight[0].dtype == torch.int32)
                or (
                    bias is not None
                    and bias[0].dtype == torch.float32
                    and per_token_scale is not None
                    and per_token_scale[0].dtype == torch.float32
                    and output_dtype is not None
                )
            ),
        ),
    ),
)
