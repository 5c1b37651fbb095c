"""How contests are run: same inputs, alternating calls, medians, cold weights, limits measured in between, errors beside times.

A contest is one piece of work (an operator, shapes, a number of tokens) and its contenders. Rounds go through all contenders in
turn, so that whatever else the machine does hits them alike. Weights come in copies that together exceed the last-level cache
several times, and each call takes the next copy: a call finds its own weights in memory, as in a model with many layers. The
limit of a contest is the larger of bytes / bandwidth and operations / peak, both measured by read-only and register-only loops of
the extension between the rounds; shares are ratios inside one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import ISAS, kernels, threads, widest_isa

READ_BYTES = 256 * 2**20
COLD_BYTES = 256 * 2**20
"""Copies of weights take at least as much together."""
PEAK_SECONDS = 0.02
KINDS = {"float32": 0, "bf16": 1, "int8": 2}


@dataclass(frozen=True, slots=True)
class Contest:
    """One piece of work.

    Attributes:
        operator, work: what is done, for people.
        bytes: that must be read once: weights, caches, activations.
        operations: multiplications and additions of the useful work.
        kind: of product that the limit takes: "bf16", "int8" or "float32".
        contenders: name -> call with the number of a copy of the weights.
        gold: what the result should be, in float64; errors are relative Frobenius.
        copies: of the weights that the calls were made with.
        floor_note: what else the floor says, such as that bf16 peers move more bytes.
    """

    operator: str
    work: str
    bytes: float
    operations: float
    kind: str
    contenders: Mapping[str, Callable[[int], Tensor]]
    gold: Callable[[], Tensor] | None = None
    copies: int = 1
    floor_note: str = ""


@dataclass(slots=True)
class Result:
    """One contender of one contest.

    Attributes:
        milliseconds: median of the rounds.
        floor_milliseconds: the limit, from the medians of bandwidth and peak in the same rounds.
        bound: "memory" or "products": which of the two is the limit.
        error: relative Frobenius error against the gold; None where it was not asked for.
    """

    operator: str
    work: str
    contender: str
    milliseconds: float
    floor_milliseconds: float
    bound: str
    error: float | None
    rounds: int
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the limit that is reached."""
        return self.floor_milliseconds / self.milliseconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share}


def copies_for(nbytes: float) -> int:
    """So many copies of weights of `nbytes` are cold when they are taken in turn."""
    return max(1, -(-COLD_BYTES // int(nbytes)))


class Limits:
    """Bandwidth and peaks of this machine, measured whenever asked."""

    def __init__(self) -> None:
        isa = widest_isa()
        if isa is None:
            raise SystemExit("the native kernels are not built here: there is nothing to measure")
        self._isa = ISAS.index(isa)
        self._memory = torch.ones(READ_BYTES // 4, dtype=torch.int32)
        self._repeats = {kind: self._calibrated(number) for kind, number in KINDS.items()}

    def _calibrated(self, kind: int) -> int:
        """Repetitions that take about PEAK_SECONDS; 0 where the machine has no such product. Best of some, so that a
        moment in which something else ran does not look like a slow machine."""
        repeats = 10_000
        while (seconds := min(self._time(kind, repeats)[1] for _ in range(5))) < PEAK_SECONDS:
            if not self._time(kind, 1)[0]:
                return 0
            repeats = int(repeats * max(2.0, 1.2 * PEAK_SECONDS / max(seconds, 1e-6)))
        return repeats

    def _time(self, kind: int, repeats: int) -> tuple[int, float]:
        started = time.perf_counter()
        operations = kernels().limit_multiply(self._isa, kind, repeats, threads())
        return operations, time.perf_counter() - started

    def bandwidth(self) -> float:
        """Bytes per second that all threads read together; the best of three."""
        times = []
        for _ in range(3):
            started = time.perf_counter()
            kernels().limit_read(self._isa, self._memory.data_ptr(), self._memory.nbytes, threads())
            times.append(time.perf_counter() - started)
        return self._memory.nbytes / min(times)

    def peak(self, kind: str) -> float:
        """Operations per second of products in registers; of the nearest wider kind where the machine has no such product."""
        number = next(KINDS[known] for known in (kind, "float32") if self._repeats[known])
        repeats = self._repeats[kind] or self._repeats["float32"]
        return max(operations / seconds for operations, seconds in (self._time(number, repeats) for _ in range(3)))


def run(contest: Contest, limits: Limits, *, rounds: int, budget: float) -> Iterator[Result]:
    """Runs a contest: at least three rounds, then until `rounds` or `budget` seconds are reached."""
    gold = contest.gold() if contest.gold is not None else None
    errors: dict[str, float | None] = {}
    for name, call in contest.contenders.items():  # warms up, too
        result = call(0)
        errors[name] = None if gold is None else float((result.double() - gold).norm() / gold.norm())
    times: dict[str, list[float]] = {name: [] for name in contest.contenders}
    bandwidth, peak = [], []
    until, done = time.perf_counter() + budget, 0
    while done < rounds and (done < 3 or time.perf_counter() < until):
        bandwidth.append(limits.bandwidth())
        peak.append(limits.peak(contest.kind))
        for name, call in contest.contenders.items():
            started = time.perf_counter()
            call(done % contest.copies)
            times[name].append(time.perf_counter() - started)
        done += 1
    by_memory = contest.bytes / statistics.median(bandwidth)
    by_products = contest.operations / statistics.median(peak)
    for name, seconds in times.items():
        yield Result(
            operator=contest.operator,
            work=contest.work,
            contender=name,
            milliseconds=1e3 * statistics.median(seconds),
            floor_milliseconds=1e3 * max(by_memory, by_products),
            bound="memory" if by_memory >= by_products else "products",
            error=errors[name],
            rounds=done,
            limits={"read_gb_s": statistics.median(bandwidth) / 1e9, f"{contest.kind}_gop_s": statistics.median(peak) / 1e9},
        )


def table(results: Sequence[Result]) -> str:
    """Markdown, one line for each contender; the best of the peers shows beside this project's kernels."""
    lines = ["| operator | work | contender | ms | limit ms | share | error |", "|---|---|---|---:|---:|---:|---:|"]
    for r in results:
        error = "" if r.error is None else f"{r.error:.1e}"
        cells = (r.operator, r.work, r.contender, f"{r.milliseconds:.3g}", f"{r.floor_milliseconds:.3g} ({r.bound})")
        lines.append(f"| {' | '.join(cells)} | {r.share:.0%} | {error} |")
    return "\n".join(lines)
