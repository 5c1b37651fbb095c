"""Evidence: what parity measured on a device, as a small JSON file that is committed under evidence/.

A row is stale when the source that it was measured on has changed: the module of the implementation, the declaration of the
operator, or its cases.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from glm5_port.dispatch import Operator
from glm5_port.errors import ParityError
from glm5_port.registry import BACKENDS, OPERATORS, Implementation
from glm5_port.requests import probe
from glm5_port.testing.report import summary

FORMAT = 1
STAND_IN = "stand-in runtime"
"""How a device calls itself that is no hardware (tests/npu_runtime): what ran there is no evidence."""


def source_hash(implementation: Implementation) -> str:
    """Digest of the module that an implementation stands in, of the kernels beside it (a package `kernels`, if there is one), of
    its operator's declaration and of its cases."""
    operator = implementation.operator
    modules = (implementation.function.__module__, *_contract_modules(operator))
    sources = [_source(module) for module in dict.fromkeys(modules)]
    return hashlib.sha256(b"\0".join(sources + _kernel_sources(implementation.function.__module__))).hexdigest()[:16]


def _kernel_sources(module: str) -> list[bytes]:
    """The text of the kernels of a backend, without importing them."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return [path.read_bytes() for path in sorted((Path(file).parent / "kernels").glob("*.py"))] if file else []


def contract_hash(operator: Operator) -> str:
    """Digest of an operator's declaration and cases: two records are comparable only if theirs agree."""
    return hashlib.sha256(b"\0".join(_source(module) for module in _contract_modules(operator))).hexdigest()[:16]


def _contract_modules(operator: Operator) -> tuple[str, str]:
    module = operator.__module__
    return module, module.replace(".operators.", ".operators.cases.")


def _source(module: str) -> bytes:
    """The text of a module, loaded or not: a command that reads records has no cases loaded, and must see the same digest."""
    loaded = sys.modules.get(module)
    try:
        spec = None if loaded else importlib.util.find_spec(module)
    except ModuleNotFoundError:  # an operator of somebody else's package that keeps no cases beside it
        spec = None
    file = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
    return Path(file).read_bytes() if file and Path(file).is_file() else module.encode()


def device_description(backend: str) -> dict[str, str]:
    """What a record says about the machine that made it: chip, versions, platform; no host name, no path."""
    from glm5_port import __version__

    return {
        "backend": backend,
        "glm5_port": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: str(value) for name, value in probe(backend).details.items()},
    }


def evidence(results: Iterable[Mapping[str, Any]], backend: str) -> dict[str, Any]:
    """The results of one chip (`ParityResult.as_dict`) as a record to commit.

    Returns:
        "device": what ran it; "date" (UTC); "rows": per operator and implementation the counts by status, the worst
        errors and the source digest they hold for.
    """
    mine = [r for r in results if r["backend"] == backend]
    rows = []
    for row in summary(mine):
        implementation = OPERATORS[row["operator"]].implementations[row["implementation"]]
        errors: dict[str, float] = {}
        for result in mine:
            if (result["operator"], result["implementation"]) == (row["operator"], row["implementation"]):
                for name, value in result["errors"].items():
                    errors[name] = max(errors.get(name, 0.0), value)
        rows.append(
            {**{k: v for k, v in row.items() if k != "backend"}, "worst_errors": errors, "source": source_hash(implementation)}
        )
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"format": FORMAT, "kind": "parity", "device": device_description(backend), "date": date, "rows": rows}


def write_evidence(record: Mapping[str, Any], directory: str | Path) -> Path:
    """Writes a record under a name made of its chip, so that a new run of the same chip replaces the old one.

    Raises:
        ParityError: no hardware ran it.
    """
    device = record["device"]
    if any(STAND_IN in str(value) for value in device.values()):
        raise ParityError(f"this ran on a {STAND_IN} ({device.get('device', device['backend'])}): evidence is of hardware only")
    name = device.get("chip") or device.get("device") or device["platform"]
    chip = re.sub(r"[^a-z0-9]+", "-", f"{device['backend']} {name}".lower()).strip("-")
    path = Path(directory) / f"parity-{chip}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, record)
    return path


def write_whole(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record in place of an old one; who is cut off while writing leaves the old one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_evidence(directory: str | Path) -> list[dict[str, Any]]:
    """Every parity record of a directory, by name.

    Raises:
        ParityError: a file is not a parity record, or of another format.
    """
    records = []
    for path in sorted(Path(directory).glob("parity-*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ParityError(f"{path}: not JSON ({error}); run `glm5-port parity --evidence` again") from error
        if not isinstance(record, dict) or record.get("kind") != "parity" or record.get("format") != FORMAT:
            raise ParityError(f"{path}: not a parity record of format {FORMAT}; run `glm5-port parity --evidence` again")
        records.append(record)
    return records


def stale_rows(record: Mapping[str, Any]) -> list[str]:
    """The rows of a record that no longer speak for the source as it stands, each with the reason."""
    if record["device"]["backend"] not in BACKENDS:
        return [f"backend {record['device']['backend']} is not registered here"]
    stale = []
    for row in record["rows"]:
        operator = OPERATORS.get(row["operator"])
        implementation = operator.implementations.get(row["implementation"]) if operator else None
        if implementation is None:
            stale.append(f"{row['operator']} {row['implementation']}: does not exist any more")
        elif source_hash(implementation) != row["source"]:
            stale.append(
                f"{row['operator']} {row['implementation']}: its source, declaration or cases changed since {record['date']}"
            )
    return stale
