"""`glm5-port export`: writes an INT4 checkpoint, or says what it would write."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text, progress

if TYPE_CHECKING:
    from glm5_port.quant.export import Exported
    from glm5_port.quant.plan import Plan

STEP = 2**20
"""Bytes of the source that count as one step of the progress bar."""


def export(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A bf16 or block-FP8 checkpoint; for --dry-run also a config.json.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that does not exist or is empty.")],
    format_name: Annotated[
        str,
        typer.Option("--format", metavar="NAME", help="compressed-tensors, gptq, awq, modelslim, gguf, onnx or onnx-float16."),
    ] = "compressed-tensors",
    rule: Annotated[str, typer.Option("--rule", help="How weights are quantised: amax7, signed8 or mse.")] = "amax7",
    group_size: Annotated[int, typer.Option("--group-size", help="Weights that share a scale; -1 is a whole row.")] = 32,
    mtp: Annotated[str, typer.Option("--mtp", help="int4, or bf16 to carry the MTP layer as it is.")] = "int4",
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="REGEX", help="Quantise these projections too. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="REGEX", help="Do not quantise these. Repeatable.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE")] = "5GB",
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="What the process may take in all.")] = "2GiB",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Threads. Default: one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written, and whether it fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Write an INT4 checkpoint. Interrupted, the same command goes on where it was."""
    from glm5_port.quant.export import export as run
    from glm5_port.quant.int4 import Int4Rule
    from glm5_port.quant.plan import Options, plan_export
    from glm5_port.quant.sizes import parse_bytes

    options = Options(
        format=format_name,
        rule=Int4Rule(rule, group_size),
        mtp=mtp,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
    )
    bound = parse_bytes(memory, "--memory")
    if dry_run:
        plan = plan_export(source, options)
        description = describe(plan, destination)
        print_json(description) if as_json else print_plan(plan, description)
        if not description["disk"]["enough"]:
            raise typer.Exit(1)
        return
    started = time.perf_counter()
    shown = 0
    with progress("export", max(1, _weight_bytes(source) // STEP)) as advance:

        def report(done: int, _: int, name: str) -> None:
            nonlocal shown
            steps = done // STEP - shown
            shown += steps
            advance(steps, f"MiB, {name}")

        exported = run(source, destination, options, workers=workers or os.cpu_count() or 1, memory=bound, progress=report)
    seconds = time.perf_counter() - started
    print_json(_result(exported, seconds)) if as_json else _print_result(exported, seconds)


def describe(plan: Plan, destination: Path) -> dict[str, Any]:
    """What `export --dry-run --json` prints: what would be written, in numbers."""
    from glm5_port.quant.export import disk_need
    from glm5_port.quant.source_files import copied_files

    parts: Counter[tuple[str, str]] = Counter()
    stored: Counter[tuple[str, str]] = Counter()
    written: Counter[tuple[str, str]] = Counter()
    for tensor in plan.tensors:
        key = (tensor.component + (" (MTP layer)" if tensor.mtp else ""), tensor.action)
        parts[key] += 1
        stored[key] += tensor.source.bytes
        written[key] += tensor.bytes
    needed, free = disk_need(plan, destination)
    return {
        "source": str(plan.source),
        "destination": str(destination),
        "format": plan.options.format,
        "rule": str(plan.options.rule),
        "expert_matrices": plan.experts(),
        "components": [
            {"component": component, "action": action, "tensors": count, "bytes_read": stored[component, action],
             "bytes_written": written[component, action]}
            for (component, action), count in parts.items()
        ],
        "bytes_read": plan.source_bytes,
        "bytes_written": plan.bytes,
        "shards": [{"file": s.file, "bytes": s.bytes, "tensors": len(s.places)} for s in plan.shards],
        "copied": [file.name for file in copied_files(plan)],
        "disk": {"needed": needed, "free": free, "enough": needed <= free},
        "notes": list(plan.notes),
    }  # fmt: skip


def print_plan(plan: Plan, d: dict[str, Any]) -> None:
    """What --dry-run prints: the plan, and its description for the numbers."""
    from glm5_port.quant.sizes import show_bytes

    experts = d["expert_matrices"]
    print_text(f"{plan.format.title}\n{d['rule']}\n")
    rows = [
        [e["component"], e["action"], f"{e['tensors']:,}", show_bytes(e["bytes_read"]), show_bytes(e["bytes_written"])]
        for e in d["components"]
    ]
    rows.append(["all", "", f"{len(plan.tensors):,}", show_bytes(d["bytes_read"]), show_bytes(d["bytes_written"])])
    print_table(("component", "what happens", "tensors", "read", "written"), rows)
    print_text(f"\nexpert matrices to quantise: {experts['trunk']:,} + {experts['mtp']:,} in the MTP layer\n")
    print_table(("shard", "bytes", "tensors"), [[s["file"], f"{s['bytes']:,}", f"{s['tensors']:,}"] for s in d["shards"]])
    if d["copied"]:
        print_text(f"\ncopied: {', '.join(d['copied'])}")
    for note in d["notes"]:
        print_text(f"\nnote: {note}")
    disk = d["disk"]
    verdict = "enough" if disk["enough"] else "NOT ENOUGH"
    print_text(f"\ndisk: {show_bytes(disk['needed'])} needed at {d['destination']}, {show_bytes(disk['free'])} free: {verdict}")
    print_text("nothing was written (--dry-run)")


def _weight_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.glob("*.safetensors")) if source.is_dir() else 0


def _result(exported: Exported, seconds: float) -> dict[str, Any]:
    plan = exported.plan
    return {
        "destination": str(exported.destination),
        "format": plan.options.format,
        "rule": str(plan.options.rule),
        "expert_matrices": plan.experts(),
        "shards": len(plan.shards),
        "shards_resumed": exported.resumed,
        "bytes_written": plan.bytes,
        "workers": exported.workers,
        "seconds": seconds,
        "report": None if exported.report is None else exported.report["total"],
        "notes": list(plan.notes),
    }


def _print_result(exported: Exported, seconds: float) -> None:
    from glm5_port.quant.sizes import show_bytes

    plan, report = exported.plan, exported.report
    for note in plan.notes:
        print_text(f"note: {note}")
    if report is None:
        print_text(f"{exported.destination} holds this very export already: nothing was done")
        return
    experts, summed = plan.experts(), report["total"]
    shards = f"{len(plan.shards)} shard{'s' * (len(plan.shards) != 1)}"
    resumed = f" ({exported.resumed} of them from an earlier run)" if exported.resumed else ""
    threads = f"{exported.workers} worker{'s' * (exported.workers != 1)}"
    print_text(
        f"{exported.destination}: {shards}{resumed}, {show_bytes(plan.bytes)}, {seconds:.1f} s with {threads}\n"
        f"  {experts['trunk']:,} expert matrices + {experts['mtp']:,} of the MTP layer in INT4, {plan.options.rule}\n"
        f"  mean error {summed['mean_relative_error']:.2%} of the mean magnitude; per layer in int4_report.txt\n"
        f"  check it: glm5-port verify {exported.destination} --source {plan.source}"
    )
