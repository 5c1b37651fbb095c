"""One command for a machine with a GPU: parity at small and true widths, promises, speed; the record goes under evidence/.

    make device-check PYTHON=python3        (python3 -m glm5_port.testing.device_check)

Installs nothing and builds nothing: it runs from the source tree with the torch and triton that are there, and asks for nothing
else. Most of the time goes into compiling kernels for the small cases, so parity runs in several processes on the one card; speed
is measured afterwards, alone, in a process of its own too: an illegal address spoils a card for the process that met it, and for
no other (`workers`). The most valuable evidence comes first (`ORDER`), and records are written as it comes: a run that is cut off
leaves what it had. What does not fit the time is listed as not run, never left out silently.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from glm5_port.errors import Glm5PortError
from glm5_port.plugins import load_plugins
from glm5_port.registry import BACKENDS, OPERATORS
from glm5_port.requests import backend_named, probe
from glm5_port.testing import parity, speed, workers
from glm5_port.testing.cases import WIDTH, Make, load_suites
from glm5_port.testing.device_record import SAVED_EVERY, DeviceRecord, clocks, versions
from glm5_port.testing.evidence import device_description
from glm5_port.testing.workloads import Workload
from glm5_port.testing.workloads_rest import all_workloads

SECONDS = 460.0
"""For everything between the first line and the last; with `GRACE` and the start of Python, eight minutes."""
GRACE = 15.0
"""Seconds beyond, for ending processes and writing. Who is still here then is ended from outside of Python, wherever it hangs."""
FOR_SPEED = 150.0
"""Of the time, kept for the measurements of speed."""
LONGEST_PARITY, LONGEST_SPEED = 150.0, 60.0
"""Seconds of one item: what takes longer hangs, or compiles for ever, and is given up for the others."""
CONTEXT, PREFILL = 131_072, 64
Item = tuple[str, str, str, bool]
"""Operator, implementation, dtype, whether at GLM-5 widths."""
Timed = tuple[str, str]
"""Operator and workload."""
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
Results = list[dict[str, Any]]


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
    return sorted(found, key=lambda item: (_stage(item), _importance(item[0])))


def _importance(operator: str) -> int:
    return FIRST.index(operator) if operator in FIRST else len(FIRST)


def _stage(item: Item) -> int:
    return next(place for place, (_, belongs) in enumerate(ORDER) if belongs(item[2], item[3]))


def plan(backend: str, *, seconds: float, processes: int, operators: Sequence[str] | None) -> str:
    """What a machine with a device would do, in words."""
    wanted = items(backend, operators)
    stages = [f"    {name}: {sum(_stage(item) == place for item in wanted)} items" for place, (name, _) in enumerate(ORDER)]
    implementations = len({item[1:2] + item[:1] for item in wanted})
    return "\n".join(
        (
            f"On a machine with one, within {seconds:.0f} s, in this order:",
            f"  parity of {implementations} implementations against the float64 gold, {processes} processes",
            *stages,
            f"  speed in bfloat16 at {CONTEXT} cached tokens, {min(FOR_SPEED, seconds / 2):.0f} s of the time kept for it",
            f"  records under evidence/, written anew every {SAVED_EVERY:.0f} s; what did not run is listed in them",
        )
    )


def run_item(backend: str, item: Item) -> Iterator[dict[str, Any]]:
    """Parity of one item, case by case, as plain data: what a worker does."""
    load_plugins()
    operator, implementation, dtype, width = item
    for result in parity.run_each(
        [OPERATORS[operator].implementations[implementation]],
        backend=backend,
        dtypes=[getattr(torch, dtype)],
        without_tags=frozenset() if width else WIDTH,
        only_tags=WIDTH if width else frozenset(),
    ):
        yield result.as_dict()
        if result.status == "failed":
            speed.synchronize(_device_type(backend))  # raises where the device is lost, for then this process is


def run_parity(
    backend: str, wanted: Sequence[Item], *, processes: int, until: float, save: Callable[[Results, list[str]], None]
) -> tuple[Results, list[str]]:
    """(results, items that did not come to their end, and why). `save` gets both as they grow, with what has not ended yet."""
    results: Results = []
    unfinished: list[str] = []
    open_items = dict.fromkeys(wanted, 0)
    failed = dict.fromkeys(wanted, 0)

    def found(item: Item, result: dict[str, Any]) -> None:
        results.append(result)
        open_items[item] += 1
        failed[item] += result["status"] == "failed"
        save(results, unfinished + [f"{_name(other)}: not ended yet" for other in open_items])

    def ended(item: Item, problem: str) -> None:
        cases = open_items.pop(item)
        if problem:
            unfinished.append(f"{_name(item)}: {problem}, after {cases} cases")
        if cases:
            print(f"  {_name(item)}: {f'{failed[item]} FAILED' if failed[item] else 'passed'} of {cases}", flush=True)
        save(results, unfinished + [f"{_name(other)}: not ended yet" for other in open_items])

    workers.run(
        functools.partial(run_item, backend), wanted,
        workers=processes, until=until, seconds_each=LONGEST_PARITY, found=found, ended=ended,
    )  # fmt: skip
    return results, unfinished


def _name(item: Item) -> str:
    operator, implementation, dtype, width = item
    return f"{operator} {implementation} {dtype}{' at GLM-5 widths' if width else ''}"


def _workloads(context: int) -> dict[Timed, Workload]:
    from glm5_port.config import released

    made = all_workloads(released("GLM-5.2"), prefill=min(PREFILL, context), context=context)
    return {(workload.operator.name, workload.name): workload for workload in made}


def time_item(backend: str, context: int, failed: frozenset[tuple[str, str]], item: Timed) -> Iterator[dict[str, Any]]:
    """The timings of one workload, each with the ceilings measured beside it and the clocks after the first, or {"left_out":
    why}: what a worker does. Its inputs are made once."""
    load_plugins()
    workload, device = _workloads(context)[item], _device_type(backend)
    arguments = workload.build(Make("/".join(item), torch.bfloat16))
    facts = {**workload.operator.facts_of(arguments), "device_type": device}
    clocks_once = functools.cache(clocks)  # nvidia-smi takes longer than most timings
    for implementation in parity.implementations_on(backend, [item[0]]):
        key = (item[0], implementation.id)
        reasons = ["parity failed"] if key in failed else implementation.not_supported(**facts)
        if not reasons:
            try:
                timing = speed.time_workload(
                    workload, implementation, dtype=torch.bfloat16, device=device, machine=_machine(device), refused=None,
                    arguments=arguments,
                )  # fmt: skip
                yield {**timing.as_dict(), "clocks": clocks_once()}
                continue
            except Exception as error:  # one that fails leaves the others their times
                reasons = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        yield {"left_out": f"{' '.join(key)}, {item[1]}: {'; '.join(reasons)}"}
        speed.synchronize(device)  # raises where the device is lost


@functools.cache
def _machine(device: str) -> speed.Machine:
    return speed.Machine(device, torch.bfloat16)


def run_speed(
    backend: str,
    failed: frozenset[tuple[str, str]],
    operators: set[str],
    *,
    context: int,
    until: float,
    save: Callable[[Results], None],
) -> tuple[Results, list[str]]:
    """(timings of what passed parity; what was not timed). `save` gets the timings as they come."""
    timings: Results = []
    left_out: list[str] = []

    def found(item: Timed, result: dict[str, Any]) -> None:
        if "left_out" in result:
            left_out.append(result["left_out"])
            return
        timings.append(result)
        save(timings)
        print(
            f"  {item[0]} {result['implementation']}, {item[1]}: {1e6 * result['seconds']:.1f} us, "
            f"{result['share']:.0%} of the floor",
            flush=True,
        )

    def ended(item: Timed, problem: str) -> None:
        if problem:
            left_out.append(f"{' '.join(item)}: {problem}")

    wanted = sorted((item for item in _workloads(context) if item[0] in operators), key=lambda item: _importance(item[0]))
    workers.run(
        functools.partial(time_item, backend, context, failed), wanted,
        workers=1, until=until, seconds_each=LONGEST_SPEED, found=found, ended=ended,
    )  # fmt: skip
    return timings, left_out


def _device_type(backend: str) -> str:
    return BACKENDS[backend].device_type


def check(
    backend: str,
    *,
    directory: Path | None,
    seconds: float = SECONDS,
    processes: int = WORKERS,
    operators: Sequence[str] | None = None,
    context: int = CONTEXT,
) -> tuple[int, dict[str, Any]]:
    """Runs everything and writes the records.

    Returns:
        The exit code, 0 when all ran and passed, 1 otherwise, 2 with nothing to check; and the record, empty with nothing.
    """
    # Outside of Python, since a driver that hangs does not return to it. With this process all workers end.
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__ or 2)
    try:
        return _check(backend, directory, time.monotonic(), seconds, processes, operators, context)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _check(
    backend: str,
    directory: Path | None,
    begin: float,
    seconds: float,
    processes: int,
    operators: Sequence[str] | None,
    context: int,
) -> tuple[int, dict[str, Any]]:
    load_plugins()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("device-check: TRITON_INTERPRET=1 runs kernels on the CPU and proves nothing about a device: unset it")
        return 2, {}
    if (missing := probe(backend).missing) is not None:
        print(f"device-check: no device to check. {backend}: {missing}")
        print(plan(backend, seconds=seconds, processes=processes, operators=operators))
        return 2, {}
    wanted = items(backend, operators)
    if not wanted:
        print(f"device-check: nothing to check: {backend} has no implementation of its own here")
        return 2, {}
    print("\n".join(f"{name}: {value}" for name, value in {**device_description(backend), **versions()}.items()))
    saved = DeviceRecord(backend, directory, begin)
    print(f"\nparity, {processes} processes")
    for_speed = min(FOR_SPEED, seconds / 2)
    results, unfinished = run_parity(backend, wanted, processes=processes, until=begin + seconds - for_speed, save=saved.parity)
    saved.parity(results, unfinished)
    failures = [result for result in results if result["status"] == "failed"]
    print(f"\nspeed, bfloat16, context {context}")
    failed = frozenset((result["operator"], result["implementation"]) for result in failures)
    timings, untimed = run_speed(
        backend, failed, {item[0] for item in wanted}, context=context, until=begin + seconds, save=saved.timings
    )
    record = saved.finish(timings, untimed)
    print(
        f"\n{record['parity']['passed']} passed, {len(failures)} failed, {len(unfinished)} items not run, {record['seconds']} s"
    )
    for line in [f"FAILED {f['operator']} {f['implementation']} [{f['case']}, {f['dtype']}]: {f['problems']}" for f in failures]:
        print(line)
    for line in unfinished:
        print(f"NOT RUN {line}")
    for line in untimed:
        print(f"NOT TIMED {line}")
    return (1 if failures or unfinished else 0), record


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
        return check(
            given.backend, directory=directory, seconds=given.seconds, processes=given.workers, operators=given.operator
        )[0]
    except Glm5PortError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
