"""Runs parity: every implementation against the float64 gold of its operator's cases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glm5_port.registry import Implementation, Operator
from glm5_port.testing.cases import Case, Suite, load_suites
from glm5_port.testing.comparison import Outcome, compare_outputs


@dataclass(slots=True)
class ParityResult:
    """One implementation on one case.

    Attributes:
        status: "passed", "failed", "declined" (its own reasons), or "unavailable" (its backend is not usable here).
        problems: what is wrong, or the reasons.
        errors: measured errors, for reports.
    """

    operator: str
    implementation: str
    case: str
    dtype: str
    status: str
    problems: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def to_gold(value: Any) -> Any:
    """Raises floating tensors of 16 bits and more to float64; quantised bytes stay what they are."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else value.clone()
    if isinstance(value, (list, tuple)):
        return [to_gold(v) for v in value]
    return value


def run_outputs(operator: Operator, function: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Tensor]:
    """Calls `function` on a copy of `arguments` and returns its outputs, then the mutated arguments, as a flat list."""
    mine = copy.deepcopy(dict(arguments))
    with torch.no_grad():
        result = function(**mine)
    returned = [] if result is None else list(result) if isinstance(result, (list, tuple)) else [result]
    written: list[Tensor] = []
    for name in operator.mutates:
        written += mine[name] if isinstance(mine[name], list) else [mine[name]]
    return [t.detach().cpu() for t in (*returned, *written)]


def run_case(suite: Suite, implementation: Implementation, case: Case, dtype: torch.dtype, device: str = "cpu") -> ParityResult:
    """Holds one implementation against the gold of one case."""
    operator = suite.operator
    arguments = case.arguments(operator, dtype)
    result = ParityResult(operator.name, implementation.id, case.name, str(dtype).removeprefix("torch."), "passed")
    facts = operator.facts_of(arguments) | {"device_type": torch.device(device).type}
    if reasons := implementation.not_supported(**facts):
        result.status, result.problems = "declined", reasons
        return result
    gold_arguments = {name: to_gold(value) for name, value in arguments.items()}
    outcome = Outcome(
        case=case,
        dtype=dtype,
        budget=operator.budget,
        arguments=arguments,
        gold_arguments=gold_arguments,
        outputs=run_outputs(operator, call_with_prepared(implementation, facts), to_device(arguments, device)),
        reference=run_outputs(operator, operator.reference, arguments),
        gold=run_outputs(operator, operator.reference, gold_arguments),
    )
    result.problems = (suite.compare or compare_outputs)(outcome)
    result.errors = outcome.errors
    if "deterministic" in implementation.promises:
        again = run_outputs(operator, call_with_prepared(implementation, facts), to_device(arguments, device))
        if any(not torch.equal(_bits(a), _bits(b)) for a, b in zip(outcome.outputs, again, strict=True)):
            result.problems.append("promises to be deterministic, and two runs differ")
    result.status = "failed" if result.problems else "passed"
    return result


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() and tensor.dim() else tensor


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(v, device) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(v, device) for v in value]
    return value


def call_with_prepared(implementation: Implementation, facts: Mapping[str, Any]) -> Callable[..., Any]:
    """The implementation's function, taking canonical weights even where it prepares its own layout."""
    if implementation.prepare is None:
        return implementation.function
    operator, prepare = implementation.operator, implementation.prepare

    def call(**arguments: Any) -> Any:
        preparation = prepare(facts)
        weights = {name: arguments.pop(name) for name in operator.weights}
        experts = facts.get("experts")
        for part in range(experts) if experts is not None else [None]:
            preparation.add(part, {n: w if part is None else w[part] for n, w in weights.items()})
        return implementation.function(**arguments, **preparation.finish())

    return call


def run(
    implementations: Iterable[Implementation],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    without_tags: frozenset[str] = frozenset(),
    device: str = "cpu",
) -> list[ParityResult]:
    """Every case of every given implementation."""
    suites = load_suites()
    results = []
    for implementation in implementations:
        suite = suites[implementation.operator.name]
        for case in suite.cases:
            if case.tags & without_tags:
                continue
            for dtype in case.dtypes:
                if dtypes is None or dtype in dtypes:
                    results.append(run_case(suite, implementation, case, dtype, device))
    return results
