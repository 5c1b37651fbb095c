"""`glm5-port parity`: every implementation against the float64 gold; record and replay compare machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from glm5_port.cli.output import Advance, print_json, print_table, print_text, progress
from glm5_port.errors import InputError

app = typer.Typer(
    help="Hold every implementation against the float64 gold of its operator (exit code 1 when one fails).",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
)

BackendOption = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="The chip to run on; default: as GLM5_PORT_BACKEND says.")
]
OperatorOption = Annotated[
    list[str] | None, typer.Option("--operator", metavar="NAME", help="Only this operator; may be repeated.")
]
SmallOption = Annotated[bool, typer.Option("--small", help="Leave out the cases at GLM-5 widths.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", metavar="DTYPE", help="Only this working dtype: float32, bfloat16 or float16.")
]


@app.callback()
def parity(
    context: typer.Context,
    backend: BackendOption = None,
    operator: OperatorOption = None,
    dtype: DtypeOption = None,
    small: SmallOption = False,
    sweep: Annotated[
        int | None,
        typer.Option(
            "--sweep", min=1, metavar="N", help="N random cases of each operator, sizes random too, instead of the named ones."
        ),
    ] = None,
    sweep_from: Annotated[
        int, typer.Option("--sweep-from", min=0, metavar="NUMBER", help="Number of the first one; a number makes the same case.")
    ] = 0,
    evidence: Annotated[
        Path | None, typer.Option("--evidence", metavar="FOLDER", help="Also write the record to commit.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold every implementation against the float64 gold of its operator (exit code 1 when one fails)."""
    if context.invoked_subcommand is not None:
        return
    if sweep and evidence:
        raise InputError("--evidence with --sweep: a record is of the named cases; leave one of the two out")
    numbers = range(sweep_from, sweep_from + sweep) if sweep else None
    report = run_parity(backend, operator, small=small, dtype=dtype, sweep=numbers)
    if evidence is not None:
        from glm5_port.testing.evidence import evidence as make_evidence
        from glm5_port.testing.evidence import write_evidence

        report["evidence"] = str(write_evidence(make_evidence(report["results"], report["backend"]), evidence))
    print_json(report) if as_json else print_report(report)
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the recording (.npz).")],
    backend: BackendOption = None,
    operator: OperatorOption = None,
    dtype: DtypeOption = None,
    small: SmallOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write inputs' digests and outputs of this machine to one file, for `replay` on another."""
    from glm5_port.testing import record as recording
    from glm5_port.testing.parity import implementations_on

    chip = _chip(backend)
    with _cases("parity record") as advance:
        results = recording.record(
            file, implementations_on(chip, operator), backend=chip, small=small, dtypes=_dtypes(dtype), progress=advance
        )
    report = _report(chip, [result.as_dict() for result in results])
    if as_json:
        print_json({"file": str(file), **report})
    else:
        print_report(report)
        print_text(f"recorded {report['passed']} outputs in {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if report["failed"]:
        raise typer.Exit(1)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recording made by `glm5-port parity record`.")],
    backend: BackendOption = None,
    operator: OperatorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a recording and this machine against the same gold, and report their direct difference."""
    from glm5_port.testing import record as recording

    chip = _chip(backend)
    with _cases("parity replay") as advance:
        replays = recording.replay(file, backend=chip, operators=_known(operator), progress=advance)
    report = replay_report(chip, replays)
    if as_json:
        print_json(report)
    else:
        rows = [
            [r["operator"], r["recorded"], r["here"], str(r["cases"]), str(r["equal"]), f"{r['largest_difference']:.2g}"]
            for r in report["pairs"]
        ]
        print_table(("operator", "recorded", "here", "cases", "equal bits", "largest difference / RMS"), rows)
        for line in report["failures"]:
            print_text(f"FAILED  {line}")
        print_text(f"{report['cases']} recorded cases, {len(report['failures'])} failed")
    if report["failures"]:
        raise typer.Exit(1)


@app.command()
def bisect(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint; default: a small random GLM-5.2.")
    ] = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "float32",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the random prompt.")] = 40,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Decode steps.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Name the first operator that moves a model's output: each call of a reference run, replayed on the backend."""
    from glm5_port.testing.bisect import bisect_report

    chip = _chip(backend)
    with _cases("parity bisect") as advance:
        report = bisect_report(
            checkpoint, chip, (_dtypes(dtype) or [None])[0], prompt_tokens=prompt_tokens, new_tokens=new_tokens, progress=advance
        )
    if as_json:
        print_json({"backend": chip, **report.as_dict()})
    else:
        rows = [[name, f"{share:.0%}", str(report.operators.get(name, 0))] for name, share in report.worst_share.items()]
        print_table(
            ("operator", "of budget", "calls over budget"),
            rows,
            title=f"bisect on {chip}: {report.calls} operator calls replayed",
        )
        print_text("")
        if (first := report.first) is None:
            print_text("every call is within its budget: no operator moves the output")
        else:
            print_text(f"FIRST  call {first.call}: {first.operator} by {first.implementation}")
            for problem in first.problems:
                print_text(f"       {problem}")
    if report.first is not None:
        raise typer.Exit(1)


def run_parity(
    backend: str | None = None,
    operators: list[str] | None = None,
    *,
    small: bool = False,
    dtype: str | None = None,
    sweep: range | None = None,
) -> dict[str, Any]:
    """Parity on one chip, with a progress bar. `sweep`: numbers of random cases instead of the named ones.

    Returns:
        "backend", counts by status, "summary" (one row per implementation), "matrix", and "results" as plain data.
    """
    from glm5_port.testing.cases import WIDTH
    from glm5_port.testing.parity import run_chip

    chip = _chip(backend)
    with _cases("parity") as advance:
        results = run_chip(
            chip,
            operators,
            dtypes=_dtypes(dtype),
            without_tags=WIDTH if small else frozenset(),
            sweep=sweep,
            progress=advance,
        )
    return _report(chip, [result.as_dict() for result in results])


def print_report(report: dict[str, Any]) -> None:
    """Writes the tables of `run_parity`."""
    from glm5_port.testing.report import matrix_lines

    rows = [
        [
            r["operator"],
            r["implementation"],
            *(str(r[s]) for s in ("passed", "failed", "declined")),
            f"{r['worst_budget_share']:.0%}",
            r["worst_case"] or "",
        ]
        for r in report["summary"]
    ]
    print_table(
        ("operator", "implementation", "passed", "failed", "declined", "of budget", "worst case"),
        rows,
        title=f"parity on {report['backend']}",
    )
    for result in report["results"]:
        if result["status"] == "failed":
            print_text(f"FAILED  {result['operator']} {result['implementation']} [{result['case']}, {result['dtype']}]")
            for problem in result["problems"]:
                print_text(f"        {problem}")
    print_text("\noperator x backend")
    print_text("\n".join(matrix_lines(report["matrix"])))
    print_text(
        f"\n{report['passed']} passed, {report['failed']} failed, "
        f"{report['declined']} declined, {report['unavailable']} unavailable"
    )


def replay_report(chip: str, replays: list[Any]) -> dict[str, Any]:
    """A replay as plain data: one row per pair of implementations, and every failure as a line."""
    pairs: dict[tuple[str, str, str], dict[str, Any]] = {}
    failures: dict[str, None] = {}
    for replayed in replays:
        recorded = replayed.recorded
        failures |= {f"recorded: {recorded}": None} if recorded.status == "failed" else {}
        for mine in replayed.here:
            failures |= {f"here: {mine}": None} if mine.status == "failed" else {}
        for name, difference in replayed.difference.items():
            key = (recorded.operator, f"{recorded.implementation} on {recorded.backend}", f"{name} on {chip}")
            pair = pairs.setdefault(
                key, {"operator": key[0], "recorded": key[1], "here": key[2], "cases": 0, "equal": 0, "largest_difference": 0.0}
            )
            pair["cases"] += 1
            pair["equal"] += difference == 0.0
            pair["largest_difference"] = max(pair["largest_difference"], difference)
    return {"backend": chip, "cases": len(replays), "pairs": list(pairs.values()), "failures": list(failures)}


@contextmanager
def _cases(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar that learns from the first report how many cases there are."""
    advance: Advance | None = None
    with ExitStack() as stack:

        def report(what: str, done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = stack.enter_context(progress(description, total))
            else:
                advance(note=what)

        yield report
        if advance is not None:
            advance()


def _report(chip: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    from glm5_port.testing.report import matrix, summary

    counts = {status: sum(r["status"] == status for r in results) for status in ("passed", "failed", "declined", "unavailable")}
    return {"backend": chip, **counts, "summary": summary(results), "matrix": matrix(results), "results": results}


def _chip(backend: str | None) -> str:
    from glm5_port.requests import resolve_backend

    return resolve_backend(backend).name


def _known(operators: list[str] | None) -> list[str] | None:
    from glm5_port.testing.parity import implementations_on

    if operators:
        implementations_on("cpu", operators)  # raises for a name that does not exist
    return operators


def _dtypes(name: str | None) -> list[Any] | None:
    if name is None:
        return None
    from glm5_port.errors import did_you_mean
    from glm5_port.testing.cases import DTYPES

    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in by_name:
        raise InputError(f"--dtype {name}: not a working dtype{did_you_mean(name, by_name)}\n  supported: {', '.join(by_name)}")
    return [by_name[name]]
