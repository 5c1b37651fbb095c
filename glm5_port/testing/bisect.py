"""Names the operator that breaks a model: every call of a reference run, replayed on the suspect's implementations.

The reference model generates a few tokens while every operator call is recorded. Each call's inputs, taken from the *reference*
run, then go through the suspect's implementation of the same binding, and the outputs are judged as in parity, against the
float64 gold of those inputs. So a flipped selection or a small error is not blamed on the layers after it.

Exact ties are judged apart: in a run they are rare, and one cannot tell a broken tie rule from an honest rounding that broke the
tie. So the first call of every implementation brings the suite's own cases of ties (`TIES`) with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from glm5_port.config import Glm5Config
from glm5_port.dispatch import Bound
from glm5_port.errors import InputError
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.load import load
from glm5_port.requests import resolve_backend
from glm5_port.testing.calls import flat, run_outputs, to_device, to_gold
from glm5_port.testing.cases import TIES, WIDTH, Case, Suite, load_suites
from glm5_port.testing.parity import Truth, run_case
from glm5_port.testing.tiny import tiny_config


@dataclass(slots=True)
class Finding:
    """One operator call in the model.

    Attributes:
        call: place in the order of the run.
        operator, implementation: what ran in the suspect.
        binding: which of the model's bindings, in the order of construction.
        problems: what is wrong; empty when the call agrees.
        budget_share: measured error over the allowed one, 0 where outputs are compared exactly.
    """

    call: int
    operator: str
    implementation: str
    binding: int
    problems: list[str] = field(default_factory=list)
    budget_share: float = 0.0


@dataclass(slots=True)
class BisectReport:
    """What `bisect` found.

    Attributes:
        calls: operator calls replayed.
        first: the first call over its budget, or None.
        operators: operator -> number of calls that were wrong, for operators with any.
        worst_share: operator -> largest budget share seen.
    """

    calls: int
    first: Finding | None
    operators: dict[str, int]
    worst_share: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Call:
    binding: int
    arguments: dict[str, Any]


def bisect(
    suspect: Glm5Model,
    reference: Glm5Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> BisectReport:
    """Finds the operators of `suspect` whose outputs are over budget, in the order in which the model calls them.

    Args:
        suspect: a model on any backend.
        reference: the same model on the CPU, built with `implementation="reference"`.
        prompts: run through both prefill and decode.
        max_new_tokens: the first comes from the prefill, each other one is a decode step.
        progress: called with (operator, calls replayed, calls in all).

    Raises:
        InputError: the two models are not the same model.
    """
    ours, theirs = ([bound.selection.operator for bound in model.binder.bindings] for model in (suspect, reference))
    if ours != theirs:
        raise InputError("bisect needs two builds of one model: they do not bind the same operators in the same order")
    calls = _record(reference, prompts, max_new_tokens)
    own_weights = _weights_of(suspect)
    tied: set[tuple[str, Any]] = set()
    findings: list[Finding] = []
    for number, call in enumerate(calls):
        if progress is not None:
            progress(suspect.binder.bindings[call.binding].selection.operator, number, len(calls))
        findings.append(_replay(number, call, suspect, own_weights))
        bound = suspect.binder.bindings[call.binding]
        if (key := (bound.selection.operator, bound.function)) not in tied:
            tied.add(key)
            findings[-1].problems += _check_ties(bound, suspect)
    wrong = [finding for finding in findings if finding.problems]
    return BisectReport(
        calls=len(calls),
        first=wrong[0] if wrong else None,
        operators={name: sum(f.operator == name for f in wrong) for name in dict.fromkeys(f.operator for f in wrong)},
        worst_share={
            name: max(f.budget_share for f in findings if f.operator == name)
            for name in dict.fromkeys(f.operator for f in findings)
        },
    )


def bisect_report(
    checkpoint: str | PathLike[str] | None,
    backend: str,
    dtype: torch.dtype,
    *,
    prompt_tokens: int,
    new_tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> BisectReport:
    """`bisect` of a checkpoint, or (None) of a small random GLM-5.2, on a random prompt: prefill, then `new_tokens` steps."""
    if checkpoint is None:
        suspect, reference = build_pair(tiny_config(), backend=backend, dtype=dtype)
    else:
        suspect = load(checkpoint, backend=backend, dtype=dtype)
        reference = load(checkpoint, backend="cpu", dtype=dtype, implementation="reference")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, suspect.config.vocab_size, (prompt_tokens,), generator=generator).tolist()
    # One more than decode steps: the first new token comes from the prefill.
    return bisect(suspect, reference, [prompt], max_new_tokens=new_tokens + 1, progress=progress)


def build_pair(
    config: Glm5Config, *, backend: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Glm5Model, Glm5Model]:
    """(suspect on the requested backend, reference on the CPU) with the same random weights."""
    mtp = bool(options.get("mtp"))
    stored = random_weights(config, dtype=dtype, mtp=mtp)
    reference = build(config, stored, backend="cpu", dtype=dtype, implementation="reference", **options)
    here = random_weights(config, dtype=dtype, device=resolve_backend(backend).device_type, mtp=mtp)
    return build(config, here, backend=backend, dtype=dtype, **options), reference


def _record(model: Glm5Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[_Call]:
    """Runs the model with every binding wrapped, and keeps a copy of each call's arguments as they were before it."""
    calls: list[_Call] = []
    originals = [bound.function for bound in model.binder.bindings]
    for number, bound in enumerate(model.binder.bindings):
        bound.function = _recorder(number, bound, calls)
    try:
        model.generate(prompts, max_new_tokens=max_new_tokens, stop_ids=())
    finally:
        for bound, original in zip(model.binder.bindings, originals, strict=True):
            bound.function = original
    return calls


