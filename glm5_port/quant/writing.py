"""Fills the files of an export. Workers take one tensor after the other and write at places that the plan fixed, so that the
bytes do not depend on who comes first; memory is that of a block of rows for each worker.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.block_fp8 import dequantize_rows
from glm5_port.operators.int4 import quantize_rows
from glm5_port.quant.files import PART, Reader, as_bytes, as_tensor, hash_file, sync_directory, write_at
from glm5_port.quant.formats import exact_scales
from glm5_port.quant.int4 import quantize
from glm5_port.quant.journal import Journal
from glm5_port.quant.plan import BF16, CARRY, INT4, INT8, REPACK, Plan, PlannedTensor, Shard
from glm5_port.quant.statistics import Statistics, measure, total

BLOCK_WEIGHTS = 2**18
"""Weights that a worker takes at once. Fixed, not derived from the memory bound, so that sums of errors are the same for any."""

Progress = Callable[[int, int, str], None]
"""Called with (bytes of the source done, bytes in all, name of the tensor)."""


class Run:
    """Workers take one tensor after the other; whoever finishes the last one of a shard closes the file."""

    def __init__(self, plan: Plan, path: Path, journal: Journal, progress: Progress | None) -> None:
        self._plan, self._path, self._journal, self._progress = plan, path, journal, progress
        self._lock = threading.Lock()
        self._stop = False
        self._failure: BaseException | None = None
        self._open: dict[str, _OpenShard] = {}
        self._done, self._total = 0, plan.source_bytes
        self._tasks: deque[tuple[Shard, PlannedTensor]] = deque()
        for shard in plan.shards:
            if shard.file in journal.finished:
                self._done += sum(tensor.source.bytes for tensor in shard.tensors)
            else:
                self._tasks.extend((shard, tensor) for tensor in shard.tensors)

    def work(self, workers: int) -> None:
        """Runs until everything is written or something fails."""
        with Reader(self._plan.source) as reader, ThreadPoolExecutor(workers, "export") as pool:
            try:
                wait([pool.submit(self._work, reader) for _ in range(workers)])
            finally:
                self._stop = True  # also when the main thread was interrupted
                pool.shutdown()
                for shard in self._open.values():
                    shard.abandon()
        if self._failure is not None:
            raise self._failure

    def _work(self, reader: Reader) -> None:
        torch.set_num_threads(1)  # held per thread
        try:
            while not self._stop:
                with self._lock:
                    if not self._tasks:
                        return
                    shard, tensor = self._tasks.popleft()
                    if shard.file not in self._open:
                        self._open[shard.file] = _OpenShard(shard, self._path)
                    target = self._open[shard.file]
                record = _write_tensor(self._plan, tensor, reader, target)
                if self._finished(target, tensor, record):
                    self._close(target)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True

    def _finished(self, target: _OpenShard, tensor: PlannedTensor, record: dict[str, Any]) -> bool:
        """Notes a tensor; whether it was the last one of its shard."""
        with self._lock:
            target.records[tensor.name] = record
            self._done += tensor.source.bytes + (tensor.multipliers.bytes if tensor.multipliers else 0)
            if self._progress is not None:
                self._progress(self._done, self._total, tensor.name)
            return len(target.records) == len(target.shard.tensors)

    def _close(self, target: _OpenShard) -> None:
        digest = target.close()
        shard = target.shard
        records = {tensor.name: target.records[tensor.name] for tensor in shard.tensors}
        with self._lock:
            self._journal.record(shard.file, {"bytes": shard.bytes, "sha256": digest, "tensors": records})
            del self._open[shard.file]


class _OpenShard:
    """A file that is being filled."""

    def __init__(self, shard: Shard, directory: Path) -> None:
        self.shard, self.path = shard, directory / shard.file
        self.records: dict[str, dict[str, Any]] = {}
        self._part = self.path.with_name(self.path.name + PART)
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self._file, 0, shard.bytes)  # a full disk shows now
            write_at(self._file, memoryview(shard.header), 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: memoryview, place: int) -> None:
        """Writes bytes at a place."""
        write_at(self._file, data, place)

    def close(self) -> str:
        """Syncs the file and gives it its name; its sha256."""
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        digest = hash_file(self._part)
        os.replace(self._part, self.path)
        sync_directory(self.path.parent)
        return digest

    def abandon(self) -> None:
        """Removes the unfinished file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._part.unlink(missing_ok=True)


class _Output:
    """An output tensor that is filled from its first byte on, and hashed."""

    def __init__(self, target: _OpenShard, name: str) -> None:
        self._target, self._place, self.digest = target, target.shard.places[name], hashlib.sha256()

    def append(self, data: memoryview) -> None:
        """Writes the next bytes."""
        self._target.write(data, self._place)
        self.digest.update(data)
        self._place += len(data)


