"""`python -m benchmarks.cpu` measures every operator that has a kernel of its own on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.cpu.__main__ import SUITES, Suite, declared
from benchmarks.cpu.contest import Contest
from glm5_port.backends.cpu.extension import BACKEND, widest_isa
from glm5_port.registry import OPERATORS

LIGHT = ("between", "routing", "int8")
"""Suites whose contests are made and computed in a moment."""


def test_no_operator_with_a_native_kernel_is_left_out() -> None:
    measured = {operator for suite in SUITES.values() for operator in suite.operators}
    native = {op.name for op in OPERATORS.values() if any(i.backend == BACKEND for i in op.implementations.values())}
    assert native
    assert native - measured == set()


def test_a_suite_that_measures_something_else_than_it_says_is_an_error() -> None:
    def contests() -> Iterator[Contest]:
        yield Contest(operator="rotate", work="", bytes=1.0, operations=0.0, kind="bf16", contenders={})

    assert [contest.operator for contest in declared(Suite(contests, ("rotate",)))] == ["rotate"]
    with pytest.raises(SystemExit, match="rms_norm"):
        list(declared(Suite(contests, ("rotate", "rms_norm"))))


@pytest.mark.skipif(widest_isa() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("name", LIGHT)
def test_contenders_of_a_suite_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cpu.contest.COLD_BYTES", 1)  # one copy of the weights
    torch.manual_seed(0)
    contests: Callable[[], Iterator[Contest]] = SUITES[name].contests
    for contest in contests():
        results = {label: call(0).clone() for label, call in contest.contenders.items()}
        assert any(label.startswith("cpu/") for label in results) and len(results) > 1
        ours = next(result for label, result in results.items() if label.startswith("cpu/"))
        for label, other in results.items():
            if not ours.is_floating_point():
                assert torch.equal(ours, other), (contest.work, label)
            else:
                assert (ours.double() - other.double()).norm() <= 0.02 * other.double().norm(), (contest.work, label)
