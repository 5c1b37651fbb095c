"""`glm5-port bench`: every operator at GLM-5 widths against the machine's own ceilings; no speed where parity is red."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text, progress


def bench(
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="The chip to run on; default: as GLM5_PORT_BACKEND says.")
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option("--operator", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="Working dtype.")] = "bfloat16",
    prefill: Annotated[int, typer.Option("--prefill", min=2, help="Tokens of a prefill chunk.")] = 64,
    context: Annotated[int, typer.Option("--context", min=2, help="Cached tokens.")] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Time every operator at GLM-5 widths, as a share of what this machine can reach."""
    report = measure(backend, operator, dtype=dtype, prefill=prefill, context=context)
    print_json(report) if as_json else _print(report)
    if any(timing["refused"] is not None and timing["refused"].startswith("parity") for timing in report["timings"]):
        raise typer.Exit(1)


def measure(
    backend: str | None = None,
    operators: list[str] | None = None,
    *,
    dtype: str = "bfloat16",
    prefill: int = 64,
    context: int = 8192,
) -> dict[str, Any]:
    """Ceilings of this machine and the timing of every workload, as plain data.

    Raises:
        InputError: an unknown operator or dtype, or a prefill chunk longer than the context.
    """
    import torch

    from glm5_port.config import released
    from glm5_port.errors import InputError
    from glm5_port.model.build import working_dtype
    from glm5_port.requests import resolve_backend
    from glm5_port.testing import speed
    from glm5_port.testing.parity import implementations_on
    from glm5_port.testing.workloads import workloads
    from glm5_port.testing.workloads_rest import all_workloads

    if prefill > context:
        raise InputError(f"--prefill {prefill} is longer than --context {context}: a chunk ends at the context")
    config = released("GLM-5.2")
    working = working_dtype(dtype, config)
    chip = resolve_backend(backend)
    implementations = implementations_on(chip.name, operators)
    wanted = {implementation.operator.name for implementation in implementations}
    timed = all_workloads if operators else workloads  # without a name: what a model calls
    chosen = [w for w in timed(config, prefill=prefill, context=context) if w.operator.name in wanted]
    jobs = [(w, i) for w in chosen for i in implementations if i.operator is w.operator]
    machine = speed.Machine(chip.device_type, working)
    refusals: dict[str, str | None] = {}
    timings = []
    with progress("bench", len(jobs)) as advance:
        for workload, implementation in jobs:
            key = f"{workload.operator.name} {implementation.id}"
            if key not in refusals:
                green, why = speed.parity_is_green(implementation, working, chip.name)
                refusals[key] = None if green else why
            timings.append(
                speed.time_workload(
                    workload, implementation, dtype=working, device=chip.device_type, machine=machine, refused=refusals[key]
                ).as_dict()
            )
            advance(note=f"{workload.operator.name}: {workload.name}")
    return {
        "backend": chip.name,
        "dtype": str(working).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "bandwidth_bytes_per_second": _range(timings, "bandwidth"),
        "matmul_operations_per_second": _range(timings, "matmul_rate"),
        "timings": timings,
    }


def _range(timings: list[dict[str, Any]], ceiling: str) -> list[float]:
    """Smallest and largest measurement of a ceiling over the run."""
    values = [timing["ceilings"][ceiling] for timing in timings]
    return [min(values, default=0.0), max(values, default=0.0)]


def _print(report: dict[str, Any]) -> None:
    read, multiply = report["bandwidth_bytes_per_second"], report["matmul_operations_per_second"]
    print_text(f"{report['backend']}, {report['dtype']}, {report['threads']} threads, torch {report['torch']}")
    print_text(
        f"ceilings, measured beside each workload: reads {read[0] / 1e9:.0f} to {read[1] / 1e9:.0f} GB/s, "
        f"matmul {multiply[0] / 1e9:.0f} to {multiply[1] / 1e9:.0f} GFLOP/s\n"
    )
    rows = []
    for timing in report["timings"]:
        speed = "no speed" if timing["seconds"] is None else f"{timing['seconds'] * 1e3:.3f} ms"
        share = timing["refused"] if timing["share"] is None else f"{timing['share']:.0%}"
        rows.append(
            [
                timing["operator"],
                timing["workload"],
                timing["implementation"],
                f"{timing['floor_seconds'] * 1e3:.3f} ms",
                speed,
                share or "",
            ]
        )
    print_table(("operator", "workload", "implementation", "floor", "measured", "share of floor"), rows)
