"""The last files of an export, written when all shards are there: copies, report, index, config.json, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm5_port.quant.files import copy_whole, write_whole
from glm5_port.quant.manifest import MANIFEST, manifest_text
from glm5_port.quant.plan import Plan
from glm5_port.quant.report import REPORT_JSON, REPORT_TEXT, make_report, report_text
from glm5_port.quant.source_files import CONFIG, copied_files
from glm5_port.quant.statistics import Statistics


def write_last_files(
    plan: Plan, path: Path, source: Mapping[str, Any], shards: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Writes them in an order in which an unfinished export never looks like a finished one: config.json and the manifest last.

    Args:
        plan: of the export.
        path: where.
        source: identity of the source.
        shards: shard -> what the journal recorded about it.

    Returns:
        The report; None if nothing was quantised.
    """
    recorded = {name: record for entry in shards.values() for name, record in entry["tensors"].items()}
    texts = plan.format.container.texts(plan.shards, plan.facts)
    texts |= {name: text.encode() for name, text in {**plan.files(), CONFIG: plan.config_text}.items()}
    report = None
    if plan.quantized:
        report = make_report(plan, {t.name: Statistics(**recorded[t.name]["statistics"]) for t in plan.quantized})
        reports = {REPORT_JSON: json.dumps(report, indent=2) + "\n", REPORT_TEXT: report_text(report)}
        texts = {name: text.encode() for name, text in reports.items()} | texts
    files = {shard.file: {"bytes": shard.bytes, "sha256": shards[shard.file]["sha256"]} for shard in plan.shards}
    for file in copied_files(plan):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": copy_whole(file, path / file.name)}
    for name, data in texts.items():
        files[name] = {"bytes": len(data), "sha256": write_whole(path / name, data)}
    write_whole(path / MANIFEST, manifest_text(plan, source, files, shards).encode())
    return report
