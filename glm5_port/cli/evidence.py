"""`glm5-port evidence`: what has been proven on which device, from the committed records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text

NEVER = "portable, never run on them"


def evidence(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the records are.")] = Path("evidence"),
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Show what parity has proven on which device, and which records are stale."""
    from glm5_port.errors import InputError
    from glm5_port.testing.evidence import read_evidence, stale_rows

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder\n  Records are written by: glm5-port parity --evidence {folder}")
    records = read_evidence(folder)
    stale = [reason for record in records for reason in stale_rows(record)]
    columns, rows = table(records)
    if as_json:
        print_json({"records": records, "stale": stale, "table": [dict(zip(columns, row, strict=True)) for row in rows]})
        return
    if markdown:
        print_text(markdown_table(columns, rows, records))
        return
    print_table(columns, rows)
    for record in records:
        print_text(f"{record['date']}  {', '.join(f'{name} {value}' for name, value in record['device'].items())}")
    for reason in stale:
        print_text(f"STALE  {reason}")


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Operator by backend: what ran there and what came of it. Chips without record and kernels share the last column."""
    from glm5_port.registry import OPERATORS
    from glm5_port.requests import search_order

    proven = {record["device"]["backend"]: record for record in records}
    with_kernels = {i.backend for operator in OPERATORS.values() for i in operator.implementations.values()}
    names = [backend.name for backend in search_order()]
    columns = [name for name in names if name in proven or name in with_kernels]
    others = [name for name in names if name not in columns]
    rows = [
        [name, *(_cell(name, backend, proven.get(backend)) for backend in columns), *([NEVER] if others else [])]
        for name in OPERATORS
    ]
    return ["operator", *columns, *([", ".join(others)] if others else [])], rows


def _cell(operator: str, backend: str, record: dict[str, Any] | None) -> str:
    from glm5_port.registry import OPERATORS

    if record is not None:
        shown = [
            f"{row['implementation']}: " + (f"{row['failed']} FAILED" if row["failed"] else f"{row['passed']} cases passed")
            for row in record["rows"]
            if row["operator"] == operator and (row["passed"] or row["failed"])
        ]
        if shown:
            return "; ".join(shown)
    own = [i.id for i in OPERATORS[operator].implementations.values() if i.backend == backend]
    return f"{', '.join(own)}: never run on hardware" if own else "portable, never run on it"


def markdown_table(columns: list[str], rows: list[list[str]], records: list[dict[str, Any]]) -> str:
    """The table and, below it, the machines that the records come from."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" for row in rows]
    lines.append("")
    for record in records:
        device = ", ".join(f"{name} {value}" for name, value in record["device"].items() if name not in ("backend", "glm5_port"))
        lines.append(f"`{record['device']['backend']}`: measured {record['date']} on {device}.")
    return "\n".join(lines)
