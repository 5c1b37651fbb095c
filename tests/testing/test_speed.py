"""What `glm5-port bench` times: the kernel alone, with weights prepared before the clock runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from glm5_port.config import released
from glm5_port.registry import PORTABLE
from glm5_port.testing import speed
from glm5_port.testing.cases import Make
from glm5_port.testing.parity import implementations_on
from glm5_port.testing.speed import Ceilings, time_workload
from glm5_port.testing.tiny import tiny_config
from glm5_port.testing.workloads import Workload
from glm5_port.testing.workloads_rest import all_workloads


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


def test_every_operator_of_cuda_has_a_floor_and_its_call_fits() -> None:
    """At the tiny model's widths: what a workload builds is taken by the operator's reference."""
    own = {i.operator.name for i in implementations_on("cuda") if i.backend == "cuda"}
    made = list(all_workloads(tiny_config(), prefill=8, context=64))
    names = [(workload.operator.name, workload.name) for workload in made]
    assert len(set(names)) == len(names)
    assert own <= {workload.operator.name for workload in made}
    for workload in made:
        arguments = workload.build(Make("/".join((workload.operator.name, workload.name)), torch.bfloat16))
        workload.operator.facts_of(arguments)
        with torch.no_grad():
            workload.operator.reference(**arguments)
        assert workload.bytes(arguments) > 0 and workload.operations >= 0


def test_floors_of_glm5_are_those_of_the_issue() -> None:
    """By hand: 128K index keys of 128 in bfloat16; 2048 selected rows of 576 for 64 heads; 8 experts of 37.7 million weights."""
    made = {(w.operator.name, w.name): w for w in all_workloads(released("GLM-5.2"), prefill=64, context=131_072)}
    sizes = {"index_query": (1, 32, 128), "head_weights": (1, 32), "query_latent": (1, 64, 512), "query_rope": (1, 64, 64)}
    fake = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in sizes.items()}
    cache = [torch.empty(2048, 64, 128, dtype=torch.bfloat16, device="meta")]
    indexer = made["lightning_indexer", "decode, context 131072"]
    assert indexer.bytes({**fake, "index_cache": cache}) == 131_072 * 256 + (32 * 128 + 32) * 2 + 4 * 2048
    assert indexer.operations == 2 * 131_072 * 32 * 129
    attention = made["sparse_mla_attention", "decode, context 131072"]
    assert attention.bytes(fake) == 2048 * 576 * 2 + 64 * (2 * 512 + 64) * 2
    assert attention.operations == 2 * 64 * 2048 * (2 * 512 + 64)
    quantised = made["sparse_mla_attention", "decode, context 131072, fp8 rows"]
    assert quantised.bytes(fake) == 2048 * 656 + 64 * (2 * 512 + 64) * 2
    experts = made["expert_mlp_int4", "decode, context 131072, 16 experts"]
    assert experts.operations == 2 * 8 * 3 * 6144 * 2048


class Events:
    """A device's clock on which everything takes 3 ms."""

    log: ClassVar[list[str]] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Events.log.append("record")

        def synchronize(self) -> None:
            Events.log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 3.0


def test_a_device_is_timed_by_its_own_clock_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eraser:
        def zero_(self) -> None:
            Events.log.append("erase")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Events)
    monkeypatch.setattr(speed, "_eraser", lambda device: Eraser())
    monkeypatch.setattr(speed, "synchronize", lambda device: Events.log.append("wait"))
    Events.log.clear()
    assert speed.median_seconds(lambda: Events.log.append("call"), "xpu", budget=0.0, least=2) == 3e-3
    assert Events.log == ["call", "wait", *2 * ["erase", "record", "call", "record", "wait"]]
