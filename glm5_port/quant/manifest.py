"""int4_manifest.json: what an export is, from what it was made, the sha256 of every file, and the XXH3 digest of every tensor and
of what it was made from. It names no path, time or machine, so that the same export gives the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import glm5_port
from glm5_port.errors import CheckpointError
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.plan import Plan

MANIFEST = "int4_manifest.json"
SCHEMA = 2

_ROUNDING = {
    "amax7": "scale bf16(amax / 7), code half-even(w / scale) in -7..7, value bf16(code * scale)",
    "signed8": "scale extreme / -8, code half-even(w / scale) clipped to -8..7, value bf16(code * scale)",
    "learned": "scale trained with the weights, code half-even(w / scale) clipped to -7..7, value bf16(code * scale)",
    "mse": "scale of the least squared error among 24, code half-even(w / scale) clipped to -7..7, value bf16(code * scale)",
}


def describe(plan: Plan) -> dict[str, Any]:
    """What decides on the bytes of an export, apart from the source."""
    options = plan.options
    rounding = _ROUNDING[options.rule.name] if plan.rule_known else "not known: codes and scales are those of the source"
    carried = {} if plan.source_format is None else {"codes_from": plan.source_format.name, "rule_known": plan.rule_known}
    return {
        "schema": SCHEMA,
        "tool": f"glm5_port {glm5_port.__version__}",
        "format": options.format,
        "rule": asdict(options.rule) | {"rounding": rounding},
        "mtp": options.mtp if any(tensor.mtp for tensor in plan.tensors) else "none",
        "include": list(options.include),
        "exclude": list(options.exclude),
        "max_shard_bytes": options.max_shard_bytes,
        "expert_matrices": plan.experts(),
    } | carried


def manifest_text(
    plan: Plan, source: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], shards: Mapping[str, Mapping[str, Any]]
) -> str:
    """The manifest.

    Args:
        plan: of the export.
        source: identity of the source's files.
        files: file -> bytes and sha256, of all files but the manifest itself.
        shards: shard -> what the journal recorded about it.
    """
    tensors = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            recorded = shards[shard.file]["tensors"][tensor.name]
            for output in tensor.outputs:
                tensors[output.name] = {
                    "file": shard.file,
                    "dtype": output.dtype,
                    "shape": list(output.shape),
                    "xxh3_128": recorded["outputs"][output.name],
                    "from": tensor.name,
                    "action": tensor.action,
                    "source_xxh3_128": recorded["source"],
                }
    head = describe(plan) | {"source": dict(source), "files": dict(files)}
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()]
    entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    return "{\n" + ",\n".join([*lines, f'"tensors": {{\n{entries}\n}}']) + "\n}\n"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None if it has none.

    Raises:
        CheckpointError: it cannot be read, or is of another schema.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if not (isinstance(content["tensors"], dict) and isinstance(content["files"], dict)):
            raise TypeError("tensors and files must be objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no manifest of an INT4 export: {error!r}") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {schema!r}; this version reads {SCHEMA}")
    return dict(content)


def rule_of(manifest: Mapping[str, Any]) -> Int4Rule:
    """The rule that a manifest records.

    Raises:
        CheckpointError: it records none.
        InputError: a rule, or a version of it, that this library does not compute.
    """
    try:
        given = manifest["rule"]
        return Int4Rule(given["name"], given["group_size"], given["version"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} records no rule: {error!r}") from error
