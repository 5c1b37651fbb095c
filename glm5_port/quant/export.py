"""Writes an INT4 checkpoint: checks everything that can be checked first, goes on where an earlier run stopped, and leaves
nothing that looks finished and is not. The same source and options give the same bytes, whatever the number of workers and
however often the run was interrupted.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from glm5_port.errors import ExportError, Glm5PortError, InputError
from glm5_port.quant.files import hash_file
from glm5_port.quant.finish import write_last_files
from glm5_port.quant.int4 import refuse_learned
from glm5_port.quant.journal import JOURNAL, Journal
from glm5_port.quant.manifest import MANIFEST, describe, read_manifest
from glm5_port.quant.plan import CARRY, Options, Plan, plan_export
from glm5_port.quant.sizes import show_bytes
from glm5_port.quant.source_files import copied_files, source_identity
from glm5_port.quant.writing import Progress, Run, block_rows

DEFAULT_MEMORY = 2 * 2**30
BYTES_PER_WEIGHT = 40
"""Memory of a worker for each weight of a block: stored, bfloat16, float32 and its temporaries, codes, packed."""
WORKER_BYTES = 16 * 2**20
"""Memory of a worker beside its block: chunks that are copied and hashed, and what the allocator keeps."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did.

    Attributes:
        plan: that was carried out.
        destination: where.
        report: per layer, as in int4_report.json; None when everything was there already.
        resumed: shards that an earlier run had finished.
        workers: that ran; fewer than asked for where memory allowed no more.
    """

    plan: Plan
    destination: Path
    report: Mapping[str, Any] | None
    resumed: int
    workers: int


def export(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    options: Options | None = None,
    *,
    workers: int = 1,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Exported:
    """Writes the INT4 checkpoint of a bf16, fp16, fp32 or block-FP8 checkpoint.

    Args:
        source: directory of the checkpoint. It is only read.
        destination: a directory that does not exist, is empty, or holds an unfinished export of the same.
        options: what to write; None means the defaults.
        workers: threads; fewer run where `memory` allows no more.
        memory: bytes that the process may take in all.
        progress: called now and then, from any thread, one call at a time.

    Raises:
        ConfigError, CheckpointError: the source is no whole checkpoint.
        InputError: options that do not fit, or a memory bound that is too small.
        ExportError: the destination holds something else, cannot be written, or has too little room. Shards that were finished
            stay, and the same call goes on from there.
    """
    return carry_out(plan_export(source, options or Options()), destination, workers=workers, memory=memory, progress=progress)


def carry_out(
    plan: Plan,
    destination: str | PathLike[str],
    *,
    workers: int = 1,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Exported:
    """Writes what a plan says; arguments and errors are those of `export`."""
    path = Path(destination)
    if workers < 1:
        raise InputError(f"workers = {workers}: it must be at least 1")
    if not plan.has_weights:
        raise InputError(
            f"{plan.source} holds no weights: there is nothing to export\n"
            "  expected: model.safetensors, or its index and shards; --dry-run plans from config.json alone"
        )
    if plan.quantized and plan.scales is None:
        refuse_learned(plan.options.rule, str(plan.source))
    identity = describe(plan) | {"source": source_identity(plan)}
    if is_complete(path, identity):
        return Exported(plan, path, None, len(plan.shards), 0)
    check_destination(plan, path)
    workers = fitting_workers(plan, workers, memory)
    with _disk_errors(path), _one_thread():
        path.mkdir(parents=True, exist_ok=True)
        check_room(plan, path)
        with Journal(path, identity | {"source_times": _times(plan)}) as journal:
            resumed = _drop_damaged(path, journal, workers)
            Run(plan, path, journal, progress).work(workers)
            report = write_last_files(plan, path, identity["source"], journal.finished)
            journal.remove()
    return Exported(plan, path, report, resumed, workers)


# --- before a byte is written ----------------------------------------------------------------------------------------------


def is_complete(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether this very export stands there, finished."""
    if (path / JOURNAL).exists() or not (path / MANIFEST).exists():
        return False
    manifest = read_manifest(path) or {}
    return all(manifest.get(key) == value for key, value in identity.items())


