"""What `glm5-port bench` times: the kernel alone, with weights prepared before the clock runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.registry import PORTABLE
from glm5_port.testing import speed
from glm5_port.testing.speed import Ceilings, time_workload
from glm5_port.testing.workloads import Workload


class FixedMachine:
    """Ceilings that nobody measured."""

    def ceilings(self) -> Ceilings:
        return Ceilings(bandwidth=1e9, matmul_rate=1e12)


def scaled_rows(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _workload(operator: Any) -> Workload:
    return Workload(
        operator=operator,
        name="two rows",
        build=lambda make: {"x": make.normal(2, 8), "weight": make.normal(4, 8)},
        bytes=lambda arguments: 4 * arguments["weight"].numel(),
        operations=128.0,
    )


def test_weights_are_prepared_once_outside_the_timed_call(declare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    operator = declare(scaled_rows, weights=("weight",))
    events: list[str] = []

    class Transposed:
        def __init__(self, facts: Mapping[str, Any]) -> None:
            events.append("prepare")

        def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
            self._weight = tensors["weight"].t().contiguous()

        def finish(self) -> dict[str, Tensor | int]:
            return {"transposed": self._weight}

    def multiply(x: Tensor, *, transposed: Tensor) -> Tensor:
        events.append("call")
        return x @ transposed

    operator.implement(PORTABLE, variant="transposed", prepare=Transposed, fake=lambda x, transposed: x.new_empty(2, 4))(multiply)

    def timed(call: Callable[[], Any], device: str) -> float:
        events.append("clock")
        for _ in range(3):
            call()
        return 2e-3

    monkeypatch.setattr(speed, "median_seconds", timed)
    timing = time_workload(
        _workload(operator),
        operator.implementations["torch/transposed"],
        dtype=torch.float32,
        device="cpu",
        machine=FixedMachine(),  # type: ignore[arg-type]
        refused=None,
    )
    assert events == ["prepare", "clock", "call", "call", "call"]
    assert timing.seconds == 2e-3
    assert timing.floor_seconds == pytest.approx(128 / 1e9)
    assert timing.share == pytest.approx(64e-6)


def test_a_red_implementation_gets_its_floor_and_no_time(declare: Callable[..., Any]) -> None:
    operator = declare(scaled_rows, weights=("weight",))
    timing = time_workload(
        _workload(operator),
        operator.implementations["reference"],
        dtype=torch.float32,
        device="cpu",
        machine=FixedMachine(),  # type: ignore[arg-type]
        refused="parity is red",
    )
    assert (timing.seconds, timing.share, timing.refused) == (None, None, "parity is red")
