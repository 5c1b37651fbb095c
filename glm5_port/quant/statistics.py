"""How well codes and scales stand for a weight: counted while a weight is quantised, added up for the report.

Shape legend: O rows; I inputs; N groups; g weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.quant.int4 import SMALLEST_AMAX, Int4Tensor, quantize


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


def measure(weight_OI: Tensor, quantized: Int4Tensor, *, requantize: bool) -> Statistics:
    """Compares rows of a weight with their codes and scales.

    Args:
        weight_OI: bfloat16, what was quantised.
        quantized: what it became.
        requantize: quantise the values of the first row once more: the rule `amax7` must give the same codes and scales.
    """
    scales_N = quantized.scales.flatten().to(torch.float32)
    w_Ng = weight_OI.reshape(scales_N.numel(), -1)
    codes_Ng = quantized.codes.view(w_Ng.shape)
    # Few passes, in place: this runs over every weight of a model, beside the quantiser.
    wide_Ng = w_Ng.to(torch.float32)
    values_Ng = codes_Ng.to(torch.float32).mul_(scales_N.unsqueeze(1)).to(torch.bfloat16)
    errors_Ng = values_Ng.to(torch.float32).sub_(wide_Ng).abs_()
    amax_N = wide_Ng.abs_().amax(1)
    smallest = torch.tensor(SMALLEST_AMAX, dtype=torch.int16).view(torch.bfloat16).item()
    ordinary_N = amax_N >= smallest
    zero_N = amax_N == 0
    largest_N = errors_Ng.amax(1).div_(amax_N).where(ordinary_N, 0.0)
    groups = quantized.scales.shape[-1] if requantize else 0
    unstable = _unstable_groups(values_Ng[:groups], quantized) if requantize else 0
    return Statistics(
        weights=w_Ng.numel(),
        groups=scales_N.numel(),
        at_limit=int(torch.count_nonzero(codes_Ng.abs() >= 7)),
        zero_groups=int(torch.count_nonzero(zero_N)),
        tiny_groups=int(torch.count_nonzero(~ordinary_N & ~zero_N)),
        fp16_unsafe_scales=int(torch.count_nonzero(scales_N.to(torch.float16).to(torch.float32) != scales_N)),
        error_sum=float(errors_Ng.sum()),
        magnitude_sum=float(wide_Ng.sum()),
        max_error=float(largest_N.amax()),
        requantized_groups=groups,
        unstable_groups=unstable,
    )


def _unstable_groups(values_Ng: Tensor, quantized: Int4Tensor) -> int:
    """Groups of the first row that come out different when their values are quantised again."""
    again = quantize(values_Ng.reshape(1, -1), quantized.rule)
    different_N = (again.codes != quantized.codes[:1]).view(values_Ng.shape).any(1) | (again.scales[0] != quantized.scales[0])
    return int(torch.count_nonzero(different_N))
