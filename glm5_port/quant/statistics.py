"""How well codes and scales stand for a weight: counted while a weight is quantised, added up for the report.

Shape legend: O rows; I inputs; G groups of a row; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5_port.dispatch import Bound
from glm5_port.operators.int4_measured import STATISTICS, int4_quantize_measured
from glm5_port.quant.int4 import SMALLEST_AMAX, Int4Rule, dequantize_packed, quantize_packed, refuse_bad_scales
from glm5_port.quant.packing import unpack_int4

_SUMS = ("error_sum", "magnitude_sum", "max_error")
"""Statistics that are no counts."""


@dataclass(slots=True)
class Statistics:
    """Counts and errors of one weight, or of many.

    Attributes:
        weights, groups: how many.
        at_limit: codes of magnitude 7 (or -8).
        zero_groups: groups of nothing but zeros.
        tiny_groups: other groups below the rule's smallest maximum (2^-110); all their codes are 0.
        fp16_unsafe_scales: scales that float16 does not hold exactly.
        error_sum, magnitude_sum: of |w - value| and of |w|.
        max_error: the largest |w - value| / amax of its group; tiny groups are left out.
        requantized_groups, unstable_groups: groups whose values were quantised again, and those that came out different.
    """

    weights: int = 0
    groups: int = 0
    at_limit: int = 0
    zero_groups: int = 0
    tiny_groups: int = 0
    fp16_unsafe_scales: int = 0
    error_sum: float = 0.0
    magnitude_sum: float = 0.0
    max_error: float = 0.0
    requantized_groups: int = 0
    unstable_groups: int = 0

    def add(self, other: Statistics) -> None:
        """Adds another weight's, or another block's."""
        for name in self.__slots__:
            mine, others = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, others) if name == "max_error" else mine + others)

    def summary(self) -> dict[str, Any]:
        """What a report shows."""
        return {
            "weights": self.weights,
            "groups": self.groups,
            "mean_relative_error": self.error_sum / self.magnitude_sum if self.magnitude_sum else 0.0,
            "max_relative_error": self.max_error,
            "codes_at_limit": self.at_limit / self.weights if self.weights else 0.0,
            "zero_groups": self.zero_groups,
            "tiny_groups": self.tiny_groups,
            "fp16_unsafe_scales": self.fp16_unsafe_scales,
            "requantized_groups": self.requantized_groups,
            "unstable_groups": self.unstable_groups,
        }


def total(parts: Iterable[Statistics]) -> Statistics:
    """All of them together."""
    result = Statistics()
    for part in parts:
        result.add(part)
    return result


def measure(weight_OI: Tensor, packed: Tensor, scales: Tensor) -> Statistics:
    """Compares rows of a weight with their codes and scales.

    Args:
        weight_OI: bfloat16, what was quantised.
        packed: [O, I / 8] int32, canonical words.
        scales: [O, G] bfloat16.
    """
    return _summed(measure_rows(weight_OI, packed, scales), weight_OI, scales)


def quantize_measured(rows_OI: Tensor, rule: Int4Rule, *, name: str, requantize: bool) -> tuple[Tensor, Tensor, Statistics]:
    """(words, scales, statistics) of rows of a weight, by the CPU's implementation of `int4_quantize_measured`.

    Args:
        rows_OI: bfloat16, on the CPU.
        rule: and its group size.
        name: for errors.
        requantize: quantise the values of the first row once more: the rule `amax7` must give the same codes and scales.

    Raises:
        InputError: as `glm5_port.quant.int4.quantize`.
    """
    packed, scales, measured = _quantizer(rows_OI.shape[1], rule, rows_OI.dtype)(
        rows_OI, group_size=rule.group_size, rule=rule.name
    )
    refuse_bad_scales(scales, rows_OI, rule, name)
    statistics = _summed(measured, rows_OI, scales)
    if requantize and rows_OI.shape[0]:
        statistics.requantized_groups = scales.shape[1]
        statistics.unstable_groups = _unstable_groups(packed[:1], scales[:1], rule)
    return packed, scales, statistics


@cache
def _quantizer(width: int, rule: Int4Rule, dtype: torch.dtype) -> Bound:
    """Exports run on the CPU, whatever backend computes models."""
    facts = {"device_type": "cpu", "dtype": dtype, "width": width, "group_size": rule.group_size, "rule": rule.name}
    return int4_quantize_measured.bind(backend="cpu", **facts)


def measure_rows(weight_OI: Tensor, packed: Tensor, scales_OG: Tensor) -> Tensor:
    """The statistics of each row, [O, 7] float32 in the order of `glm5_port.operators.int4_measured.STATISTICS`: portable, in few
    passes and in place, since it runs over every weight of a model.

    Args:
        weight_OI: any floating dtype, what was quantised.
        packed: [O, I / 8] int32, canonical words.
        scales_OG: bfloat16.
    """
    groups = scales_OG.shape[1]
    w_OGg = weight_OI.to(torch.bfloat16).to(torch.float32).unflatten(-1, (groups, -1))
    codes_OGg = unpack_int4(packed).unflatten(-1, (groups, -1))
    wide_OG = scales_OG.to(torch.float32)
    errors_OGg = codes_OGg.to(torch.float32).mul_(wide_OG.unsqueeze(-1)).to(torch.bfloat16).to(torch.float32).sub_(w_OGg).abs_()
    sizes_OGg = w_OGg.abs_()
    amax_OG = sizes_OGg.amax(-1)
    zero_OG = amax_OG == 0
    ordinary_OG = amax_OG >= torch.tensor(SMALLEST_AMAX, dtype=torch.int16).view(torch.bfloat16).item()
    columns = (
        torch.count_nonzero((codes_OGg >= 7) | (codes_OGg <= -7), dim=(1, 2)),
        torch.count_nonzero(zero_OG, dim=1),
        torch.count_nonzero(~ordinary_OG & ~zero_OG, dim=1),
        torch.count_nonzero(wide_OG.to(torch.float16).to(torch.float32) != wide_OG, dim=1),
        errors_OGg.sum((1, 2)),
        sizes_OGg.sum((1, 2)),
        torch.where(ordinary_OG, errors_OGg.amax(-1) / amax_OG, 0.0).amax(-1),
    )
    measured = torch.stack([column.to(torch.float32) for column in columns], dim=-1)
    return torch.where(scales_OG.isnan().any(-1, keepdim=True), 0.0, measured)


def _summed(measured: Tensor, weight: Tensor, scales: Tensor) -> Statistics:
    rows = measured.numpy()
    sums = dict(zip(STATISTICS, rows.sum(0, dtype=np.float64).tolist(), strict=True))
    counts = {name: int(value) for name, value in sums.items() if name not in _SUMS}
    return Statistics(
        weights=weight.numel(),
        groups=scales.numel(),
        **counts,
        error_sum=sums["error_sum"],
        magnitude_sum=sums["magnitude_sum"],
        max_error=float(rows[:, STATISTICS.index("max_error")].max(initial=0.0)),
    )


def _unstable_groups(packed: Tensor, scales: Tensor, rule: Int4Rule) -> int:
    """Groups of a row that come out different when their values are quantised again."""
    again, again_scales = quantize_packed(dequantize_packed(packed, scales), rule)
    different = (unpack_int4(again) != unpack_int4(packed)).view(scales.shape[1], -1).any(1) | (again_scales != scales)[0]
    return int(torch.count_nonzero(different))
