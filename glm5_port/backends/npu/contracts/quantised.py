"""Quantised products, and what prepares their weights."""

from __future__ import annotations

import torch

from glm5_port.backends.npu.contracts.kinds import (
    A2_A3,
    HALF,
    WIDEST,
    dense,
    filled,
    of_dims,
    of_dtype,
    same_dtype,
    value,
    width_at_most,
    width_multiple,
)
from glm5_port.backends.npu.rules import Rule, VendorOperator

INT4PACK = VendorOperator(
    "npu_convert_weight_to_int4pack",
    (),
    ("weight",),
    A2_A3,
    rules=(
        of_dtype("weight", torch.int32),
        of_dims("weight", 2),  # three dimensions give a wrong shape without an error
        dense("weight"),
        width_multiple("weight", 8),
    ),
)
WEIGHT_QUANT_BATCHMATMUL = VendorOperator(
    "npu_weight_quant_batchmatmul",
    ("aclnnWeightQuantBatchMatmulV2", "aclnnWeightQuantBatchMatmulV3"),
    ("x", "weight", "antiquant_scale", "antiquant_offset"),
    A2_A3,
    explicit=("antiquant_group_size", "inner_precise"),
    rules=(
        of_dtype("x", *HALF),
        of_dims("x", 2),
        of_dtype("weight", torch.int32, torch.int8),
        of_dims("weight", 2),
        same_dtype("antiquant_scale", "x"),
        same_dtype("antiquant_offset", "antiquant_scale"),
        Rule(
            "antiquant_offset shape",
            "antiquant_offset in the shape of antiquant_scale",
            lambda antiquant_scale, antiquant_offset, **_: antiquant_offset.shape == antiquant_scale.shape,
        ),
        filled("x", "weight"),
        width_at_most("x", WIDEST),
        Rule("outputs", "up to 65535 outputs", lambda antiquant_scale, **_: antiquant_scale.shape[-1] <= WIDEST),
        Rule(
            "group size",
            "antiquant_group_size 0 (a whole column), or 32 to inputs - 1 in whole 32s",
            lambda x, antiquant_group_size, **_: group_fits(antiquant_group_size, x.shape[1]),
        ),
        value("inner_precise", 0),
    ),
)


def group_fits(group: int, inputs: int) -> bool:
    return group == 0 or (32 <= group <= inputs - 1 and group % 32 == 0)


DYNAMIC_QUANT = VendorOperator(
    "npu_dynamic_quant",
    ("aclnnDynamicQuant", "aclnnDynamicQuantV2"),
    ("input",),
    A2_A3,
    explicit=("dst_type",),
    rules=(
        of_dtype("input", *HALF),
        Rule("input dims", "two dimensions or more", lambda input, **_: input.dim() >= 2),
        filled("input"),
        value("dst_type", torch.int8),
    ),
)
QUANT_MATMUL = VendorOperator(
    "npu_quant_matmul",
    ("aclnnQuantMatmulV5", "aclnnQuantMatmulWeightNz"),
    ("x1", "x2", "scale"),
    A2_A3,
    explicit=("pertoken_scale", "output_dtype"),  # int8 is what comes out by default
    rules=(
        of_dtype("x1", torch.int8),
        of_dtype("x2", torch.int8),
        of_dims("x1", 2),
        of_dims("x2", 2),
        filled("x1", "x2", "scale"),
        of_dtype("scale", torch.float32),
        of_dims("scale", 1),
        of_dtype("pertoken_scale", torch.float32),
        of_dims("pertoken_scale", 1),
        value("output_dtype", torch.bfloat16, torch.float16),
        width_at_most("x1", WIDEST),
        width_at_most("x2", WIDEST),
    ),
)
