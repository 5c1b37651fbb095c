"""How commands speak: tables and JSON on stdout; logging, progress and errors on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 10_000
"""Columns that a table may take where stdout is not a terminal, so that sentences stay on one line for grep."""
PLAIN_INTERVAL = 2.0
"""Seconds between progress lines where no bar can be drawn."""


def print_json(data: Any) -> None:
    """Writes `data` and nothing else to stdout."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_text(text: str = "") -> None:
    """Writes a line (or lines) to stdout as they are."""
    sys.stdout.write(text + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Writes a table to stdout: fitted to the terminal, or unwrapped when stdout is not one."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a cell with [brackets] is not markup
    console.print(table)


def log_to_stderr() -> None:
    """Shows the INFO lines of the logger `glm5_port` (which implementation runs) on stderr, one plain line each."""
    logger = logging.getLogger("glm5_port")
    if not any(isinstance(handler, _CurrentStderr) for handler in logger.handlers):
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at that moment, so that it can be captured and redirected."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None: ...


class Advance(Protocol):
    """Reports that `steps` more are done; `note` says what is being done now."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Shows how far a loop of `total` steps is, on stderr: a bar with the remaining time on a terminal, otherwise a plain
    line at most every two seconds.

        with progress("loading", len(tensors)) as advance:
            for tensor in tensors:
                ...
                advance(note=tensor.name)
    """
    sys.stdout.flush()  # what was said before stands before, where both go into one file
    console = Console(stderr=True, highlight=False)
    shown = _bar(console, description, total) if console.is_terminal else _lines(description, total)
    with shown as advance:
        yield advance


@contextmanager
def _bar(console: Console, description: str, total: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance


@contextmanager
def _lines(description: str, total: int, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    started = last = clock()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = clock()
        if now - last >= PLAIN_INTERVAL:
            last = now
            remaining = (now - started) / max(done, 1) * max(total - done, 0)
            print(f"{description}: {done} of {total}, about {remaining:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
    if (elapsed := clock() - started) >= PLAIN_INTERVAL:
        print(f"{description}: {done} of {total}, done in {elapsed:.0f} s", file=sys.stderr, flush=True)
