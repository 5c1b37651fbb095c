"""Random cases: each is made again by its number, they differ in size, and a mistake that named cases cannot show is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from glm5_port.operators import rms_norm
from glm5_port.registry import BACKENDS, OPERATORS
from glm5_port.testing import parity
from glm5_port.testing.calls import flat
from glm5_port.testing.cases import Case, Make, Sweep, load_suites, suite

EAGER = rms_norm.implementations["torch/eager"].function
NUMBERS = range(30)
SHIPPED = [name for name, operator in OPERATORS.items() if operator.__module__.startswith("glm5_port.")]


def off_at_width_641_to_700(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """No named case is that wide."""
    return EAGER(x, weight, eps) * (1.01 if 641 <= x.shape[-1] <= 700 else 1.0)


def of(arguments: dict[str, object]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in flat(list(arguments.values()))]


@pytest.mark.parametrize("name", SHIPPED)
def test_numbers_make_cases_of_many_sizes_again(name: str) -> None:
    operator, sweep = OPERATORS[name], load_suites()[name].sweep
    assert sweep is not None
    cases = [sweep.case(number) for number in NUMBERS]
    made = [case.arguments(operator, sweep.dtypes[0]) for case in cases]
    assert len({tuple(of(arguments)) for arguments in made}) > len(NUMBERS) / 2
    for case, first in zip(cases[:3], made, strict=False):
        again = case.arguments(operator, sweep.dtypes[-1])
        assert of(first) == of(again)
        assert {n: v for n, v in first.items() if isinstance(v, int | str)} == {
            n: v for n, v in again.items() if isinstance(v, int | str)
        }


def test_a_mistake_at_a_size_that_no_named_case_has_is_found() -> None:
    wrong = dataclasses.replace(
        rms_norm.implementations["reference"], function=off_at_width_641_to_700, backend="torch", variant="tried", torch_op=None
    )
    named = parity.run([wrong], dtypes=[torch.float32])
    assert [str(result) for result in named if result.status != "passed"] == []
    failed = [r for r in parity.run([wrong], dtypes=[torch.float32], sweep=NUMBERS) if r.status == "failed"]
    assert failed and "over its budget" in failed[0].problems[0]
    number = int(failed[0].case.removeprefix("random_"))
    again = parity.run([wrong], dtypes=[torch.float32], sweep=range(number, number + 1))
    assert [(result.case, result.problems) for result in again] == [(failed[0].case, failed[0].problems)]


def test_a_suite_has_one_sweep() -> None:
    def build(make: Make) -> dict[str, object]:
        return {}

    with pytest.raises(ValueError, match="more than one sweep"):
        suite(rms_norm)(lambda: iter([Case("a", build), Sweep(build), Sweep(build)]))


@pytest.mark.slow
def test_every_implementation_of_this_machine_passes_random_cases() -> None:
    chips = [name for name, backend in BACKENDS.items() if backend.device_type == "cpu"]
    results = [result for chip in chips for result in parity.run_chip(chip, sweep=range(5))]
    assert [str(result) for result in results if result.status == "failed"] == []
    passed = {(result.operator, result.implementation) for result in results if result.status == "passed"}
    assert {operator for operator, _ in passed} >= set(SHIPPED) and len(passed) > 2 * len(SHIPPED)
