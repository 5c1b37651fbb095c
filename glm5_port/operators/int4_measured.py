"""The quantiser with what it costs, counted in the same pass: what an export runs over every weight of a model.

Shape legend: I inputs of a row; G groups of a row; g weights of a group; S statistics; ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.operators.int4 import int4_quantize
from glm5_port.quant.int4 import SMALLEST_AMAX, groups_of
from glm5_port.quant.packing import unpack_int4
from glm5_port.registry import Budget

STATISTICS = ("at_limit", "zero_groups", "tiny_groups", "fp16_unsafe_scales", "error_sum", "magnitude_sum", "max_error")
"""The statistics of a row, in the order of the last dimension."""


def _fake(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    packed, scales = int4_quantize.fake(weight, group_size=group_size, rule=rule)
    return packed, scales, weight.new_empty((*weight.shape[:-1], len(STATISTICS)), dtype=torch.float32)


@operator(
    facts={
        "width": lambda weight, **_: weight.shape[-1],
        "group_size": lambda group_size, **_: group_size,
        "rule": lambda rule, **_: rule,
    },
    fake=_fake,
    budget=Budget(factor=1.0, floor=0.0, summation=16.0),
)
def int4_quantize_measured(weight: Tensor, *, group_size: int, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """`int4_quantize`, and for each row what rounding did to it.

    With w = bf16(weight), value = bf16(q * s) and amax the largest |w| of a group:

        at_limit            codes of magnitude 7 or 8
        zero_groups         groups of nothing but zeros
        tiny_groups         other groups with amax below 2^-110
        fp16_unsafe_scales  scales that float16 does not hold exactly
        error_sum           sum of |w - value|
        magnitude_sum       sum of |w|
        max_error           the largest |w - value| / amax, of groups with amax from 2^-110

    Args:
        weight: [..., in], any floating dtype.
        group_size: inputs that share a scale; -1: a whole row.
        rule: "amax7", "signed8" or "mse".

    Returns:
        packed: [..., in / 8] int32, canonical words, bit for bit those of `int4_quantize`.
        scales: [..., in / g] bfloat16, likewise.
        statistics: [..., 7] float32, in the order of `STATISTICS`.

    Contract:
        Counts are exact up to rows of 2^24 weights; sums may be taken in any order. Rows with NaN, infinity or a magnitude above
        2^127 have a scale NaN, and statistics that mean nothing: all zeros here. No rows: empty results.

    Raises:
        InputError: an unknown rule, or a group size that does not divide the rows.

    Source: what `glm5-port export` reports.
    """
    packed, scales = int4_quantize.reference(weight, group_size=group_size, rule=rule)
    groups, size = groups_of(weight.shape[-1], group_size)
    w = weight.to(torch.bfloat16).to(torch.float64).unflatten(-1, (groups, size))
    codes = unpack_int4(packed).unflatten(-1, (groups, size)).to(torch.float64)
    errors = (w - (codes * scales.to(torch.float64).unsqueeze(-1)).to(torch.bfloat16)).abs()
    amax = w.abs().amax(-1)
    zero, ordinary = amax == 0, amax >= torch.tensor(SMALLEST_AMAX, dtype=torch.int16).view(torch.bfloat16).double().item()
    exact = scales.to(torch.float16).to(torch.float64) == scales
    columns = (
        (codes.abs() >= 7).sum((-1, -2)),
        zero.sum(-1),
        (~zero & ~ordinary).sum(-1),
        (~exact).sum(-1),
        errors.sum((-1, -2)),
        w.abs().sum((-1, -2)),
        torch.where(ordinary, errors.amax(-1) / amax, 0.0).amax(-1),
    )
    statistics = torch.stack([column.to(torch.float32) for column in columns], dim=-1)
    return packed, scales, torch.where(scales.isnan().any(-1, keepdim=True), 0.0, statistics)
