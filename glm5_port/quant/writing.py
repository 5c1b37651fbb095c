"""Fills the files of an export. Workers take one tensor after the other and write at places that the plan fixed, so that the
bytes do not depend on who comes first; memory is that of a block of rows for each worker.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import ExportError, InputError
from glm5_port.model.block_fp8 import dequantize_rows
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.operators.int4 import quantize_rows
from glm5_port.quant.files import PART, Reader, as_bytes, as_tensor, hash_file, sync_directory, tensor_digest, write_at
from glm5_port.quant.formats import exact_scales
from glm5_port.quant.int4 import quantize_packed, quantize_with_scales
from glm5_port.quant.journal import Journal
from glm5_port.quant.output_files import Place, PlannedTensor, Shard
from glm5_port.quant.plan import CONVERT, INT4, INT8, REPACK, Plan
from glm5_port.quant.statistics import Statistics, measure, quantize_measured, total

BLOCK_WEIGHTS = 2**20
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
        self._open: dict[str, OpenShard] = {}
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
                        self._open[shard.file] = OpenShard(shard, self._path)
                    target = self._open[shard.file]
                record = _write_tensor(self._plan, tensor, reader, target)
                if self._finished(target, tensor, record):
                    self._close(target)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop = True

    def _finished(self, target: OpenShard, tensor: PlannedTensor, record: dict[str, Any]) -> bool:
        """Notes a tensor; whether it was the last one of its shard."""
        with self._lock:
            target.records[tensor.name] = record
            self._done += tensor.source.bytes + (tensor.multipliers.bytes if tensor.multipliers else 0)
            if self._progress is not None:
                self._progress(self._done, self._total, tensor.name)
            return len(target.records) == len(target.shard.tensors)

    def _close(self, target: OpenShard) -> None:
        digest = target.close()
        shard = target.shard
        records = {tensor.name: target.records[tensor.name] for tensor in shard.tensors}
        with self._lock:
            self._journal.record(shard.file, {"bytes": shard.bytes, "sha256": digest, "tensors": records})
            del self._open[shard.file]


class OpenShard:
    """A file that is being filled."""

    def __init__(self, shard: Shard, directory: Path) -> None:
        self.shard, self.path = shard, directory / shard.file
        self.records: dict[str, dict[str, Any]] = {}
        self._part = self.path.with_name(self.path.name + PART)
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self._file, 0, shard.bytes)  # a full disk shows now
            for place, data in shard.fixed.items():
                write_at(self._file, memoryview(data), place)
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


class OpenPiece:
    """A piece that is filled from its first byte on, and hashed."""

    def __init__(self, target: OpenShard, name: str) -> None:
        self._target, self._place, self.bytes, self.digest = target, target.shard.places[name], 0, tensor_digest()

    def append(self, data: memoryview) -> None:
        """Writes the next bytes; whole rows where rows do not follow each other."""
        for part, first in spread(self._place, self.bytes, data):
            self._target.write(part, first)
        self.digest.update(data)
        self.bytes += len(data)


def spread(place: Place, done: int, data: memoryview) -> Iterator[tuple[memoryview, int]]:
    """(bytes, where they go in the file) of the next bytes of a piece of which `done` are written."""
    if not place.stride:
        yield data, place.first + done
        return
    for begin in range(0, len(data), place.row):
        yield data[begin : begin + place.row], place.first + (done + begin) // place.row * place.stride


def _write_tensor(plan: Plan, tensor: PlannedTensor, reader: Reader, target: OpenShard) -> dict[str, Any]:
    """Writes what stands for one source tensor; hashes of it and of the source, and statistics if it was quantised."""
    outputs = {output.name: OpenPiece(target, output.name) for output in tensor.outputs}
    source = tensor_digest()
    statistics: list[Statistics] = []
    for name, data in made(plan, tensor, reader, source.update, statistics):
        outputs[name].append(data)
    for planned in tensor.outputs:
        if outputs[planned.name].bytes != planned.bytes:
            raise ExportError(f"{planned.name}: {outputs[planned.name].bytes:,} bytes were made, {planned.bytes:,} were planned")
    record: dict[str, Any] = {"source": source.hexdigest()}
    record["outputs"] = {name: output.digest.hexdigest() for name, output in outputs.items()}
    return record | ({"statistics": asdict(total(statistics))} if statistics else {})


def _unseen(stored: memoryview) -> None:
    """For bytes that nobody else wants."""


def made(
    plan: Plan,
    tensor: PlannedTensor,
    reader: Reader,
    seen: Callable[[memoryview], None] = _unseen,
    statistics: list[Statistics] | None = None,
) -> Iterator[tuple[str, memoryview]]:
    """(output tensor, its next bytes) of what stands for one source tensor. Bytes stand until the next ones are asked for.

    Args:
        plan: what is made.
        tensor: which one.
        reader: of the source.
        seen: called with all stored bytes that are read.
        statistics: what quantising did is added here.
    """
    if tensor.copied:
        for chunk in reader.chunks(tensor.source):
            seen(chunk)
            yield tensor.outputs[0].name, chunk
    elif tensor.kept is not None and tensor.kept.convert is not None:
        for _, rows in read_rows(plan, tensor, reader, seen):
            for name, part in tensor.kept.convert(rows).items():
                yield name, as_bytes(part)
    elif tensor.kept is not None:
        for _, rows in read_rows(plan, tensor, reader, seen):
            yield tensor.outputs[0].name, as_bytes(rows)
    elif tensor.action == INT8:
        for first, rows in read_rows(plan, tensor, reader, seen):
            codes, scales = quantize_rows(rows)
            if bad := int(scales.isnan().sum()):
                raise InputError(f"{tensor.name}: {bad:,} rows from row {first} on hold NaN or infinity: the source is broken")
            names = (output.name for output in tensor.outputs)
            for name, part in zip(names, (codes, scales, torch.zeros_like(scales)), strict=True):
                yield name, as_bytes(part)
    else:
        for pieces in (
            _repacked(plan, tensor, reader, seen)
            if tensor.action == REPACK
            else _quantized(plan, tensor, reader, seen, statistics)
        ):
            for name, part in pieces.items():
                yield name, as_bytes(part)
        for name, part in plan.format.constants(tensor.name, tensor.source.shape).items():
            yield name, as_bytes(part)


def _repacked(
    plan: Plan, tensor: PlannedTensor, reader: Reader, seen: Callable[[memoryview], None]
) -> Iterator[Mapping[str, Tensor]]:
    """Rows of the pieces of a weight whose codes and scales an INT4 source has; all at once where either format wants that."""
    if plan.source_format is None:
        raise InputError(f"{tensor.name}: its codes are to be carried, and the source is not INT4")
    rows, step = tensor.source.shape[0], block_rows(plan, tensor)[0]
    for first in range(0, rows, step):
        span = None if step == rows else (first, min(first + step, rows))
        packed, scales = plan.source_format.decode(read_parts(tensor.parts, reader, span, seen), tensor.name)
        canonical = exact_scales(scales, torch.bfloat16, tensor.name, plan.source_format.name, first)
        yield _encoded(plan, tensor, packed, canonical, first)


def read_parts(
    parts: Mapping[str, StoredTensor],
    reader: Reader,
    span: tuple[int, int] | None,
    seen: Callable[[memoryview], None] = _unseen,
) -> dict[str, Tensor]:
    """The stored tensors of a weight in INT4, whole or a block of rows of them.

    Args:
        parts: by name.
        reader: of their directory.
        span: first and end row of the matrices among them; None reads all of everything. Whatever is no matrix (a stored shape)
            goes with the first row.
        seen: called with the stored bytes.
    """
    read = {}
    for name, part in parts.items():
        first, shape = 0, part.shape
        if span is not None and len(part.shape) == 2:
            first, shape = span[0], (span[1] - span[0], part.shape[1])
        elif span is not None and span[0]:
            continue
        width = part.bytes // max(part.shape[0], 1)
        stored = reader.bytes(part, first * width, shape[0] * width)
        seen(stored)
        read[name] = as_tensor(stored, part.dtype, shape)
    return read


def _quantized(
    plan: Plan,
    tensor: PlannedTensor,
    reader: Reader,
    seen: Callable[[memoryview], None],
    statistics: list[Statistics] | None,
) -> Iterator[Mapping[str, Tensor]]:
    """Rows of the pieces of a weight that is quantised, a block at a time."""
    for first, rows in read_rows(plan, tensor, reader, seen):
        pieces, measured = quantized_block(plan, tensor, rows, first, measured=statistics is not None)
        if statistics is not None and measured is not None:
            statistics.append(measured)
        yield pieces


def quantized_block(
    plan: Plan, tensor: PlannedTensor, rows: Tensor, first: int, *, measured: bool
) -> tuple[Mapping[str, Tensor], Statistics | None]:
    """A block of rows as rows of its pieces, and what quantising did to it: the one place where an export quantises.

    Args:
        plan: tells the rule and the format.
        tensor: the weight.
        rows: [rows, in] bfloat16.
        first: the weight's row that the first of them is.
        measured: whether statistics are wanted.
    """
    name, rule = f"{tensor.name}{f', rows from {first}' if first else ''}", plan.options.rule
    if plan.scales is not None:
        scales = plan.scales(tensor.name)[first : first + rows.shape[0]]
        packed = quantize_with_scales(rows, scales, name=name)
        statistics = measure(rows, packed, scales) if measured else None
    elif measured:
        packed, scales, statistics = quantize_measured(rows, rule, name=name, requantize=first == 0)
    else:
        packed, scales = quantize_packed(rows, rule, name=name)
        statistics = None
    return _encoded(plan, tensor, packed, scales, first), statistics


def _encoded(plan: Plan, tensor: PlannedTensor, packed: Tensor, scales: Tensor, first: int) -> Mapping[str, Tensor]:
    """Rows of the pieces from words and scales, which the format must hold exactly."""
    exact = exact_scales(scales, plan.format.scale_dtype, tensor.name, plan.format.name, first)
    return plan.format.encode(tensor.name, packed, exact)


def read_rows(
    plan: Plan, tensor: PlannedTensor, reader: Reader, seen: Callable[[memoryview], None] = _unseen
) -> Iterator[tuple[int, Tensor]]:
    """(first row, block of rows) of a tensor that is not carried: block-FP8 multiplied out to bfloat16, values that are only
    converted in their stored dtype, others in bfloat16. A block stands until the next one is asked for.

    Args:
        plan: tells the blocks of block-FP8.
        tensor: which one.
        reader: of the source.
        seen: called with the stored bytes of every block, and of the multipliers.
    """
    rows, step = tensor.source.shape[0], block_rows(plan, tensor)[0]
    row_bytes = tensor.source.bytes // max(rows, 1)
    scales = None
    if tensor.multipliers is not None:
        stored = reader.bytes(tensor.multipliers, 0, tensor.multipliers.bytes)
        seen(stored)
        scales = as_tensor(stored, tensor.multipliers.dtype, tensor.multipliers.shape).to(torch.float32)
    room = memoryview(bytearray(step * row_bytes))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        stored = reader.bytes(tensor.source, first * row_bytes, (last - first) * row_bytes, room)
        seen(stored)
        block = as_tensor(stored, tensor.source.dtype, (last - first, *tensor.source.shape[1:]))
        if scales is not None and plan.block is not None:
            high = plan.block[0]
            yield first, dequantize_rows(block, scales[first // high : -(-last // high)], plan.block, torch.bfloat16)
        else:
            yield first, block if tensor.action == CONVERT else block.to(torch.bfloat16)


def block_rows(plan: Plan, tensor: PlannedTensor) -> tuple[int, int]:
    """(rows of a block, weights of a row) of a tensor that is not carried."""
    rows, columns = tensor.source.shape[0], math.prod(tensor.source.shape[1:])
    multiple = 1 if tensor.kept is None else tensor.kept.multiple
    from_rows = plan.source_format is None or plan.source_format.row_blocks
    whole = tensor.action in (INT4, REPACK) and not (plan.format.row_blocks and from_rows)
    if whole or not multiple:
        return rows, columns
    if tensor.multipliers is not None and plan.block is not None:
        multiple = math.lcm(multiple, plan.block[0])
    return min(rows, max(1, BLOCK_WEIGHTS // max(columns, 1) // multiple) * multiple), columns