def check_destination(plan: Plan, path: Path) -> None:
    """Refuses a destination that would touch the source or anything that is not this export's own.

    Raises:
        ExportError: it does.
    """
    source, target = plan.source.resolve(), path.resolve()
    if target == source or source in target.parents:
        raise ExportError(f"{path} lies in the source {plan.source}, which is never written to: choose a directory elsewhere")
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; expected a directory that does not exist or is empty")
    if path.is_dir() and not (path / JOURNAL).exists() and (found := sorted(entry.name for entry in path.iterdir())):
        what = "a finished export of something else" if MANIFEST in found else f"other files: {', '.join(found[:3])}"
        raise ExportError(f"{path} holds {what}\n  Nothing was changed. Choose a directory that does not exist or is empty")


def check_room(plan: Plan, path: Path) -> None:
    """Refuses a destination without room for what is still to be written.

    Raises:
        ExportError: too little room.
    """
    needed, free = disk_need(plan, path)
    if needed > free:
        raise ExportError(
            f"{path} has room for {show_bytes(free)} ({free:,} bytes), and {show_bytes(needed)} ({needed:,} bytes) are still to "
            "be written\n  Free some room, or choose another destination; nothing was written"
        )


def disk_need(plan: Plan, path: Path) -> tuple[int, int]:
    """(bytes still to be written, bytes free) at a destination; files that are already there count as written."""
    there = sum((path / shard.file).stat().st_size for shard in plan.shards if (path / shard.file).exists())
    copied = sum(file.stat().st_size for file in copied_files(plan))
    records = 600 * sum(len(tensor.outputs) for tensor in plan.tensors)  # index, manifest and journal
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return max(0, plan.bytes - there) + copied + records, shutil.disk_usage(place).free


def fitting_workers(plan: Plan, workers: int, memory: int) -> int:
    """As many of the workers as fit into the memory bound beside what the process takes already.

    Raises:
        InputError: not even one fits.
    """
    taken = _resident_bytes()
    widest = max(math.prod(block_rows(plan, tensor)) for tensor in plan.tensors if tensor.action != CARRY)
    whole = 0 if plan.format.row_blocks else max((3 * tensor.source.bytes for tensor in plan.quantized), default=0)
    each = BYTES_PER_WEIGHT * widest + whole + WORKER_BYTES
    records = 2000 * sum(len(tensor.outputs) for tensor in plan.tensors)
    fitting = (memory - taken - records) // each
    if fitting < 1:
        raise InputError(
            f"memory = {show_bytes(memory)} is too little: the process takes {show_bytes(taken)} before it begins, its records "
            f"{show_bytes(records)} and one worker {show_bytes(each)}\n"
            f"  give at least {show_bytes(int(1.05 * (taken + records + each)))}"
        )
    return int(min(workers, fitting))


def _resident_bytes() -> int:
    """Memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the peak is the nearest thing
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _times(plan: Plan) -> dict[str, int]:
    """When the source's files changed last: what is resumed must come from the same weights as what was begun."""
    return {file: (plan.source / file).stat().st_mtime_ns for file in sorted(plan.source_files)}


def _drop_damaged(path: Path, journal: Journal, workers: int) -> int:
    """Forgets journalled shards that are not there as they were written; the number of those that are."""

    def is_whole(file: str) -> bool:
        return (path / file).exists() and hash_file(path / file) == journal.finished[file]["sha256"]

    files = list(journal.finished)
    with ThreadPoolExecutor(workers) as pool:
        whole = list(pool.map(is_whole, files))
    for file, kept in zip(files, whole, strict=True):
        if not kept:
            journal.forget(file)
    return len(journal.finished)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each operation: workers are the parallelism, and sums do not depend on how torch splits them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns what a file system refuses into one sentence."""
    try:
        yield
    except Glm5PortError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text = (
                f"the disk of {path} is full: {error.strerror}\n  Finished shards are kept: free some room and run the same again"
            )
        else:
            text = f"cannot write to {path}: {error.strerror or error}\n  The source is unchanged, finished shards are kept"
        raise ExportError(text) from error
