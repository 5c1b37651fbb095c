"""`glm5-port transcode`: writes an INT4 checkpoint in another INT4 format, or says what it would write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_port.cli.export import describe, print_plan
from glm5_port.cli.output import print_json, print_text, progress

if TYPE_CHECKING:
    from glm5_port.quant.export import Exported


def transcode(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="An INT4 checkpoint: compressed-tensors (canonical, Kimi), GPTQ or AWQ.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that does not exist or is empty.")],
    format_name: Annotated[
        str,
        typer.Option("--format", metavar="NAME", help="compressed-tensors, gptq, awq, modelslim, gguf, onnx or onnx-float16."),
    ] = "compressed-tensors",
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE")] = "5GB",
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="What the process may take in all.")] = "2GiB",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Threads. Default: one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written, and whether it fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Write an INT4 checkpoint in another format, bit for bit. Interrupted, the same command goes on where it was."""
    from glm5_port.quant.plan import Options
    from glm5_port.quant.sizes import parse_bytes
    from glm5_port.quant.transcode import plan_transcode
    from glm5_port.quant.transcode import transcode as run

    options = Options(format=format_name, max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"))
    bound = parse_bytes(memory, "--memory")
    if dry_run:
        plan = plan_transcode(source, options)
        description = describe(plan, destination)
        print_json(description) if as_json else print_plan(plan, description)
        if not description["disk"]["enough"]:
            raise typer.Exit(1)
        return
    started, shown = time.perf_counter(), 0
    with progress("transcode", 100) as advance:

        def report(done: int, total: int, name: str) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            advance(percent - shown, f"percent, {name}")
            shown = percent

        written = run(source, destination, options, workers=workers or os.cpu_count() or 1, memory=bound, progress=report)
    result = _result(written, time.perf_counter() - started)
    print_json(result) if as_json else _print_result(result)


def _result(written: Exported, seconds: float) -> dict[str, Any]:
    plan = written.plan
    return {
        "source": str(plan.source),
        "destination": str(written.destination),
        "source_format": None if plan.source_format is None else plan.source_format.name,
        "format": plan.options.format,
        "expert_matrices": plan.experts(),
        "shards": len(plan.shards),
        "shards_resumed": written.resumed,
        "bytes_written": plan.bytes,
        "workers": written.workers,
        "seconds": seconds,
        "notes": list(plan.notes),
    }


def _print_result(r: dict[str, Any]) -> None:
    from glm5_port.quant.sizes import show_bytes

    for note in r["notes"]:
        print_text(f"note: {note}")
    if not r["workers"]:
        print_text(f"{r['destination']} holds this very checkpoint already: nothing was done")
        return
    experts, shards = r["expert_matrices"], f"{r['shards']} shard{'s' * (r['shards'] != 1)}"
    print_text(
        f"{r['destination']}: {shards}, {show_bytes(r['bytes_written'])}, {r['seconds']:.1f} s\n"
        f"  {experts['trunk']:,} expert matrices + {experts['mtp']:,} of the MTP layer\n"
        f"  from {r['source_format']} to {r['format']}, codes and scales bit for bit"
    )
