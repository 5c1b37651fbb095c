"""Runs parity: every implementation against the float64 gold of its operator's cases.

truth_of(suite, case, dtype)     inputs, the reference in the working dtype, the gold in float64
run_case(suite, implementation, case, dtype)    one implementation on one case, judged
run(implementations)             all cases; never raises for what an implementation does; run_each: as they come
run_chip(backend)                what runs on one chip: its own implementations and the portable ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import InputError, did_you_mean
from glm5_port.plugins import load_plugins
from glm5_port.registry import BACKENDS, OPERATORS, PORTABLE, REFERENCE, Budget, Implementation
from glm5_port.requests import probe
from glm5_port.testing import promises
from glm5_port.testing.calls import (
    bits,
    call_with_prepared,
    check_fake,
    flat,
    observe,
    poison_,
    prepared_arguments,
    run_outputs,
    same_bits,
    strided,
    to_device,
    to_gold,
    written,
)
from glm5_port.testing.cases import WIDTH, Case, Suite, load_suites
from glm5_port.testing.comparison import Outcome, check_within_budget, compare_outputs

PROMISE_CASE = "promise: tie_rule"
"""Name of the row that says whether the promise could be held to at all."""


@dataclass(slots=True)
class ParityResult:
    """One implementation on one case.

    Attributes:
        status: "passed", "failed", "declined" (its own reasons), or "unavailable" (its backend is not usable here).
        problems: what is wrong, or the reasons.
        errors: measured errors, for reports.
        backend: the chip that it ran on.
    """

    operator: str
    implementation: str
    case: str
    dtype: str
    status: str
    problems: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    backend: str = "cpu"

    def __str__(self) -> str:
        return f"{self.operator} {self.implementation} [{self.case}, {self.dtype}] {self.status}: {'; '.join(self.problems)}"

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


@dataclass(slots=True)
class Truth:
    """One case in one dtype: the call, and what the reference makes of it. Everything on the CPU.

    Attributes:
        arguments: in the working dtype; mutated arguments hold poison, so that what is not written shows.
        gold_arguments: floating tensors raised to float64.
        reference: outputs of the reference in the working dtype, then its mutated arguments.
        gold: the same in float64.
    """

    suite: Suite
    case: Case
    dtype: torch.dtype
    arguments: dict[str, Any]
    gold_arguments: dict[str, Any]
    reference: list[Tensor]
    gold: list[Tensor]

    def judge(self, outputs: Sequence[Tensor], *, tie_rule: bool = True) -> tuple[list[str], dict[str, float]]:
        """What is wrong with `outputs`, and the measured errors. `tie_rule` as in `Outcome`."""
        if problems := self._check_untouched(outputs):
            return problems, {}
        outcome = Outcome(
            case=self.case,
            dtype=self.dtype,
            budget=self.suite.operator.budget,
            arguments=self.arguments,
            gold_arguments=self.gold_arguments,
            outputs=outputs,
            reference=self.reference,
            gold=self.gold,
            tie_rule=tie_rule,
        )
        return (self.suite.compare or compare_outputs)(outcome), outcome.errors

    def _check_untouched(self, outputs: Sequence[Tensor]) -> list[str]:
        """Rows that the reference leaves alone in a mutated argument must be left alone, bit for bit. Rows, because a byte or an
        element that was written may hold the poison by chance."""
        before = written(self.suite.operator, self.arguments)
        if len(outputs) != len(self.reference):
            return [f"{len(outputs)} outputs instead of {len(self.reference)}"]
        first = len(outputs) - len(before)
        problems = []
        for place, old in enumerate(before):
            mine, right = outputs[first + place], self.reference[first + place]
            if mine.shape != old.shape or mine.dtype != old.dtype:
                problems.append(f"mutated argument {place} became {tuple(mine.shape)} {mine.dtype}")
            elif old.numel():
                same = (bits(right) == bits(old)).all(-1)
                left_alone = same.all(-1, keepdim=True) if old.dim() > 1 else same
                wrong = left_alone & (bits(mine) != bits(old)).any(-1)
                if wrong.any():
                    where = tuple(int(i) for i in wrong.nonzero()[0])
                    problems.append(
                        f"mutated argument {place}: {int(wrong.sum())} elements written that must be left alone, first at {where}"
                    )
        return problems


def truth_of(suite: Suite, case: Case, dtype: torch.dtype) -> Truth:
    """Makes the inputs of a case and runs the reference on them."""
    operator = suite.operator
    arguments = case.arguments(operator, dtype)
    for tensor in written(operator, arguments):
        poison_(tensor)
    gold_arguments = {name: to_gold(value) for name, value in arguments.items()}
    return Truth(
        suite=suite,
        case=case,
        dtype=dtype,
        arguments=arguments,
        gold_arguments=gold_arguments,
        reference=run_outputs(operator, operator.reference, arguments),
        gold=run_outputs(operator, operator.reference, gold_arguments),
    )


def run_case(
    suite: Suite,
    implementation: Implementation,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    backend: str = "cpu",
    truth: Truth | None = None,
) -> ParityResult:
    """Holds one implementation against the gold of one case. Never raises for what the implementation does."""
    result = ParityResult(suite.operator.name, implementation.id, case.name, _plain(dtype), "passed", backend=backend)
    try:
        truth = truth or truth_of(suite, case, dtype)
    except Exception as error:  # a case that cannot be made is a defect of the suite, told as a failure of this case
        result.status, result.problems = "failed", [f"the case or the reference raised {_text(error)}"]
        return result
    try:
        facts = suite.operator.facts_of(truth.arguments) | {"device_type": torch.device(device).type}
        if reasons := implementation.not_supported(**facts):
            result.status, result.problems = "declined", list(reasons)
            return result
        result.problems, result.errors = _judge(truth, implementation, facts, device)
    except Exception as error:  # the harness reports what an implementation raises, and goes on with the next case
        result.problems = [f"raised {_text(error)}"]
    result.status = "failed" if result.problems else "passed"
    return result


def _judge(
    truth: Truth, implementation: Implementation, facts: Mapping[str, Any], device: str
) -> tuple[list[str], dict[str, float]]:
    suite, operator = truth.suite, truth.suite.operator
    function = call_with_prepared(implementation, facts)
    here = to_device(truth.arguments, device)
    outputs, problems = observe(operator, function, here)
    tie_rule = "tie_rule" in implementation.promises
    wrong, errors = truth.judge(outputs, tie_rule=tie_rule)
    problems += wrong
    if problems:  # the remaining checks only repeat what is wrong already
        return problems, errors
    problems += check_fake(implementation, prepared_arguments(implementation, facts, here), outputs)
    problems += promises.check_promises(suite, implementation, function, truth.arguments, device, outputs)
    if suite.rows and not truth.case.tags & WIDTH:
        gaps = to_device({n: strided(v) if n in suite.rows else v for n, v in truth.arguments.items()}, device)
        problems += [
            f"with non-contiguous {', '.join(suite.rows)}: {p}"
            for p in truth.judge(run_outputs(operator, function, gaps), tie_rule=tie_rule)[0]
        ]
    if implementation.differentiable and truth.dtype == torch.float32 and not truth.case.tags & WIDTH:
        problems += _check_gradients(truth, function, device)
    return problems, errors


def _check_gradients(truth: Truth, function: Callable[..., Any], device: str) -> list[str]:
    """An implementation that calls itself differentiable gives the reference's gradients, within the budget."""
    reference = truth.suite.operator.reference
    if truth.suite.operator.mutates or not all(
        torch.isfinite(t).all() for t in flat([truth.gold_arguments, truth.gold]) if t.is_floating_point()
    ):
        return []
    ours = _gradients(function, to_device(truth.arguments, device))
    right, gold = _gradients(reference, truth.arguments), _gradients(reference, truth.gold_arguments)
    outcome = Outcome(truth.case, truth.dtype, Budget(4.0, 32.0), truth.arguments, truth.gold_arguments, [], [], [])
    problems = []
    for name, expected in gold.items():
        mine, theirs = (found.get(name, torch.zeros_like(expected, dtype=truth.dtype)) for found in (ours, right))  # none = zero
        problems += [f"gradient of {name}: {p}" for p in check_within_budget(outcome, mine, theirs, expected)]
    return problems


