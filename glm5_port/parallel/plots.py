"""Pictures of an answer: where the time goes, and which plan leads at which link bandwidth. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm5_port.errors import InputError
from glm5_port.parallel.planner import Answer, Shortlist, levels_in_use
from glm5_port.parallel.quantities import show_seconds
from glm5_port.parallel.search import Candidate

SUFFIXES = (".png", ".svg")
STEPS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64)
"""Times the bandwidth as it is."""
CURVES = 4


def draw(answer: Answer, path: Path) -> None:
    """Writes one picture: breakdowns of prompt and decode step, and a flip curve for every level of links.

    Raises:
        InputError: matplotlib is missing, or the file is neither .png nor .svg.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: expected a file ending in {' or '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib, which is not installed: pip install 'glm5_port[plots]'") from error
    levels = levels_in_use(answer.question)
    figure = Figure(figsize=(12, 4 + 4 * len(levels)), layout="constrained")
    axes = figure.subplots(1 + len(levels), 1)
    panes: Sequence[Any] = axes if len(levels) else [axes]
    _breakdown(panes[0], answer)
    for pane, level in zip(panes[1:], levels, strict=True):
        _flip_curve(pane, answer, level)
    figure.suptitle(f"{answer.plan.model}, {answer.question.devices} x {answer.question.topology.chip.title}")
    figure.savefig(path)


def _breakdown(pane: Any, answer: Answer) -> None:
    """Both steps as stacked bars, parts below zero left out."""
    served = answer.best.served
    for place, breakdown in enumerate((served.prefill, served.decode)):
        left = 0.0
        for number, (name, _, cost) in enumerate(breakdown):
            share = max(cost.seconds, 0.0) / breakdown.seconds
            pane.barh(place, share, left=left, color=f"C{number % 10}", edgecolor="white")
            if share > 0.06:
                pane.text(left + share / 2, place, name.replace(" ", "\n"), ha="center", va="center", fontsize=7)
            left += share
    pane.set_yticks([0, 1], [f"prompt, {show_seconds(served.prefill.seconds)}", f"decode, {show_seconds(served.decode.seconds)}"])
    pane.set_xlabel("share of the time")


def curve(answer: Answer, level: int) -> tuple[list[float], dict[str, list[float]]]:
    """Bandwidths of a level, and for each leading plan its output rate there.

    Args:
        answer: of the planner.
        level: place of the level in the topology.
    """
    question = answer.question
    watched: list[Candidate] = list(answer.ranking[:CURVES])
    watched += [
        flip.winner for flip in answer.flips if flip.winner is not None and flip.winner.mesh not in {w.mesh for w in watched}
    ]
    here = question.topology.levels[level].bandwidth
    rates: dict[str, list[float]] = {}
    for candidate in watched:
        role = candidate.roles[-1]
        layout = role.layout
        name = f"{role.replicas} x PP{layout.pipeline} DP{layout.data} TP{layout.tensor} EP{layout.expert}"
        single = Shortlist(question, [candidate], refined=False)
        rates[name if len(candidate.roles) == 1 else f"split, {name}"] = [
            single.best(question.topology.scaled(level, step)).served.output_rate for step in STEPS
        ]
    return [here * step for step in STEPS], rates


def _flip_curve(pane: Any, answer: Answer, level: int) -> None:
    """Output rate over bandwidth, with the points at which the choice changes."""
    bandwidths, rates = curve(answer, level)
    for name, values in rates.items():
        pane.plot([each / 1e9 for each in bandwidths], values, label=name)
    links = answer.question.topology.levels[level]
    pane.axvline(links.bandwidth / 1e9, color="black", linestyle=":", label="as it is")
    for flip in answer.flips:
        if flip.level == links.name and flip.at is not None:
            pane.axvline(flip.at / 1e9, color="red", linestyle="--")
    pane.set_xscale("log")
    pane.set_xlabel(f"{links.name} links, GB/s a device (red: the choice changes)")
    pane.set_ylabel("output tokens/s, estimated")
    pane.legend(fontsize=7)