def _recorder(number: int, bound: Bound, calls: list[_Call]) -> Callable[..., Any]:
    function, parameters, weights = (
        bound.function,
        bound.implementation.operator.parameters,
        bound.implementation.operator.weights,
    )

    def record(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        # Weights do not change: the record refers to them, so that a run costs its activations only.
        kept = {name: value if name in weights else copy.deepcopy(value) for name, value in arguments.items()}
        calls.append(_Call(number, {name: kept[name] for name in parameters}))
        return function(*args, **kwargs)

    return record


def _weights_of(model: Glm5Model) -> dict[int, dict[str, Any]]:
    """id(bound) -> the weights that it is called with, in the layout that its implementation prepared."""
    return {id(layer.bound): layer.arguments for layer in model.modules() if isinstance(layer, BoundLayer)}


def _replay(number: int, call: _Call, suspect: Glm5Model, own_weights: dict[int, dict[str, Any]]) -> Finding:
    bound = suspect.binder.bindings[call.binding]
    operator = bound.implementation.operator
    finding = Finding(number, operator.name, bound.implementation.id, call.binding)
    truth = _truth(load_suites()[operator.name], call)
    activations = {name: value for name, value in truth.arguments.items() if name not in operator.weights}
    weights = own_weights.get(id(bound), {})
    arguments = to_device(activations, str(suspect.device))
    try:
        outputs = run_outputs(operator, lambda **own: bound.function(**own, **weights), arguments)
        finding.problems, errors = truth.judge(outputs)
        finding.budget_share = errors.get("budget_share", 0.0)
    except Exception as error:  # what an implementation raises is what bisect is asked to find
        finding.problems = [f"raised {type(error).__name__}: {error}"]
    return finding


def _check_ties(bound: Bound, suspect: Glm5Model) -> list[str]:
    """What the suite's cases of exact ties say about what this binding runs. Cases at true widths would take too long."""
    suite = load_suites()[bound.selection.operator]
    implementation = replace(bound.implementation, function=bound.function)
    problems: list[str] = []
    for case in suite.cases:
        if (case.tags & TIES) and not (case.tags & WIDTH) and suspect.dtype in case.dtypes:
            result = run_case(suite, implementation, case, suspect.dtype, str(suspect.device), backend=suspect.backend)
            problems += [f"case of ties {case.name}: {problem}" for problem in result.problems if result.status == "failed"]
    return problems


def _truth(suite: Suite, call: _Call) -> Truth:
    operator = suite.operator
    gold_arguments = {name: to_gold(value) for name, value in call.arguments.items()}
    dtype = next(tensor.dtype for tensor in flat(call.arguments) if tensor.is_floating_point())
    with torch.no_grad():
        return Truth(
            suite=suite,
            case=Case("recorded call", lambda make: call.arguments),
            dtype=dtype,
            arguments=call.arguments,
            gold_arguments=gold_arguments,
            reference=run_outputs(operator, operator.reference, call.arguments),
            gold=run_outputs(operator, operator.reference, gold_arguments),
        )
