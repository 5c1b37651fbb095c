"""How outputs are held against the float64 gold: anomalies first, then error against the reference's own error.

error(implementation) <= factor * error(reference in the working dtype) + floor + summation, both for the relative
root-mean-square error and for the largest absolute error over the gold's RMS. The budget is written at the operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glm5_port.registry import Budget
from glm5_port.testing.cases import Case


@dataclass(slots=True)
class Outcome:
    """Everything a comparison may look at. Tensors are on the CPU.

    Attributes:
        arguments: the call's arguments in the working dtype, as they were before the call.
        gold_arguments: the same, floating tensors raised to float64.
        outputs: what the implementation returned and wrote: flat list, mutated arguments last.
        reference: the same from the reference in the working dtype.
        gold: the same from the reference in float64.
        errors: filled by the comparison: measure -> value, for reports.
        tie_rule: whether equal scores must be taken by the rule; False for an implementation that does not promise it.
    """

    case: Case
    dtype: torch.dtype
    budget: Budget
    arguments: Mapping[str, Any]
    gold_arguments: Mapping[str, Any]
    outputs: Sequence[Tensor]
    reference: Sequence[Tensor]
    gold: Sequence[Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    tie_rule: bool = True


def compare_outputs(outcome: Outcome) -> list[str]:
    """The default comparison of every output: floating ones within the budget, others equal. Returns what is wrong."""
    problems: list[str] = []
    if len(outcome.outputs) != len(outcome.gold):
        return [f"{len(outcome.outputs)} outputs instead of {len(outcome.gold)}"]
    for place, (output, reference, gold) in enumerate(zip(outcome.outputs, outcome.reference, outcome.gold, strict=True)):
        name = f"output {place}"
        if problem := check_form(output, reference):
            problems.append(f"{name}: {problem}")
        elif not output.is_floating_point() or output.element_size() == 1:  # quantised values are bits, not numbers
            problems += [f"{name}: {p}" for p in check_equal(output, reference)]
        elif outcome.case.exact:
            problems += [f"{name}: {p}" for p in check_equal(output, gold.to(output.dtype))]
        else:
            problems += [f"{name}: {p}" for p in check_within_budget(outcome, output, reference, gold)]
    return problems


def check_form(output: Tensor, reference: Tensor) -> str | None:
    """Shape and dtype must be the reference's."""
    if output.shape != reference.shape or output.dtype != reference.dtype:
        return f"{tuple(output.shape)} {output.dtype} instead of {tuple(reference.shape)} {reference.dtype}"
    return None


def check_equal(output: Tensor, expected: Tensor) -> list[str]:
    """Exact equality (NaN equals NaN)."""
    if output.is_floating_point() and output.element_size() == 1:  # torch does not compare float8
        output, expected = output.float(), expected.float()
    wrong = (output != expected) & ~((output != output) & (expected != expected))
    if not wrong.any():
        return []
    place = tuple(int(i) for i in wrong.nonzero()[0])
    return [
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, first at {place}: "
        f"{output[place].item()} instead of {expected[place].item()}"
    ]


def allowed_error(budget: Budget, reference_error: float, dtype: torch.dtype) -> float:
    """What a budget allows for outputs of `dtype`, given the reference's own error."""
    rounding, accumulation = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return budget.factor * reference_error + budget.floor * rounding + budget.summation * accumulation


def check_within_budget(outcome: Outcome, output: Tensor, reference: Tensor, gold: Tensor) -> list[str]:
    """Non-finite masks first, then both error measures against the budget."""
    if problem := _anomalies(output, reference):
        return [problem]
    finite = torch.isfinite(gold) & torch.isfinite(reference.double())
    if not finite.any():
        return []
    mine, theirs = _errors(output, gold, finite), _errors(reference, gold, finite)
    problems = []
    for measure, value in mine.items():
        allowed = allowed_error(outcome.budget, theirs[measure], output.dtype)
        outcome.errors[measure] = max(outcome.errors.get(measure, 0.0), value)
        share = value / allowed
        outcome.errors["budget_share"] = max(outcome.errors.get("budget_share", 0.0), share)
        if not value <= allowed:
            problems.append(
                f"{measure} error {value:.3g} is over its budget {allowed:.3g} "
                f"({outcome.budget.factor:g} x the reference's {theirs[measure]:.3g}, "
                f"and {allowed_error(outcome.budget, 0, output.dtype):.2g})"
            )
    return problems


def _anomalies(output: Tensor, reference: Tensor) -> str | None:
    for name, mask in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        wrong = mask(output) != mask(reference)
        if wrong.any():
            place = tuple(int(i) for i in wrong.nonzero()[0])
            values = f"{output[place].item()} against {reference[place].item()}"
            return f"{name} in other places than the reference, first at {place}: {values}"
    return None


def _errors(values: Tensor, gold: Tensor, finite: Tensor) -> dict[str, float]:
    difference = torch.where(finite, values.double() - gold.double(), 0.0)
    scale = torch.where(finite, gold.double(), 0.0).square().mean().sqrt().item() or 1.0
    return {
        "rms": difference.square().mean().sqrt().item() / scale,
        "max": difference.abs().max().item() / scale,
    }
