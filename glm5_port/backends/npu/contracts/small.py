"""Norms, rotation, activation, products and the write into the cache."""

from __future__ import annotations

import torch

from glm5_port.backends.npu.contracts.kinds import (
    A2_A3,
    FLOATING,
    FRACTAL_NZ,
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

RMS_NORM = VendorOperator(
    "npu_rms_norm",
    ("aclnnRmsNorm",),
    ("self", "gamma"),
    A2_A3,
    explicit=("epsilon",),  # 1e-6 by default, GLM-5 has 1e-5
    rules=(
        of_dtype("self", *FLOATING),
        Rule(
            "gamma dtype",
            "gamma in the dtype of self, or float32",
            lambda self, gamma, **_: gamma.dtype in (self.dtype, torch.float32),
        ),
    ),
)
ADD_RMS_NORM = VendorOperator(
    "npu_add_rms_norm",
    ("aclnnAddRmsNorm",),
    ("x1", "x2", "gamma"),
    ("A2", "A3", "950DT"),
    explicit=("epsilon",),
    rules=(of_dtype("x1", *FLOATING), same_dtype("x2", "x1"), same_dtype("gamma", "x1"), filled("x1", "x2", "gamma")),
)
ROTARY_MUL = VendorOperator(
    "npu_rotary_mul",
    ("aclnnRotaryPositionEmbedding", "aclnnRotaryPositionEmbeddingV2"),
    ("self", "r1", "r2"),
    A2_A3,
    explicit=("rotary_mode",),  # "half" by default, GLM-5 rotates neighbouring channels
    rules=(
        of_dtype("self", *FLOATING),
        same_dtype("r1", "self"),
        same_dtype("r2", "self"),
        of_dims("self", 3, 4),
        of_dims("r1", 3, 4),
        value("rotary_mode", "half", "interleave"),
        Rule("even width", "an even number of channels", lambda self, **_: self.shape[-1] % 2 == 0),
        filled("self"),
    ),
)
SWIGLU = VendorOperator(
    "npu_swiglu",
    ("aclnnSwiGlu",),
    ("self",),
    A2_A3,  # torch_npu's page lists A2 alone, CANN's page of the kernel both
    explicit=("dim",),
    rules=(
        of_dtype("self", *FLOATING),
        dense("self"),
        filled("self"),
        Rule("two halves", "an even last dimension", lambda self, **_: self.shape[-1] % 2 == 0),
    ),
)
TRANSPOSE_BATCHMATMUL = VendorOperator(
    "npu_transpose_batchmatmul",
    ("aclnnTransposeBatchMatMul",),
    ("input", "weight"),
    A2_A3,
    explicit=("perm_x1", "perm_x2", "perm_y"),
    rules=(
        of_dtype("input", *FLOATING),
        same_dtype("weight", "input"),
        of_dims("input", 3),
        of_dims("weight", 3),
        width_at_most("input", WIDEST),
        width_at_most("weight", WIDEST),
        Rule("perm_x1", "perm_x1=[0, 1, 2] or [1, 0, 2]", lambda perm_x1, **_: perm_x1 in ([0, 1, 2], [1, 0, 2])),
        Rule("perm_x2", "perm_x2=[0, 1, 2]", lambda perm_x2, **_: perm_x2 == [0, 1, 2]),
        Rule("perm_y", "perm_y=[1, 0, 2]", lambda perm_y, **_: perm_y == [1, 0, 2]),
        Rule(
            "row of all heads",
            "fewer than 65536 numbers in a row of all heads",
            lambda input, weight, **_: weight.shape[0] * input.shape[-1] < 65536,
        ),
        Rule(
            "whole 16s",
            "input and output widths of a head in whole 16s",
            lambda weight, **_: weight.shape[1] % 16 == 0 and weight.shape[2] % 16 == 0,
        ),
    ),
)
FORMAT_CAST = VendorOperator(
    "npu_format_cast",
    (),
    ("self", "acl_format"),
    ("A2", "A3", "950DT"),
    rules=(value("acl_format", FRACTAL_NZ), dense("self")),
)
SCATTER_ND_UPDATE = VendorOperator(
    "npu_scatter_nd_update_",
    ("aclnnScatterNdUpdate",),
    ("self", "indices", "updates"),
    A2_A3,
    rules=(
        of_dtype("self", torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8),
        same_dtype("updates", "self"),
        of_dtype("indices", torch.int32, torch.int64),
        Rule("indices dims", "indices of two dimensions or more", lambda indices, **_: indices.dim() >= 2),
        Rule("indices width", "no more indices than dimensions", lambda self, indices, **_: indices.shape[-1] <= self.dim()),
        Rule(
            "updates shape",
            "updates of the shape of indices but its last dimension, then what is left of self",
            lambda self, indices, updates, **_: updates.shape == (*indices.shape[:-1], *self.shape[indices.shape[-1] :]),
        ),
    ),
)
