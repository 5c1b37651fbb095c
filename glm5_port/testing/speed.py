"""Timing of operators beside the machine's own ceilings, measured in the same run. No speed without parity.

Times are medians of repeated calls; shares of the floor are ratios inside one run, so that a noisy or throttled machine moves
both sides.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from glm5_port.registry import Implementation
from glm5_port.testing.calls import prepared_arguments, to_device
from glm5_port.testing.cases import WIDTH, Make
from glm5_port.testing.parity import run
from glm5_port.testing.workloads import Workload

HOST_BUDGET, DEVICE_BUDGET = 1.0, 0.25
"""Seconds for the timing of a call."""
ERASED = 512 * 2**20
"""Bytes written before each call on a device: several times its second-level cache."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine reaches with plain torch.

    Attributes:
        bandwidth: bytes per second: read by a sum on the CPU, read and written by a copy on a device, larger than the caches.
        matmul_rate: floating-point operations per second of a square matmul in the working dtype.
    """

    bandwidth: float
    matmul_rate: float


@dataclass(slots=True)
class Timing:
    """One workload on one implementation.

    Attributes:
        seconds: median of a call; None when parity is red or the implementation declines.
        floor_seconds: the larger of bytes / bandwidth and operations / matmul rate.
        ceilings: what the machine reached just before.
        refused: why no speed is shown, or None.
    """

    operator: str
    workload: str
    implementation: str
    dtype: str
    bytes: int
    operations: float
    seconds: float | None
    floor_seconds: float
    ceilings: Ceilings
    refused: str | None

    @property
    def share(self) -> float | None:
        """How much of the floor is reached: 1 means as fast as the ceilings allow."""
        return None if not self.seconds else self.floor_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def synchronize(device: str) -> None:
    """Waits until the device has finished what was asked of it."""
    if device != "cpu":
        torch.accelerator.synchronize()


def median_seconds(call: Callable[[], Any], device: str, *, budget: float | None = None, least: int = 5) -> float:
    """Median time of a call over at least `least` runs and about `budget` seconds, after one warm-up.

    On the CPU by the host's clock, on warm inputs. On a device by its own clock, from a graph where a call can be captured, so
    that the host's work does not count; each call finds what it reads in memory, not in the second-level cache, as in a model.
    """
    if budget is None:
        budget = HOST_BUDGET if device == "cpu" else DEVICE_BUDGET
    call()
    synchronize(device)
    time_once = _host_timer(call) if device == "cpu" else _device_timer(call, device)
    times: list[float] = []
    until = time.perf_counter() + budget
    while len(times) < least or (time.perf_counter() < until and len(times) < 1000):
        times.append(time_once())
    return statistics.median(times)


def _host_timer(call: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return once


def _device_timer(call: Callable[[], Any], device: str) -> Callable[[], float]:
    event = torch.get_device_module(device).Event
    run, eraser = _captured(call) if device == "cuda" else call, _eraser(device)

    def once() -> float:
        eraser.zero_()
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3  # from milliseconds

    return once


@functools.cache
def _eraser(device: str) -> torch.Tensor:
    return torch.empty(ERASED, dtype=torch.int8, device=device)


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the device, as portable implementations may
        torch.cuda.synchronize()
        return call
    return graph.replay


class Machine:
    """Measures what this machine reaches with torch's own kernels and the current number of threads. Measured anew beside each
    workload, because clocks and neighbours change within seconds (AMX alone runs in two speeds)."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        numbers, side = (64 * 2**20, 2048) if device == "cpu" else (256 * 2**20, 8192)  # beyond any last-level cache
        self._values = torch.ones(numbers, dtype=torch.float32, device=device)
        self._target = None if device == "cpu" else torch.empty_like(self._values)
        self._factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]

    def ceilings(self) -> Ceilings:
        a, b = self._factors
        budget = 0.2 if self._device == "cpu" else 0.05
        target, moved = self._target, self._values.numel() * 4
        if target is None:
            bandwidth = moved / median_seconds(self._values.sum, self._device, budget=budget)
        else:
            bandwidth = 2 * moved / median_seconds(lambda: target.copy_(self._values), self._device, budget=budget)
        multiply = median_seconds(lambda: a @ b, self._device, budget=budget)
        return Ceilings(bandwidth=bandwidth, matmul_rate=2 * len(a) ** 3 / multiply)


def parity_is_green(implementation: Implementation, dtype: torch.dtype, backend: str) -> tuple[bool, str]:
    """Runs the small parity cases of one implementation; (False, the first problem) when one fails or none passes."""
    results = run([implementation], dtypes=[dtype], without_tags=WIDTH, backend=backend)
    failed = [result for result in results if result.status == "failed"]
    if failed:
        return False, f"parity is red: {failed[0]}"
    if not any(result.status == "passed" for result in results):
        return False, f"no parity case ran: {results[0] if results else 'the operator has no case in this dtype'}"
    return True, ""


def time_workload(
    workload: Workload,
    implementation: Implementation,
    *,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
    refused: str | None,
    arguments: Mapping[str, Any] | None = None,
) -> Timing:
    """Times one workload; with `refused` only the floor is worked out. Weights are prepared before the clock runs. `arguments`:
    what the workload builds, where it has been built already."""
    operator = workload.operator
    arguments = dict(arguments or workload.build(Make(f"{operator.name}/{workload.name}", dtype)))
    moved = workload.bytes(arguments)
    ceilings = machine.ceilings()
    timing = Timing(
        operator=operator.name,
        workload=workload.name,
        implementation=implementation.id,
        dtype=str(dtype).removeprefix("torch."),
        bytes=moved,
        operations=workload.operations,
        seconds=None,
        floor_seconds=max(moved / ceilings.bandwidth, workload.operations / ceilings.matmul_rate),
        ceilings=ceilings,
        refused=refused,
    )
    if refused is not None:
        return timing
    facts = operator.facts_of(arguments) | {"device_type": torch.device(device).type}
    if reasons := implementation.not_supported(**facts):
        timing.refused = "; ".join(reasons)
        return timing
    ready = prepared_arguments(implementation, facts, to_device(arguments, device))
    with torch.inference_mode():
        timing.seconds = median_seconds(lambda: implementation.function(**ready), device)
    return timing
