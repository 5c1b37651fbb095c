"""int4_report.json and int4_report.txt: what quantising did to each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm5_port.quant.output_files import PlannedTensor
from glm5_port.quant.plan import Plan
from glm5_port.quant.statistics import Statistics, total

REPORT_JSON, REPORT_TEXT = "int4_report.json", "int4_report.txt"
WORST = 10

_COLUMNS = (
    ("mean error", "mean_relative_error", "{:.4%}"),
    ("max error", "max_relative_error", "{:.4%}"),
    ("at limit", "codes_at_limit", "{:.3%}"),
    ("zero groups", "zero_groups", "{:,}"),
    ("tiny groups", "tiny_groups", "{:,}"),
    ("fp16 unsafe", "fp16_unsafe_scales", "{:,}"),
    ("unstable", "unstable_groups", "{:,}"),
)

_LEGEND = """mean error   sum of |w - value| / sum of |w|
max error    largest |w - value| / largest |w| of the same group; groups below 2^-110 are left out
at limit     share of codes of magnitude 7 or 8
zero groups  groups of nothing but zeros (scale 1, codes 0)
tiny groups  groups whose largest |w| is below 2^-110 (scale 1, codes 0)
fp16 unsafe  scales that float16 does not hold exactly: GGUF Q4_0, GPTQ and AWQ store float16
unstable     groups that come out different when their values are quantised again ({checked:,} of {groups:,} were tried)"""


def make_report(plan: Plan, measured: Mapping[str, Statistics]) -> dict[str, Any]:
    """Per layer and in total.

    Args:
        plan: of the export.
        measured: weight -> its statistics.
    """
    layers: dict[int | None, list[PlannedTensor]] = {}
    for tensor in plan.quantized:
        layers.setdefault(tensor.layer, []).append(tensor)
    by_error = sorted(plan.quantized, key=lambda t: (-_mean(measured[t.name]), t.name))
    return {
        "rule": str(plan.options.rule),
        "total": total(measured[tensor.name] for tensor in plan.quantized).summary(),
        "layers": [
            {"layer": layer, "mtp": tensors[0].mtp, "matrices": len(tensors)}
            | total(measured[tensor.name] for tensor in tensors).summary()
            for layer, tensors in layers.items()
        ],
        "worst": [{"name": tensor.name} | measured[tensor.name].summary() for tensor in by_error[:WORST]],
    }


def report_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"INT4, {report['rule']}", ""]
    rows = [["layer", "matrices", *(title for title, _, _ in _COLUMNS)]]
    for entry in report["layers"]:
        name = "none" if entry["layer"] is None else f"{entry['layer']}{' (MTP)' if entry['mtp'] else ''}"
        rows.append([name, f"{entry['matrices']:,}", *_cells(entry)])
    rows.append(["all", f"{sum(entry['matrices'] for entry in report['layers']):,}", *_cells(report["total"])])
    lines += _aligned(rows)
    lines += ["", "largest mean errors"]
    lines += _aligned([["weight", *(title for title, _, _ in _COLUMNS)], *([e["name"], *_cells(e)] for e in report["worst"])])
    summed = report["total"]
    return "\n".join([*lines, "", _LEGEND.format(checked=summed["requantized_groups"], groups=summed["groups"])]) + "\n"


def _mean(statistics: Statistics) -> float:
    return float(statistics.summary()["mean_relative_error"])


def _cells(summary: Mapping[str, Any]) -> list[str]:
    return [shape.format(summary[key]) for _, key, shape in _COLUMNS]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
