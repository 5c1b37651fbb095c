"""Work in processes that may crash, hang or lose their device, under a clock that none of them can stop.

    run(work, items, workers=12, until=time.monotonic() + 330, seconds_each=180, found=..., ended=...)

Each item is given to one of some processes, which calls `work(item)` and hands over what that yields, one result after the other:
an item that does not end leaves what it had found. A process that dies, raises, or takes too long takes its item with it and
nothing else: another process takes its place. At the end of the time, and however `run` is left, every process is killed with all
that it started (a compiler that runs for a kernel, say), and if this process dies they die too.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

OUT_OF_TIME = "out of time"
LAST_WORDS = 5.0
"""Seconds that killed processes have for leaving. One that a driver holds may need longer; nobody waits for it."""
_SET_PARENT_DEATH_SIGNAL = 1
"""Of prctl(2)."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    item: Any = None
    begin: float = 0.0


def run(
    work: Callable[[Any], Iterable[Any]],
    items: Sequence[Any],
    *,
    workers: int,
    until: float,
    seconds_each: float,
    found: Callable[[Any, Any], None],
    ended: Callable[[Any, str], None],
) -> None:
    """Does `items`, in their order, in other processes.

    Args:
        work: (item) -> its results; importable by name, for it runs elsewhere.
        workers: processes at most.
        until: on the clock of `time.monotonic`: then everything ends.
        seconds_each: that an item may take.
        found: called with (item, result) as results come.
        ended: called once for each item, with (item, "") or (item, why it did not come to its end).
    """
    waiting, idle, busy = deque(items), list[_Worker](), list[_Worker]()
    try:
        while waiting or busy:
            if time.monotonic() >= until:
                for item in [*(worker.item for worker in busy), *waiting]:
                    ended(item, OUT_OF_TIME)
                return
            while waiting and len(busy) < workers:
                busy.append(_given(idle.pop() if idle else _started(work), waiting.popleft()))
            _listen(busy, idle, until, seconds_each, found, ended)
    finally:
        _kill([*busy, *idle])


def _listen(
    busy: list[_Worker],
    idle: list[_Worker],
    until: float,
    seconds_each: float,
    found: Callable[[Any, Any], None],
    ended: Callable[[Any, str], None],
) -> None:
    """Takes what has come, or waits for it until the next item is late."""
    next_late = min(until, *(worker.begin + seconds_each for worker in busy))
    ready = wait([worker.connection for worker in busy], timeout=max(0.0, next_late - time.monotonic()))
    for worker in list(busy):
        if worker.connection in ready:
            problem, result, is_last = _heard(worker)
            if not is_last:
                found(worker.item, result)
                continue
            busy.remove(worker)
            idle.extend([] if problem else [worker])
        elif time.monotonic() - worker.begin > seconds_each:
            problem = f"took longer than {seconds_each:.0f} s"
            busy.remove(worker)
        else:
            continue
        if problem:
            _kill([worker])
        ended(worker.item, problem)


def _heard(worker: _Worker) -> tuple[str, Any, bool]:
    """(problem, result, whether the item has come to an end)."""
    try:
        problem, result, is_last = worker.connection.recv()
        return problem, result, is_last
    except (EOFError, OSError):
        worker.process.join(LAST_WORDS)
        code = worker.process.exitcode
        killed = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"its process died ({killed})", None, True


def _started(work: Callable[[Any], Iterable[Any]]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a driver does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not be the end of the pipe
    return _Worker(process, ours)


def _given(worker: _Worker, item: Any) -> _Worker:
    worker.item, worker.begin = item, time.monotonic()
    with contextlib.suppress(OSError):  # a process that died in between is noticed by the next reading
        worker.connection.send(item)
    return worker


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        with contextlib.suppress(OSError):  # it is gone, or has not come as far as making a group
            os.killpg(worker.process.pid or 0, signal.SIGKILL)
        worker.process.kill()
    patience = time.monotonic() + LAST_WORDS
    for worker in workers:
        worker.process.join(max(0.0, patience - time.monotonic()))
        worker.connection.close()


def _serve(connection: Connection, work: Callable[[Any], Iterable[Any]], parent: int) -> None:
    """What a worker does until it is killed."""
    os.setpgid(0, 0)  # a group of its own, so that what it starts can be killed with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for item in _received(connection):
        try:
            for result in work(item):
                connection.send(("", result, False))
        except Exception as error:  # whatever it is, its item is lost, and perhaps the device for this process
            connection.send((f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", None, True))
            return
        connection.send(("", None, True))


def _received(connection: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield connection.recv()
