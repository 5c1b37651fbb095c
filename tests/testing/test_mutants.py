"""Every mutant is caught by parity on the shipped cases, and every unbroken reference passes them."""

from __future__ import annotations

import pytest

from glm5_port.registry import OPERATORS
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites
from tests.testing.mutants import MUTANTS, Mutant

SHIPPED = [name for name, operator in OPERATORS.items() if operator.__module__.startswith("glm5_port.")]


def verdicts(mutant: Mutant):
    """The results of the small cases, one after the other."""
    implementation, suite = mutant.implementation(), load_suites()[mutant.operator]
    for case in suite.cases:
        if not case.tags & WIDTH:
            for dtype in case.dtypes:
                yield parity.run_case(suite, implementation, case, dtype)


def test_every_operator_has_a_mutant():
    assert set(SHIPPED) - {mutant.operator for mutant in MUTANTS} == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_mutant_is_caught_by_its_result(mutant):
    """Caught because the answer is wrong: a mutant that merely crashes has tested nothing."""
    caught = next((r for r in verdicts(mutant) if r.status == "failed" and not r.problems[0].startswith("raised")), None)
    assert caught is not None, f"parity did not notice: {mutant.id}"
    assert caught.problems[0]


@pytest.mark.parametrize("operator", SHIPPED)
def test_the_unbroken_copy_passes(operator):
    """The same machinery without an edit: what catches the mutants is the edit, not the copying."""
    results = list(verdicts(Mutant(operator, "nothing")))
    assert [str(r) for r in results if r.status != "passed"] == []
    assert results
