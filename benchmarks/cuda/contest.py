"""One piece of work, its floor, and how long each contender takes. On a GPU the calls are captured in a CUDA graph where that is
possible, so that what is measured is the device and not Python; elsewhere they are timed as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

WARM_UP, ROUNDS = 3, 15
COLD_BYTES = 512 * 2**20
"""Weights of all copies together: several times the largest L2 cache, so that each call reads its own from memory."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the card reaches with plain torch in this run.

    Attributes:
        bandwidth: bytes a second, read and written, of a copy.
        product_rate: operations a second of a square bfloat16 product.
    """

    bandwidth: float
    product_rate: float


@dataclass(frozen=True, slots=True)
class Contest:
    """One piece of work.

    Attributes:
        bytes, operations: that any implementation must move and compute.
        contenders: name -> call; calls take the number of a copy of the weights.
        copies: of the weights.
    """

    operator: str
    work: str
    bytes: float
    operations: float
    contenders: dict[str, Callable[[int], Any]]
    copies: int

    def floor(self, limits: Limits) -> float:
        """Seconds."""
        return max(self.bytes / limits.bandwidth, self.operations / limits.product_rate)


@dataclass(frozen=True, slots=True)
class Result:
    """One contender. `graph` says whether a CUDA graph was timed; `refused` why there is no time."""

    operator: str
    work: str
    contender: str
    floor_us: float
    us: float | None
    share: float | None
    graph: bool
    refused: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def copies_for(size: float, most: int = 64) -> int:
    """How many copies of `size` bytes make `COLD_BYTES`."""
    return max(1, min(most, round(COLD_BYTES / size)))


def limits_of(device: torch.device, *, small: bool = False) -> Limits:
    """Measures both limits."""
    count, side = (2**22, 512) if small else (2**29, 8192)
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy, _ = seconds_of(lambda _: target.copy_(source), 1, device)
    product, _ = seconds_of(lambda _: a @ b, 1, device)
    return Limits(2 * source.nbytes / copy, 2.0 * side**3 / product)


def seconds_of(call: Callable[[int], Any], copies: int, device: torch.device) -> tuple[float, bool]:
    """(median seconds of one call, whether it ran from a CUDA graph)."""
    for number in range(WARM_UP):
        call(number % copies)
    if device.type != "cuda":
        times = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            call(number % copies)
            times.append(time.perf_counter() - start)
        return statistics.median(times), False
    replay, graph = _captured(call, copies), True
    if replay is None:
        graph = False

        def replay() -> None:
            for number in range(copies):
                call(number)

    replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / copies)
    return statistics.median(times), graph


def _captured(call: Callable[[int], Any], copies: int) -> Callable[[], None] | None:
    """All copies' calls as one CUDA graph; None where they cannot be captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for number in range(copies):
                call(number)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def run(contest: Contest, limits: Limits, device: torch.device) -> list[Result]:
    """Every contender of one contest."""
    floor = contest.floor(limits)
    results = []
    for name, call in contest.contenders.items():
        seconds, graph, refused = None, False, ""
        try:
            with torch.no_grad():
                seconds, graph = seconds_of(call, contest.copies, device)
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            refused = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        results.append(
            Result(
                contest.operator,
                contest.work,
                name,
                floor * 1e6,
                None if seconds is None else seconds * 1e6,
                None if seconds is None else floor / seconds,
                graph,
                refused,
            )
        )
    return results


def table(results: list[Result]) -> str:
    """A line for each contender, the floor first."""
    lines = [f"{'operator':24} {'work':34} {'floor us':>9} {'us':>10} {'of floor':>8}  contender"]
    for r in results:
        took = f"{r.us:10.1f} {100 * (r.share or 0):7.0f}%" if r.us is not None else f"{'-':>10} {'-':>8}"
        lines.append(f"{r.operator:24} {r.work:34} {r.floor_us:9.1f} {took}  {r.contender}{' ' + r.refused if r.refused else ''}")
    return "\n".join(lines)
