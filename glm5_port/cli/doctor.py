"""`glm5-port doctor`: every backend in search order, usable here or exactly what is missing."""

from __future__ import annotations

import platform
from collections import Counter
from typing import Annotated, Any

import typer

from glm5_port.cli.flags import in_force
from glm5_port.cli.output import print_json, print_text


def doctor(
    require: Annotated[
        str | None, typer.Option("--require", metavar="BACKEND", help="Exit with 1 unless this backend is usable here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Show every backend in search order: usable here, or exactly what is missing."""
    report = examine()
    if require is not None:
        _check_known(require, report)
    print_json(report) if as_json else print_text(_render(report))
    if require is not None and not report["backends"][require]["usable"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """What `doctor --json` prints: versions, flags, backends in search order, the choice, and counts of implementations."""
    import torch

    import glm5_port
    from glm5_port.errors import SelectionError
    from glm5_port.registry import OPERATORS, PORTABLE, REFERENCE
    from glm5_port.requests import probe, request_for, resolve_backend, search_order, usable_backends

    backends: dict[str, Any] = {}
    in_order = search_order()  # loads the plugins, so it comes before the count of implementations
    own = Counter(i.backend for operator in OPERATORS.values() for i in _first_of_each_backend(operator))
    for backend in in_order:
        found = probe(backend.name)
        backends[backend.name] = {
            "title": backend.title,
            "usable": found.missing is None,
            "missing": found.missing,
            "device_type": backend.device_type,
            "package": backend.package,
            "collective": backend.collective,
            "origin": backend.origin,
            "unproven": backend.unproven,
            "operators_of_its_own": own[backend.name],
            "details": dict(found.details),
        }
    request = request_for(None, None)
    try:
        chosen, refusal = resolve_backend().name, None
    except SelectionError as error:
        chosen, refusal = None, str(error)
    return {
        "versions": {
            "glm5_port": glm5_port.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "flags": in_force(),
        "request": {"asked": ",".join(request.backends), "source": request.source},
        "auto": usable_backends()[0].name,
        "chosen": chosen,
        "refusal": refusal,
        "operators": {"declared": len(OPERATORS), "portable": own[PORTABLE], "reference": own[REFERENCE]},
        "backends": backends,
    }


def _first_of_each_backend(operator: Any) -> list[Any]:
    """One implementation for each provider, so that variants of one backend count once."""
    return list({i.backend: i for i in operator.implementations.values()}.values())


def _check_known(name: str, report: dict[str, Any]) -> None:
    from glm5_port.errors import InputError, did_you_mean

    known = report["backends"]
    if name not in known:
        raise InputError(f"--require {name}: no such backend{did_you_mean(name, known)}\n  supported: {', '.join(known)}")


def _render(report: dict[str, Any]) -> str:
    declared, portable = report["operators"]["declared"], report["operators"]["portable"]
    lines = ["  ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    lines.append(
        f"backends, in the order in which `auto` tries them ({declared} operators, {portable} with a portable implementation):"
    )
    for name, backend in report["backends"].items():
        lines += _render_backend(name, backend, declared)
    lines.append("")
    shown = [f"{name}={value}" for name, value in report["flags"].items()]
    lines.append(f"flags in force: {', '.join(shown) or 'none (glm5-port flags lists them)'}")
    lines.append(f"auto would choose: {report['auto']}")
    if report["request"]["source"] != "default":
        lines.append(f"{report['request']['source']}={report['request']['asked']} chooses: {report['chosen'] or 'NOTHING'}")
    if report["refusal"]:
        lines.append(report["refusal"])
    return "\n".join(lines)


def _render_backend(name: str, backend: dict[str, Any], declared: int) -> list[str]:
    mark = "usable " if backend["usable"] else "missing"
    plugin = "" if backend["origin"] == "built in" else f"; {backend['origin']}"
    head = (
        f"  {mark}  {name:<10} {backend['title']}  (device {backend['device_type']}, collectives {backend['collective']}{plugin})"
    )
    own = backend["operators_of_its_own"]
    kernels = f"kernels of its own for {own} of {declared} operators" if own else "portable implementations only"
    details = [f"{key} {value}" for key, value in backend["details"].items() if key != "torch"]
    notes = [backend["missing"], "; ".join([kernels, *details]), backend["unproven"]]
    return [head, *(f"{'':11}{note}" for note in notes if note)]
