"""`glm5-port verify`: says whether an INT4 checkpoint is what it claims to be, and names what is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from glm5_port.cli.output import print_json, print_text, progress
from glm5_port.errors import InputError

SHOWN = 30
"""Problems shown as text; --json has all."""


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="DST", help="Directory of an INT4 checkpoint.")],
    source: Annotated[
        Path | None, typer.Option("--source", metavar="SRC", help="What it was exported from: weights are quantised again.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, metavar="N", help="With --source: compare only N tensors.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Threads. Default: one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Check an INT4 checkpoint: names, shapes, files, sha256, codes, scales, and its source. Exit 1 if anything is wrong."""
    from glm5_port.quant.verify import verify as check

    if sample is not None and source is None:
        raise InputError("--sample says how many tensors to compare with the source, but no --source is given")
    with progress("verify", 100) as advance:
        shown = 0

        def report(done: int, total: int, name: str) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            advance(percent - shown, f"percent, {name}")
            shown = percent

        found = check(checkpoint, source, sample=sample, workers=workers or os.cpu_count() or 1, progress=report)
    if as_json:
        print_json(
            {
                "path": str(found.path),
                "good": not found.problems,
                "problems": found.problems,
                "checked": found.checked,
                "notes": found.notes,
            }
        )
    else:
        lines = [f"checked  {line}" for line in found.checked] + [f"note     {line}" for line in found.notes]
        lines += [f"WRONG    {line}" for line in found.problems[:SHOWN]]
        if len(found.problems) > SHOWN:
            lines.append(f"         and {len(found.problems) - SHOWN:,} more (--json names all)")
        count = len(found.problems)
        verdict = f"{count:,} problem{'s' * (count != 1)}: do not use it" if count else "good"
        print_text("\n".join([*lines, f"{found.path}: {verdict}"]))
    if found.problems:
        raise typer.Exit(1)
