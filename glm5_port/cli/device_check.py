"""`glm5-port device-check`: parity, promises and speed on the accelerator that is here, into records that are committed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from glm5_port.cli.output import print_json


def device_check(
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="cuda, npu, or any other.")] = "cuda",
    evidence: Annotated[Path, typer.Option("--evidence", metavar="DIRECTORY", help="Where records go.")] = Path("evidence"),
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=1.0, help="Time for everything; default: eight minutes.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes that run parity.")] = None,
    operator: Annotated[
        list[str] | None, typer.Option("--operator", metavar="NAME", help="Only this one; may be repeated. No record then.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the record to stdout, and what is said to stderr.")] = False,
) -> None:
    """Run parity at small and true widths on the device that is here, measure it, and write evidence."""
    from glm5_port.requests import backend_named
    from glm5_port.testing import device_check as checking

    backend_named(backend, "--backend")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        code, record = checking.check(
            backend,
            directory=None if operator else evidence,
            seconds=seconds or checking.SECONDS,
            processes=workers or checking.WORKERS,
            operators=operator,
        )
    if as_json and record:
        print_json(record)
    raise typer.Exit(code)
