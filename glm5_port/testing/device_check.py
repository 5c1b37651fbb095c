"""One command for a machine with a GPU: parity at small and true widths, promises, speed; the record goes under evidence/.

    make device-check PYTHON=python3        (python3 -m glm5_port.testing.device_check)

Installs nothing and builds nothing: it runs from the source tree with the torch and triton that are there, and asks for nothing
else. Most of the time goes into compiling kernels for the small cases, so parity runs in several processes on the one card; speed
is measured afterwards, alone. The most valuable evidence comes first (`ORDER`), and records are written as it comes: a run that
is cut off leaves what it had. What does not fit the time is listed as not run, never left out silently.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from glm5_port.errors import Glm5PortError
from glm5_port.plugins import load_plugins
from glm5_port.registry import OPERATORS
from glm5_port.requests import backend_named, probe
from glm5_port.testing import parity, speed
from glm5_port.testing.cases import WIDTH, Make, load_suites
from glm5_port.testing.evidence import device_description, evidence, write_evidence
from glm5_port.testing.workloads import workloads

SECONDS = 480.0
"""For everything; a machine that is lent for ten minutes keeps two for starting and copying."""
FOR_SPEED = 150.0
"""Of these, kept for the measurements of speed."""
CONTEXT, PREFILL = 131_072, 64
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
Item = tuple[str, str, str, bool]
"""Operator, implementation, dtype, whether at GLM-5 widths."""
ORDER = (
    ("bfloat16 at GLM-5 widths", lambda dtype, width: dtype == "bfloat16" and width),
    ("bfloat16, small cases", lambda dtype, width: dtype == "bfloat16"),
    ("other dtypes, small cases", lambda dtype, width: not width),
    ("other dtypes at GLM-5 widths", lambda dtype, width: True),
)
"""What parity runs first. What a model runs; then every branch of the same kernels, where most compiling is; then the rest."""
FIRST = (
    "sparse_mla_attention",
    "lightning_indexer",
    "expert_mlp_int4",
    "expert_mlp",
    "int4_matmul",
    "mla_prologue_into_cache",
    "route_experts",
    "add_rms_norm",
)
"""Within each: the operators of a decode step, by what they take of it; then the others."""
WORKERS = max(1, min(12, (os.cpu_count() or 2) - 2))
"""Processes that run parity."""
SAVED_EVERY = 10.0
"""Seconds between two writings of the records."""


def items(backend: str, operators: Sequence[str] | None = None) -> list[Item]:
    """What parity runs, in its order: the backend's own implementations in every dtype of their cases."""
    suites = load_suites()
    found = [
        (implementation.operator.name, implementation.id, str(dtype).removeprefix("torch."), width)
        for implementation in parity.implementations_on(backend, operators)
        if implementation.backend == backend
        for dtype, width in dict.fromkeys(
            (dtype, bool(case.tags & WIDTH)) for case in suites[implementation.operator.name].cases for dtype in case.dtypes
        )
    ]
    return sorted(found, key=lambda item: (_stage(item), FIRST.index(item[0]) if item[0] in FIRST else len(FIRST)))


def _stage(item: Item) -> int:
    return next(place for place, (_, belongs) in enumerate(ORDER) if belongs(item[2], item[3]))


def plan(backend: str, *, seconds: float, workers: int, operators: Sequence[str] | None) -> str:
    """What a machine with a device would do, in words."""
    wanted = items(backend, operators)
    stages = [f"    {name}: {sum(_stage(item) == place for item in wanted)} items" for place, (name, _) in enumerate(ORDER)]
    implementations = len({item[1:2] + item[:1] for item in wanted})
    return "\n".join(
        (
            f"On a machine with one, within {seconds:.0f} s, in this order:",
            f"  parity of {implementations} implementations against the float64 gold, {workers} processes",
            *stages,
            f"  speed in bfloat16 at {CONTEXT} cached tokens, {min(FOR_SPEED, seconds / 2):.0f} s of the time kept for it",
            f"  records under evidence/, written anew every {SAVED_EVERY:.0f} s; what did not run is listed in them",
        )
    )


def run_item(backend: str, item: Item) -> list[dict[str, Any]]:
    """Parity of one item, as plain data: what a worker does."""
    load_plugins()
    operator, implementation, dtype, width = item
    results = parity.run(
        [OPERATORS[operator].implementations[implementation]],
        backend=backend,
        dtypes=[getattr(torch, dtype)],
        without_tags=frozenset() if width else WIDTH,
        only_tags=WIDTH if width else frozenset(),
    )
    return [result.as_dict() for result in results]