def _gradients(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gradients of a fixed weighting of all floating outputs with respect to each floating argument that has one."""
    mine = {
        n: v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    with torch.enable_grad():
        result = function(**mine)
        outputs = [t for t in flat(result) if t.is_floating_point() and t.requires_grad]
        if not outputs:
            return {}
        weighting = (torch.arange(t.numel(), dtype=torch.float64).add(1).sin().reshape(t.shape).to(t) for t in outputs)
        torch.stack([(t * w).sum().double() for t, w in zip(outputs, weighting, strict=True)]).sum().backward()
    return {n: v.grad.cpu() for n, v in mine.items() if isinstance(v, Tensor) and v.grad is not None}


def run(implementations: Iterable[Implementation], **options: Any) -> list[ParityResult]:
    """Every case of every given implementation. `options` as in `run_each`."""
    return list(run_each(implementations, **options))


def run_each(
    implementations: Iterable[Implementation],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    without_tags: frozenset[str] = frozenset(),
    only_tags: frozenset[str] = frozenset(),
    sweep: range | None = None,
    backend: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[ParityResult]:
    """As `run`, one result after the other.

    Args:
        dtypes: working dtypes to run in; None for all that a case names.
        without_tags: cases with one of these tags are left out.
        only_tags: when given, only cases with one of these tags are run.
        sweep: numbers of random cases, which run instead of the named ones.
        backend: the chip to run on, unless an implementation belongs to another one.
        progress: called with (what, done, total) before each case.
    """
    suites = load_suites()
    implementations = list(implementations)
    work = [
        (suites[name], case, dtype)
        for name in dict.fromkeys(i.operator.name for i in implementations)
        if name in suites
        for case in _cases_of(suites[name], sweep)
        if not case.tags & without_tags and (not only_tags or case.tags & only_tags)
        for dtype in case.dtypes
        if dtypes is None or dtype in dtypes
    ]
    results: list[ParityResult] = []
    for done, (suite, case, dtype) in enumerate(work):
        if progress:
            progress(f"{suite.operator.name} {case.name} {_plain(dtype)}", done, len(work))
        found = _run_one(suite, case, dtype, [i for i in implementations if i.operator is suite.operator], backend)
        results += found
        yield from found
    if not only_tags and sweep is None:
        for implementation in implementations:
            if implementation.operator.name in suites:
                yield from _tie_row(suites[implementation.operator.name], implementation, results, backend)


def _cases_of(suite: Suite, sweep: range | None) -> Sequence[Case]:
    if sweep is None:
        return suite.cases
    return [suite.sweep.case(number) for number in sweep] if suite.sweep else []


def _run_one(
    suite: Suite, case: Case, dtype: torch.dtype, implementations: Sequence[Implementation], backend: str
) -> list[ParityResult]:
    """One case through all implementations; the gold is computed once, and only if something can run."""
    results: list[ParityResult] = []
    truth: Truth | None = None
    for implementation in implementations:
        chip = implementation.backend if implementation.backend in BACKENDS else backend
        if (missing := _missing(implementation, chip)) is not None:
            results.append(
                ParityResult(
                    suite.operator.name, implementation.id, case.name, _plain(dtype), "unavailable", [missing], backend=chip
                )
            )
            continue
        if truth is None:
            try:
                truth = truth_of(suite, case, dtype)
            except Exception:  # run_case tries again and reports it
                truth = None
        results.append(run_case(suite, implementation, case, dtype, BACKENDS[chip].device_type, backend=chip, truth=truth))
    return results


def _missing(implementation: Implementation, chip: str) -> str | None:
    if implementation.backend not in (*BACKENDS, PORTABLE, REFERENCE):
        return f"its backend {implementation.backend!r} is not registered"
    return probe(chip).missing


def _tie_row(suite: Suite, implementation: Implementation, results: Sequence[ParityResult], backend: str) -> list[ParityResult]:
    mine = [r for r in results if r.operator == suite.operator.name and r.implementation == implementation.id]
    mine.sort(key=lambda r: r.status != "declined")  # what one dtype declines, another may run
    tried = {r.case: r.status for r in mine}
    if all(status in ("unavailable", "declined") for status in tried.values()):
        return []
    problems = promises.check_tie_cases(suite, implementation, tried)
    return (
        [ParityResult(suite.operator.name, implementation.id, PROMISE_CASE, "", "failed", problems, backend=backend)]
        if problems
        else []
    )


def implementations_on(backend: str, operators: Sequence[str] | None = None) -> list[Implementation]:
    """What can run on a chip, by operator: its own implementations by rank, then the portable ones.

    Raises:
        InputError: an operator or the backend does not exist.
    """
    load_plugins()
    for name in operators or ():
        if name not in OPERATORS:
            raise InputError(f"no such operator: {name}{did_you_mean(name, OPERATORS)}\n  known: {', '.join(OPERATORS)}")
    if backend not in BACKENDS:
        raise InputError(f"no such backend: {backend}{did_you_mean(backend, BACKENDS)}\n  known: {', '.join(BACKENDS)}")
    found = [
        i for name in operators or OPERATORS for i in OPERATORS[name].implementations.values() if i.backend in (backend, PORTABLE)
    ]
    return sorted(found, key=lambda i: (list(OPERATORS).index(i.operator.name), i.portable, i.rank, i.id))


def run_chip(backend: str, operators: Sequence[str] | None = None, **options: Any) -> list[ParityResult]:
    """Parity of everything that can run on one chip. `options` as in `run`."""
    return run(implementations_on(backend, operators), backend=backend, **options)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


__all__ = [
    "ParityResult", "Truth", "call_with_prepared", "implementations_on", "run", "run_case", "run_chip", "run_each",
    "run_outputs", "same_bits", "to_device", "to_gold", "truth_of",
]  # fmt: skip
