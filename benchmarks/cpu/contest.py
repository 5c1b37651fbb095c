"""How contests are run: same inputs, alternating calls, medians, cold weights, limits measured in between, errors beside times.

A contest is one piece of work (an operator, shapes, a number of tokens) and its contenders. Rounds go through all contenders in
turn, so that whatever else the machine does hits them alike; a round before or after which the processors were not all there
(other processes, or the host of a virtual machine) does not count. Weights come in copies that together exceed the last-level
cache several times, and each call takes the next copy: a call finds its own weights in memory, as in a model with many layers.
Short calls are timed in a row, as layer follows layer, after one that is not timed: the first after something else also waits for
its code, for the interpreter's and for the other threads. Before each contender there is a pause, since threads of the one before
spin on for a while. The limit of a contest is the larger of bytes / bandwidth and operations / peak, both measured by read-only
and register-only loops of the extension between the rounds; shares are ratios inside one run.
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
from glm5_port.memory import zeros

READ_BYTES = 256 * 2**20
COLD_BYTES = 256 * 2**20
"""Copies of weights take at least as much together."""
PEAK_SECONDS = 0.02
BURST_SECONDS = 0.01
"""That calls timed in a row take together."""
PAUSE_SECONDS = 0.1
STEADY = 0.9
"""Share of the best peak so far that the loop must reach before and after a round that counts."""
PATIENCE = 4
"""Times the budget of a contest until unsteady rounds count too; the result says how many did."""
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
        disturbed: unsteady rounds that count.
    """

    operator: str
    work: str
    contender: str
    milliseconds: float
    floor_milliseconds: float
    bound: str
    error: float | None
    rounds: int
    disturbed: int
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
        self._memory = zeros(READ_BYTES // 4, dtype=torch.int32).fill_(1)  # written, or it would be one page of zeros
        self._best: dict[str, float] = {}
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

    def peak(self, kind: str) -> tuple[float, bool]:
        """Operations per second of products in registers (of float32 where the machine has no such product), the best of three,
        and whether the processors were all there: all three near the best of this run so far."""
        known = kind if self._repeats[kind] else "float32"
        runs = [self._time(KINDS[known], self._repeats[known]) for _ in range(3)]
        rates = [operations / seconds for operations, seconds in runs]
        self._best[known] = max(self._best.get(known, 0.0), *rates)
        return max(rates), min(rates) >= STEADY * self._best[known]


def run(contest: Contest, limits: Limits, *, rounds: int, budget: float) -> Iterator[Result]:
    """Runs a contest: at least three rounds, then until `rounds` or `budget` seconds are reached; unsteady rounds are
    tried again, for PATIENCE budgets at most."""
    gold = contest.gold() if contest.gold is not None else None
    errors: dict[str, float | None] = {}
    bursts: dict[str, int] = {}
    for name, call in contest.contenders.items():  # warms up, too
        result = call(0)
        started = time.perf_counter()
        call(contest.copies - 1)
        seconds = time.perf_counter() - started
        bursts[name] = max(1, min(contest.copies // 2, int(BURST_SECONDS / seconds)))
        errors[name] = None if gold is None else float((result.double() - gold).norm() / gold.norm())
    times: dict[str, list[float]] = {name: [] for name in contest.contenders}
    bandwidth: list[float] = []
    peak: list[float] = []
    begun, done, disturbed = time.perf_counter(), 0, 0
    while done < rounds and (done < 3 or time.perf_counter() < begun + budget):
        (best, before), read = limits.peak(contest.kind), limits.bandwidth()
        round_times: dict[str, float] = {}
        for name, call in contest.contenders.items():
            time.sleep(PAUSE_SECONDS)
            call((done - 1) % contest.copies)
            started = time.perf_counter()
            for number in range(bursts[name]):
                call((done + number) % contest.copies)
            round_times[name] = (time.perf_counter() - started) / bursts[name]
        time.sleep(PAUSE_SECONDS)  # threads of the last contender may still wait for work by spinning
        if not (before and limits.peak(contest.kind)[1]):
            if time.perf_counter() < begun + PATIENCE * budget:
                continue
            disturbed += 1
        done += 1
        peak.append(best)
        bandwidth.append(read)
        for name, seconds in round_times.items():
            times[name].append(seconds)
    by_memory = contest.bytes / statistics.median(bandwidth)
    by_products = contest.operations / statistics.median(peak)
    for name, measured in times.items():
        yield Result(
            operator=contest.operator,
            work=contest.work,
            contender=name,
            milliseconds=1e3 * statistics.median(measured),
            floor_milliseconds=1e3 * max(by_memory, by_products),
            bound="memory" if by_memory >= by_products else "products",
            error=errors[name],
            rounds=done,
            disturbed=disturbed,
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


def summary(results: Sequence[Result]) -> str:
    """Markdown, one line for each of this project's kernels, beside the best other contender of the same work."""
    heads = (
        "work",
        "native",
        "ms",
        "limit, ms",
        "share",
        "best other contender, ms",
        "native is faster by",
        "error, native / other",
    )
    lines = [f"| {' | '.join((*heads, 'rounds (unsteady)'))} |", "|---|---|---:|---:|---:|---|---:|---|---:|"]
    others: dict[tuple[str, str], Result] = {}
    for r in results:
        if not r.contender.startswith("cpu/"):
            work = (r.operator, r.work)
            others[work] = min(others.get(work, r), r, key=lambda result: result.milliseconds)
    for r in results:
        if r.contender.startswith("cpu/"):
            other = others.get((r.operator, r.work))
            errors = [f"{x.error:.1e}" if x is not None and x.error is not None else "-" for x in (r, other)]
            cells = (
                f"{r.operator}, {r.work}", r.contender.removeprefix("cpu/"), f"{r.milliseconds:.3g}",
                f"{r.floor_milliseconds:.3g} ({r.bound})", f"{r.share:.0%}",
                "-" if other is None else f"{other.contender}: {other.milliseconds:.3g}",
                "-" if other is None else f"{other.milliseconds / r.milliseconds:.2f}",
                " / ".join(errors), f"{r.rounds} ({r.disturbed})",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