def run_parity(
    backend: str, wanted: Sequence[Item], *, workers: int, seconds: float, save: Callable[[list[dict[str, Any]], list[str]], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(results, items that did not end in time or died). `save` gets both as they grow, with what has not ended yet."""
    results: list[dict[str, Any]] = []
    unfinished: list[str] = []
    context = multiprocessing.get_context("spawn")  # a driver does not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    futures = {pool.submit(run_item, backend, item): item for item in wanted}
    try:
        for future in concurrent.futures.as_completed(futures, timeout=seconds):
            try:
                found = future.result()
            except Exception as error:  # a worker that died takes its item with it; the others go on
                unfinished.append(f"{_name(futures[future])}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            results += found
            failed = sum(result["status"] == "failed" for result in found)
            print(f"  {_name(futures[future])}: {f'{failed} FAILED' if failed else 'passed'} of {len(found)}", flush=True)
            save(results, unfinished + [f"{_name(item)}: not ended yet" for other, item in futures.items() if not other.done()])
    except concurrent.futures.TimeoutError:
        unfinished += [f"{_name(item)}: out of time" for future, item in futures.items() if not future.done()]
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # ours, and perhaps still computing
        process.terminate()
    return results, unfinished


def _name(item: Item) -> str:
    operator, implementation, dtype, width = item
    return f"{operator} {implementation} {dtype}{' at GLM-5 widths' if width else ''}"


def clocks() -> dict[str, str]:
    """Clocks, power and temperature, as nvidia-smi says; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    done = subprocess.run(
        [tool, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"], capture_output=True, text=True, timeout=20
    )
    return dict(zip(CLOCKS, (value.strip() for value in done.stdout.split(",")), strict=False)) if done.returncode == 0 else {}


def run_speed(
    backend: str,
    failed: set[tuple[str, str]],
    operators: Sequence[str] | None,
    *,
    context: int,
    until: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """(timings of what passed parity, each with the ceilings measured beside it and the clocks after it; what was not timed).
    `save` gets the timings as they come."""
    from glm5_port.config import released

    device = _device_type(backend)
    machine = speed.Machine(device, torch.bfloat16)
    timings: list[dict[str, Any]] = []
    left_out: list[str] = []
    chosen = parity.implementations_on(backend, operators)
    for workload in workloads(released("GLM-5.2"), prefill=min(PREFILL, context), context=context):
        mine = [i for i in chosen if i.operator is workload.operator]
        facts = _facts(workload, device) if mine and time.monotonic() < until else None
        for implementation in mine:
            key = (workload.operator.name, implementation.id)
            reasons = implementation.not_supported(**facts) if facts else []
            if key in failed or reasons or time.monotonic() > until:
                why = "parity failed" if key in failed else "; ".join(reasons) or "out of time"
                left_out.append(f"{' '.join(key)}, {workload.name}: {why}")
                continue
            timing = speed.time_workload(
                workload, implementation, dtype=torch.bfloat16, device=device, machine=machine, refused=None
            ).as_dict()
            timings.append({**timing, "clocks": clocks()})
            save(timings)
            print(
                f"  {workload.operator.name} {implementation.id}, {workload.name}: {1e6 * timing['seconds']:.1f} us, "
                f"{timing['share']:.0%} of the floor",
                flush=True,
            )
    return timings, left_out


def _facts(workload: Any, device: str) -> dict[str, Any]:
    arguments = workload.build(Make(f"{workload.operator.name}/{workload.name}", torch.bfloat16))
    return {**workload.operator.facts_of(arguments), "device_type": device}


def _device_type(backend: str) -> str:
    from glm5_port.registry import BACKENDS

    return BACKENDS[backend].device_type


def versions() -> dict[str, str]:
    """Of everything that the run depends on."""
    found = {"python": sys.version.split()[0], "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    for package in ("triton", "numpy", "transformers"):
        try:
            found[package] = str(importlib.import_module(package).__version__)
        except ImportError:
            found[package] = "not installed"
    return found


def check(
    backend: str,
    *,
    directory: Path | None,
    seconds: float = SECONDS,
    workers: int = WORKERS,
    operators: Sequence[str] | None = None,
    context: int = CONTEXT,
) -> tuple[int, dict[str, Any]]:
    """Runs everything and writes the records.

    Returns:
        The exit code, 0 when all ran and passed, 1 otherwise, 2 with no device; and the record, empty with no device.
    """
    begin = time.monotonic()
    load_plugins()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("device-check: TRITON_INTERPRET=1 runs kernels on the CPU and proves nothing about a device: unset it")
        return 2, {}
    if (missing := probe(backend).missing) is not None:
        print(f"device-check: no device to check. {backend}: {missing}")
        print(plan(backend, seconds=seconds, workers=workers, operators=operators))
        return 2, {}
    print("\n".join(f"{name}: {value}" for name, value in {**device_description(backend), **versions()}.items()))
    saved = _Record(backend, directory, begin)
    for_speed = min(FOR_SPEED, seconds / 2)
    print(f"\nparity, {workers} processes")
    wanted = items(backend, operators)
    left = seconds - for_speed - (time.monotonic() - begin)
    results, unfinished = run_parity(backend, wanted, workers=workers, seconds=left, save=saved.parity)
    saved.parity(results, unfinished)
    failures = [result for result in results if result["status"] == "failed"]
    print(f"\nspeed, bfloat16, context {context}")
    failed = {(result["operator"], result["implementation"]) for result in failures}
    timings, untimed = run_speed(backend, failed, operators, context=context, until=begin + seconds, save=saved.timings)
    record = saved.finish(timings, untimed)
    print(
        f"\n{record['parity']['passed']} passed, {len(failures)} failed, {len(unfinished)} items not run, {record['seconds']} s"
    )
    for line in [f"FAILED {f['operator']} {f['implementation']} [{f['case']}, {f['dtype']}]: {f['problems']}" for f in failures]:
        print(line)
    for line in unfinished:
        print(f"NOT RUN {line}")
    return (1 if failures or unfinished else 0), record


class _Record:
    """The records of a run, which are written while it goes on."""

    def __init__(self, backend: str, directory: Path | None, begin: float) -> None:
        self._backend, self._directory, self._begin = backend, directory, begin
        self._before, self._written = clocks(), begin
        self._results: list[dict[str, Any]] = []
        self._timings: list[dict[str, Any]] = []
        self._not_run: list[str] = []

    def parity(self, results: list[dict[str, Any]], not_run: list[str]) -> None:
        """Keeps what parity found so far."""
        self._results, self._not_run = results, not_run
        self._write_now_and_then()

    def timings(self, timings: list[dict[str, Any]]) -> None:
        """Keeps what was timed so far."""
        self._timings = timings
        self._write_now_and_then()

    def finish(self, timings: list[dict[str, Any]], not_timed: list[str]) -> dict[str, Any]:
        """The whole record, written."""
        self._timings, self._not_run = timings, self._not_run + not_timed
        record = self._record(complete=True)
        if paths := self._write(record):
            print(f"\nwritten: {', '.join(map(str, paths))}\n  commit both, then `make docs`")
        return record

    def _write_now_and_then(self) -> None:
        if self._directory is not None and time.monotonic() - self._written >= SAVED_EVERY:
            self._write(self._record(complete=False))
            self._written = time.monotonic()

    def _record(self, *, complete: bool) -> dict[str, Any]:
        found = ("passed", "failed", "declined", "unavailable")
        return {
            "format": 1,
            "kind": "device-check",
            "complete": complete,
            "device": device_description(self._backend),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "seconds": round(time.monotonic() - self._begin, 1),
            "clocks": {"before": self._before, "after": clocks()},
            "parity": {status: sum(r["status"] == status for r in self._results) for status in found},
            "failures": [result for result in self._results if result["status"] == "failed"],
            "not_run": self._not_run,
            "timings": self._timings,
        }

    def _write(self, record: dict[str, Any]) -> tuple[Path, ...]:
        if self._directory is None:
            return ()
        parity_path = write_evidence(evidence(self._results, self._backend), self._directory)
        path = self._directory / re.sub(r"^parity-", "", parity_path.name)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return parity_path, path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="device-check", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--evidence", type=Path, default=Path("evidence"), help="where records go")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--operator", action="append", help="only these; no record is written then")
    given = parser.parse_args(arguments)
    directory = None if given.operator else given.evidence
    try:
        backend_named(given.backend, "--backend")
        return check(given.backend, directory=directory, seconds=given.seconds, workers=given.workers, operators=given.operator)[
            0
        ]
    except Glm5PortError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
