"""Parity cases of `glm5_port.operators.int4_measured`: the bits are the business of `int4_quantize`, the sums of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from glm5_port.operators.cases.int4 import random_weight
from glm5_port.operators.int4_measured import int4_quantize_measured
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite


@suite(int4_quantize_measured, rows=("weight",))
def int4_quantize_measured_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, group_size: int = 32, rule: str = "amax7", std: float = 0.02) -> dict[str, Any]:
        return {"weight": make.normal(*shape, std=std), "group_size": group_size, "rule": rule}

    def outside(make: Make) -> dict[str, Any]:
        """Zeros, groups below 2^-110, scales that float16 does not hold, and what cannot be quantised."""
        made = arguments(make, 9, 64)
        weight = made["weight"]
        weight[0] = 0.0
        weight[1, :32] = -0.0
        weight[2] *= 2.0**-106
        weight[3] *= 2.0**-120
        weight[4, 5] = float("nan")
        weight[5, 6] = float("inf")
        weight[6] *= 2.0**-9
        weight[7] *= torch.finfo(make.dtype).tiny
        weight[8] *= 2.0**20
        return made

    yield Case("no_rows", lambda make: arguments(make, 0, 64))
    yield Case("matrix", lambda make: arguments(make, 48, 256))
    yield Case("experts", lambda make: arguments(make, 3, 16, 96))
    yield Case("group_8", lambda make: arguments(make, 7, 40, group_size=8))
    yield Case("group_128", lambda make: arguments(make, 7, 256, group_size=128))
    yield Case("per_channel", lambda make: arguments(make, 7, 200, group_size=-1))
    yield Case("outside_the_range", outside)
    yield Case("signed8", lambda make: arguments(make, 20, 128, rule="signed8"))
    yield Case("mse", lambda make: arguments(make, 20, 128, rule="mse"))
    yield Sweep(random_weight)
    yield Case("glm5_gate", lambda make: arguments(make, 32, 6144), tags=WIDTH)
