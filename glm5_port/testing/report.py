"""The operator x backend matrix that closes every parity run, as data and as text. Results are plain data
(`ParityResult.as_dict`), so that they may come from other processes or machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glm5_port.plugins import load_plugins
from glm5_port.registry import BACKENDS, OPERATORS, PORTABLE
from glm5_port.requests import probe

Key = tuple[str, str, str]
"""Operator, chip, provider of the implementation."""
NO_TEST = "NO TEST"
NOTHING = "-"
"""Cell of a chip that has no implementation of its own for an operator: it runs the portable one."""


def matrix(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What every implementation of every operator came to, one column per chip and one for the portable implementations.

    Returns:
        "columns": names, among them what stood in for a chip (an interpreter); "rows": operator -> column -> text;
        "not_tested": chip -> why nothing ran on it here.
    """
    load_plugins()
    seen: dict[Key, Counter[str]] = {}
    why: dict[Key, str] = {}
    ran: set[str] = set()
    for result in results:
        provider = str(result["implementation"]).split("/")[0]
        key = (str(result["operator"]), str(result["backend"]), provider)
        seen.setdefault(key, Counter())[str(result["status"])] += 1
        if result["status"] in ("declined", "unavailable") and result["problems"]:
            why.setdefault(key, str(result["problems"][0]))
        if result["status"] in ("passed", "failed"):
            ran.add(str(result["backend"]))
    columns = [*BACKENDS, *sorted({chip for _, chip, _ in seen} - set(BACKENDS)), PORTABLE]
    rows = {name: {column: _cell(name, column, seen, why) for column in columns} for name in OPERATORS}
    not_tested = {
        name: probe(name).missing or "usable here, but not asked for in this run" for name in BACKENDS if name not in ran
    }
    return {"columns": columns, "rows": rows, "not_tested": not_tested}


def _cell(operator: str, column: str, seen: Mapping[Key, Counter[str]], why: Mapping[Key, str]) -> str:
    own = any(i.backend == column for i in OPERATORS[operator].implementations.values())
    if column == PORTABLE:
        keys = [key for key in seen if key[0] == operator and key[2] == PORTABLE]
    elif column not in BACKENDS:
        own, keys = True, [key for key in seen if key[:2] == (operator, column)]
    else:
        keys = [key for key in [(operator, column, column if own else PORTABLE)] if key in seen]
    if not keys:
        return NO_TEST if (own and column in BACKENDS) or column == PORTABLE else NOTHING
    counts = sum((seen[key] for key in keys), Counter())
    parts = [f"{counts['failed']} FAILED"] if counts["failed"] else []
    parts += [f"{counts['passed']} passed" + ("" if own else f" by {PORTABLE}")] if counts["passed"] else []
    skipped = counts["declined"] + counts["unavailable"]
    reason = next((why[key] for key in keys if key in why), "no reason given")
    parts += [f"{skipped} skipped ({reason})"] if skipped else []
    return ", ".join(parts)


def matrix_lines(table: Mapping[str, Any]) -> list[str]:
    """The matrix as text: a column where something was registered, one footnote per long reason, then what did not run."""
    notes: dict[str, int] = {}
    used = [c for c in table["columns"] if any(row[c] != NOTHING for row in table["rows"].values())]
    empty = [c for c in table["columns"] if c not in used]

    def short(cell: str) -> str:
        before, bracket, reason = cell.partition(" (")
        return f"{before} [{notes.setdefault(reason.removesuffix(')'), len(notes) + 1)}]" if bracket else cell

    body = [[name, *(short(row[c]) for c in used)] for name, row in table["rows"].items()]
    lines = _aligned([["operator", *used], *body])
    lines += [f"  [{number}] {reason}" for reason, number in notes.items()]
    if empty:
        lines.append(f"  no implementation of their own, so the portable ones run: {', '.join(empty)}")
    return lines + [f"NOT TESTED HERE: {name} ({reason})" for name, reason in table["not_tested"].items()]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per operator, implementation and chip: counts by status, and the largest share of the budget used."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        key = (str(result["operator"]), str(result["implementation"]), str(result["backend"]))
        row = rows.setdefault(
            key,
            {"operator": key[0], "implementation": key[1], "backend": key[2]}
            | {"passed": 0, "failed": 0, "declined": 0, "unavailable": 0, "worst_budget_share": 0.0, "worst_case": None},
        )
        row[str(result["status"])] += 1
        share = result["errors"].get("budget_share", 0.0)
        if share > row["worst_budget_share"]:
            row["worst_budget_share"], row["worst_case"] = share, f"{result['case']}, {result['dtype']}"
    return list(rows.values())