def _write_tensor(plan: Plan, tensor: PlannedTensor, reader: Reader, target: _OpenShard) -> dict[str, Any]:
    """Writes what stands for one source tensor; hashes of it and of the source, and statistics if it was quantised."""
    outputs = {output.name: _Output(target, output.name) for output in tensor.outputs}
    source = hashlib.sha256()
    statistics: list[Statistics] = []
    for name, data in made(plan, tensor, reader, source.update, statistics):
        outputs[name].append(data)
    record: dict[str, Any] = {"source": source.hexdigest()}
    record["outputs"] = {name: output.digest.hexdigest() for name, output in outputs.items()}
    return record | ({"statistics": asdict(total(statistics))} if statistics else {})


def made(
    plan: Plan,
    tensor: PlannedTensor,
    reader: Reader,
    seen: Callable[[bytearray], None] = lambda _: None,
    statistics: list[Statistics] | None = None,
) -> Iterator[tuple[str, memoryview]]:
    """(output tensor, its next bytes) of what stands for one source tensor.

    Args:
        plan: what is made.
        tensor: which one.
        reader: of the source.
        seen: called with all stored bytes that are read.
        statistics: what quantising did is added here.
    """
    if tensor.action == CARRY:
        for chunk in reader.chunks(tensor.source):
            seen(chunk)
            yield tensor.name, memoryview(chunk)
    elif tensor.action == BF16:
        for _, rows in read_rows(plan, tensor, reader, seen):
            yield tensor.name, as_bytes(rows)
    elif tensor.action == INT8:
        for first, rows in read_rows(plan, tensor, reader, seen):
            codes, scales = quantize_rows(rows)
            if bad := int(scales.isnan().sum()):
                raise InputError(f"{tensor.name}: {bad:,} rows from row {first} on hold NaN or infinity: the source is broken")
            names = (output.name for output in tensor.outputs)
            for name, part in zip(names, (codes, scales, torch.zeros_like(scales)), strict=True):
                yield name, as_bytes(part)
    else:
        for codes, scales in _codes(plan, tensor, reader, seen, statistics):
            for name, part in plan.format.encode(tensor.name, codes, scales).items():
                yield name, as_bytes(part)
        for name, part in plan.format.constants(tensor.name, tensor.source.shape).items():
            yield name, as_bytes(part)


def _codes(
    plan: Plan,
    tensor: PlannedTensor,
    reader: Reader,
    seen: Callable[[bytearray], None],
    statistics: list[Statistics] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(codes, bfloat16 scales) of blocks of rows: quantised, or as an INT4 source has them."""
    if plan.source_format is not None:
        read = {}
        for name, part in tensor.parts.items():
            stored = reader.bytes(part, 0, part.bytes)
            seen(stored)
            read[name] = as_tensor(stored, part.dtype, part.shape)
        codes, scales = plan.source_format.decode(read, tensor.name)
        yield codes, exact_scales(scales, torch.bfloat16, tensor.name, plan.source_format.name)
        return
    for first, rows in read_rows(plan, tensor, reader, seen):
        quantized = quantize(rows, plan.options.rule, name=f"{tensor.name}{f', rows from {first}' if first else ''}")
        yield quantized.codes, quantized.scales
        if statistics is not None:
            statistics.append(measure(rows, quantized, requantize=first == 0))


def read_rows(
    plan: Plan, tensor: PlannedTensor, reader: Reader, seen: Callable[[bytearray], None] = lambda _: None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, block of rows) of a matrix in bfloat16, block-FP8 multiplied out.

    Args:
        plan: tells the blocks of block-FP8.
        tensor: which one.
        reader: of the source.
        seen: called with the stored bytes of every block, and of the multipliers.
    """
    rows, columns = tensor.source.shape
    step, multiple = block_rows(plan, tensor)
    row_bytes = tensor.source.bytes // rows
    scales = None
    if tensor.multipliers is not None:
        stored = reader.bytes(tensor.multipliers, 0, tensor.multipliers.bytes)
        seen(stored)
        scales = as_tensor(stored, tensor.multipliers.dtype, tensor.multipliers.shape).to(torch.float32)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        stored = reader.bytes(tensor.source, first * row_bytes, (last - first) * row_bytes)
        seen(stored)
        block = as_tensor(stored, tensor.source.dtype, (last - first, columns))
        if scales is not None and plan.block is not None:
            yield first, dequantize_rows(block, scales[first // multiple : -(-last // multiple)], plan.block, torch.bfloat16)
        else:
            yield first, block.to(torch.bfloat16)


def block_rows(plan: Plan, tensor: PlannedTensor) -> tuple[int, int]:
    """(rows of a block, rows that blocks must be a multiple of) of a matrix that is not carried."""
    multiple = 1 if tensor.multipliers is None or plan.block is None else plan.block[0]
    rows, columns = tensor.source.shape
    if tensor.action == REPACK or (tensor.action == INT4 and not plan.format.row_blocks):
        return rows, multiple
    return min(rows, max(1, BLOCK_WEIGHTS // columns // multiple) * multiple), multiple
