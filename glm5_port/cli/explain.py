"""`glm5-port explain`: which implementation would run, and why not the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from glm5_port.cli.output import print_json, print_table, print_text
from glm5_port.errors import InputError, SelectionError, did_you_mean

if TYPE_CHECKING:
    from glm5_port.dispatch import Operator
    from glm5_port.selection import Selection

RELEASE = "GLM-5.2"
"""Whose facts are assumed where neither a checkpoint nor a fact is given."""

DTYPES = ("bfloat16", "float16", "float32", "float64")


def explain(
    operator: Annotated[
        str | None, typer.Argument(help="An operator's name; without it, a table of all.", show_default=False)
    ] = None,
    as_backend: Annotated[
        str | None, typer.Option("--as", metavar="BACKEND", help="Answer as if this backend were usable here.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    needs_grad: Annotated[
        bool, typer.Option("--needs-grad", help="Ask for an implementation that gradients flow through.")
    ] = False,
    fact: Annotated[
        list[str] | None,
        typer.Option("--fact", metavar="NAME=VALUE", help=f"A static fact; that of {RELEASE} otherwise. May be repeated."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="CHECKPOINT", help="Take the facts of this model (only config.json is read)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Show which implementation would run, and why not the others. Exits with 1 when nothing fits."""
    facts = {"dtype": _parse_dtype(dtype), "needs_grad": needs_grad}
    assumed = assumed_facts(checkpoint)
    given = dict(_parse_fact(text) for text in fact or [])
    if operator is None:
        records = _decide_all(as_backend, facts, assumed, given)
        if as_json:
            print_json([record.as_dict() | {"unproven": _unproven([record])} for record in records])
        else:
            _print_overview(records)
            _warn(records)
    else:
        record = _decide(_find(operator), as_backend, facts, assumed, given)
        records = [record]
        promises = _promises(record)
        if as_json:
            print_json(record.as_dict() | {"promises": promises, "unproven": _unproven([record])})
        else:
            kept = [f"{name}: {', '.join(words) or 'none'}" for name, words in promises.items()]
            print_text(f"{record}\n  facts: {_facts_line(record)}\n  promises  {'; '.join(kept)}")
            _warn(records)
    if any(record.chosen is None for record in records):
        raise typer.Exit(1)


def assumed_facts(checkpoint: Path | None) -> dict[str, dict[str, Any]]:
    """Operator -> its own facts, as they are in a checkpoint's config, or (None) in the released model."""
    from glm5_port.config import Glm5Config, released
    from glm5_port.model.facts import operator_facts

    config = released(RELEASE) if checkpoint is None else Glm5Config.from_json(checkpoint)
    return operator_facts(config, cache_format="plain", page_size=64)


def _decide_all(
    as_backend: str | None, facts: dict[str, Any], assumed: dict[str, dict[str, Any]], given: dict[str, str]
) -> list[Selection]:
    """The record of every operator; each takes from the given facts those that it has."""
    from glm5_port.registry import COMMON_FACTS, OPERATORS

    known = {*COMMON_FACTS, *(name for operator in OPERATORS.values() for name in operator.facts)}
    for name in given:
        if name not in known:
            raise InputError(
                f"--fact {name}: no operator has this fact{did_you_mean(name, known)} (known: {', '.join(sorted(known))})"
            )
    mine = {o: {n: v for n, v in given.items() if n in COMMON_FACTS or n in o.facts} for o in OPERATORS.values()}
    return [_decide(operator, as_backend, facts, assumed, mine[operator]) for operator in OPERATORS.values()]


def _decide(
    operator: Operator,
    as_backend: str | None,
    facts: dict[str, Any],
    assumed: dict[str, dict[str, Any]],
    given: dict[str, str],
) -> Selection:
    from glm5_port.selection import decide

    complete = {"device_type": _device_type(), **facts, **assumed[operator.name]}
    complete |= {name: _parse_value(name, text, complete.get(name)) for name, text in given.items()}
    return decide(operator, operator.complete_facts(complete), as_backend=as_backend)


def _promises(record: Selection) -> dict[str, list[str]]:
    """What the chosen implementation promises (`glm5_port.registry.PROMISES`), and those that could run in its place."""
    from glm5_port.registry import OPERATORS, PORTABLE

    if record.chosen is None:
        return {}
    implementations = OPERATORS[record.operator].implementations
    names = [c.id for c in record.candidates if implementations[c.id].backend in (record.chosen.backend, PORTABLE)]
    return {name: sorted(implementations[name].promises) for name in names}


def _unproven(records: list[Selection]) -> list[str]:
    """What nobody knows yet about the backends whose own implementations were chosen."""
    from glm5_port.registry import BACKENDS

    chosen = dict.fromkeys(record.chosen.backend for record in records if record.chosen is not None)
    return [f"{name}: {BACKENDS[name].unproven}" for name in chosen if name in BACKENDS and BACKENDS[name].unproven]


def _warn(records: list[Selection]) -> None:
    for line in _unproven(records):
        print_text(f"  never run on hardware  {line}")


def _find(name: str) -> Operator:
    from glm5_port.registry import OPERATORS

    if name not in OPERATORS:
        raise InputError(f"no such operator: {name}{did_you_mean(name, OPERATORS)}\n  known: {', '.join(OPERATORS)}")
    return OPERATORS[name]


def _device_type() -> str:
    """Where tensors would be: on the requested backend, also when it is not usable (the record then says why)."""
    from glm5_port.registry import BACKENDS
    from glm5_port.requests import request_for, resolve_backend

    try:
        return resolve_backend().device_type
    except SelectionError:
        return BACKENDS[request_for(None, None).backends[0]].device_type


def _facts_line(record: Selection) -> str:
    return ", ".join(f"{name}={value}" for name, value in record.as_dict()["facts"].items() if value is not None)


def _print_overview(records: list[Selection]) -> None:
    rows = []
    for record in records:
        others = [f"{c.id}: {'; '.join(c.reasons)}" for c in record.candidates if not c.chosen]
        rows.append((record.operator, record.chosen.id if record.chosen else "NOTHING FITS", "\n".join(others)))
    print_table(("operator", "runs", "others, and why not"), rows)
    print_text(f"{records[0].request}" + (f"; as if {records[0].hypothetical} were here" if records[0].hypothetical else ""))


# -- reading facts -----------------------------------------------------------------------------------------------------


def _parse_dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise InputError(f"dtype {text}: no such working dtype{did_you_mean(text, DTYPES)}\n  supported: {', '.join(DTYPES)}")
    return getattr(torch, text)


def _parse_fact(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise InputError(f"--fact {text}: a fact is given as NAME=VALUE, for example --fact page_size=128")
    return name.strip(), value.strip()


def _parse_value(name: str, text: str, like: Any) -> Any:
    """Reads `text` as the kind of value that `like` is; as a whole number or a word when nothing is known of it."""
    if text.lower() == "none":
        return None
    if isinstance(like, torch.dtype):
        return _parse_dtype(text)
    try:
        if isinstance(like, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(like, int):
            return int(text)
        if isinstance(like, tuple):
            return tuple(int(part) for part in text.split(","))
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", tuple: "whole numbers separated by commas"}[type(like)]
        raise InputError(f"--fact {name}={text}: expected {kind}, such as {like}") from None
    return int(text) if like is None and text.isdigit() else text
