"""The harness catches each kind of mistake an implementation can make, and never crashes on one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.operators import rms_norm
from glm5_port.registry import OPERATORS, Budget
from glm5_port.testing import parity
from glm5_port.testing.cases import TIES, WIDTH, Case, Suite, load_suites
from glm5_port.testing.promises import alone, check_tie_cases

EAGER = rms_norm.implementations["torch/eager"].function
SUITE = load_suites()["rms_norm"]
ULP = 2.0**-23
"""A difference that every budget allows and no promise does."""


def implementation(function, promises=(), operator=rms_norm, **changes):
    changes = {"backend": "torch", "variant": "tried", "differentiable": False, **changes}
    return dataclasses.replace(
        operator.implementations["reference"], function=function, promises=frozenset(promises), torch_op=None, **changes
    )


def verdict(function, case="odd_width", suite=SUITE, dtype=torch.float32, **options):
    found = next(c for c in suite.cases if c.name == case)
    return parity.run_case(suite, implementation(function, operator=suite.operator, **options), found, dtype)


def failed_with(text: str, *args, **options) -> None:
    result = verdict(*args, **options)
    assert result.status == "failed"
    assert any(text in problem for problem in result.problems), result.problems


def test_a_right_implementation_passes_and_is_measured():
    result = verdict(EAGER, promises=("deterministic", "thread_invariant"))
    assert (result.status, result.problems) == ("passed", [])
    assert 0.0 < result.errors["budget_share"] <= 1.0
    assert set(result.as_dict()) >= {"operator", "implementation", "case", "dtype", "status", "problems", "errors", "backend"}


def test_wrong_values_name_the_measure_and_the_budget():
    failed_with("rms error", lambda x, weight, eps: EAGER(x, weight, eps) * 1.001)
    failed_with("over its budget", lambda x, weight, eps: EAGER(x, weight, eps) * 1.001)


def test_one_wrong_element_is_caught():
    def wrong(x, weight, eps):
        y = EAGER(x, weight, eps)
        y[0, 0] += 0.01
        return y

    failed_with("max error", wrong)


def test_form():
    failed_with("instead of (5, 77)", lambda x, weight, eps: EAGER(x, weight, eps)[:, 1:])
    failed_with("torch.float64", lambda x, weight, eps: EAGER(x, weight, eps).double())
    failed_with("2 outputs instead of 1", lambda x, weight, eps: (EAGER(x, weight, eps), x.clone()))


def test_anomalies_are_compared_first():
    failed_with("NaN in other places", lambda x, weight, eps: EAGER(x, weight, eps).nan_to_num(), case="not_finite")


def test_an_exception_is_a_failure_of_that_case():
    def raises(x, weight, eps):
        raise RuntimeError("the driver is too old")

    failed_with("raised RuntimeError: the driver is too old", raises)


def test_a_case_that_cannot_be_made_is_told():
    def impossible(make):
        raise ValueError("no such shape")

    suite = dataclasses.replace(SUITE, cases=(Case("impossible", impossible),))
    failed_with("the case or the reference raised ValueError: no such shape", EAGER, case="impossible", suite=suite)


def test_declined_gives_the_reasons():
    result = verdict(EAGER, not_supported=lambda *, width, **_: [f"no kernel for width {width}"])
    assert (result.status, result.problems) == ("declined", ["no kernel for width 77"])


def test_unavailable_gives_what_the_probe_says():
    results = parity.run([implementation(EAGER, backend="npu", variant="aclnn")], without_tags=WIDTH)
    assert {r.status for r in results} == {"unavailable"}
    assert {r.backend for r in results} == {"npu"}
    assert all(r.problems[0] for r in results)


def test_unfilled_memory_shows():
    def forgets_the_last_row(x, weight, eps):
        y = torch.empty(x.shape, dtype=x.dtype)
        y[:-1] = EAGER(x[:-1], weight, eps)
        return y

    failed_with("NaN in other places", forgets_the_last_row)


def test_inputs_must_not_be_written():
    def in_place(x, weight, eps):
        x.mul_(1.0000001)
        return EAGER(x, weight, eps)

    failed_with("wrote its argument x", in_place)


def test_outputs_must_not_alias():
    add = OPERATORS["add_rms_norm"]
    suite = load_suites()["add_rms_norm"]
    both = add.implementations["torch/eager"].function

    def aliases_argument(x, residual, weight, eps):
        y, total = both(x, residual, weight, eps)
        residual.copy_(total)
        return y, residual

    failed_with("output 1 shares memory with argument residual", aliases_argument, suite=suite)

    def aliases_output(x, residual, weight, eps):
        y, total = both(x, residual, weight, eps)
        together = torch.stack((y, total))
        return together[0], together[1]

    failed_with("output 1 shares memory with output 0", aliases_output, suite=suite)


def test_the_fake_must_agree():
    failed_with("the fake promises (4,)", EAGER, fake=lambda x, weight, eps: x.new_empty(4))


def test_gaps_between_elements_must_not_be_read():
    def ignores_strides(x, weight, eps):
        return EAGER(x.as_strided(x.shape, (x.shape[1], 1)), weight, eps)

    failed_with("with non-contiguous x", ignores_strides)


def test_a_wrong_gradient_is_caught():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    failed_with("gradient of x", lambda x, weight, eps: Wrong.apply(EAGER(x, weight, eps)), differentiable=True)
    failed_with("gradient of x", lambda x, weight, eps: EAGER(x.detach(), weight, eps), differentiable=True)
    assert verdict(EAGER, differentiable=True).status == "passed"


# -- promises ----------------------------------------------------------------------------------------------------------


def test_deterministic():
    calls = itertools.count(1)

    def every_second_time(x, weight, eps):
        return EAGER(x, weight, eps) * (1 + next(calls) % 2 * ULP)

    failed_with("promises to be deterministic", every_second_time, promises=["deterministic"])


def test_thread_invariant():
    def by_threads(x, weight, eps):
        return EAGER(x, weight, eps) * (1 + (torch.get_num_threads() == 2) * ULP)

    before = torch.get_num_threads()
    failed_with("promises the same bits for any number of threads", by_threads, promises=["thread_invariant"])
    assert torch.get_num_threads() == before
    assert verdict(by_threads).status == "passed"


def test_batch_invariant():
    def by_rows(x, weight, eps):
        return EAGER(x, weight, eps) * (1 + (x.shape[0] > 1) * ULP)

    failed_with("promises batch_invariant, and token 0 alone differs", by_rows, promises=["batch_invariant"])
    assert verdict(by_rows).status == "passed"


def test_batch_invariant_of_a_packed_operator():
    """Each token alone, with its own sequence's pages, gives what it gives in the batch."""
    suite = load_suites()["mla_attention_absorbed"]
    reference = suite.operator.reference

    def by_neighbours(**arguments):
        return reference(**arguments) + arguments["query_starts"].shape[0]

    case = next(c for c in suite.cases if c.arguments(suite.operator, torch.float32)["lengths"].shape[0] > 1)
    truth = parity.truth_of(suite, case, torch.float32)
    rows = truth.gold[0].shape[0]
    for row in range(rows):
        one = alone(suite, truth.arguments, row)
        if one is not None:
            torch.testing.assert_close(reference(**one), truth.reference[0][row : row + 1])
            assert one["query_starts"].tolist() == [0, 1]
    failed = parity.run_case(suite, implementation(by_neighbours, ["batch_invariant"], suite.operator), case, torch.float32)
    assert failed.status == "failed"


def test_batch_invariant_of_an_operator_that_writes(fill):
    suite = load_suites()["write_cache"]
    reference = suite.operator.reference
    cases = [c for c in suite.cases if not c.tags & WIDTH]
    results = [
        parity.run_case(suite, implementation(reference, ["batch_invariant"], suite.operator), c, torch.float32) for c in cases
    ]
    assert {r.status for r in results} == {"passed"}

    def by_rows(rows, cache, slots):
        cache[slots] = rows * (1 + (len(slots) > 1) * ULP)

    failed_with("writing token by token differs", by_rows, case="plain", suite=fill, promises=["batch_invariant"])
    assert verdict(by_rows, case="plain", suite=fill).status == "passed"


def test_a_written_element_may_hold_the_poison_by_chance(fill):
    """The reference writes a row in which one element is the poison itself: another value there is an error, no trespass."""
    truth = parity.truth_of(fill, next(c for c in fill.cases if c.name == "plain"), torch.float32)
    (outputs,) = ([t.clone() for t in truth.reference],)
    slot = int(truth.arguments["slots"][0])
    truth.reference[0][slot, 0] = truth.arguments["cache"][slot, 0]
    assert truth.judge(outputs)[0] == []
    untouched = next(row for row in range(len(outputs[0])) if row not in truth.arguments["slots"].tolist())
    outputs[0][untouched, 0] += 1
    assert "must be left alone" in truth.judge(outputs)[0][0]


def test_a_promise_that_cannot_be_checked_is_broken():
    without_rows = dataclasses.replace(SUITE, rows=())
    failed_with("names no rows to check it with", EAGER, suite=without_rows, promises=["batch_invariant"])
    promising = implementation(EAGER, ["tie_rule"])
    assert "no case tagged TIES" in check_tie_cases(SUITE, promising, {})[0]
    results = parity.run([promising], without_tags=WIDTH, dtypes=[torch.float32])
    assert [r.case for r in results if r.status == "failed"] == [parity.PROMISE_CASE]


def test_declining_every_tie_does_not_keep_the_tie_rule():
    suite = Suite(rms_norm, (Case("tied", SUITE.cases[1].build, tags=TIES), *SUITE.cases[:1]))
    promising = implementation(EAGER, ["tie_rule"])
    assert check_tie_cases(suite, promising, {"tied": "declined", "no_tokens": "passed"}) != []
    assert check_tie_cases(suite, promising, {"tied": "passed"}) == []
    assert check_tie_cases(suite, implementation(EAGER), {"tied": "declined"}) == []


def test_a_dtype_that_is_declined_does_not_hide_the_ties_of_another():
    promising = implementation(EAGER, ["tie_rule"])
    suite = Suite(rms_norm, (Case("tied", SUITE.cases[1].build, tags=TIES),))
    for statuses in (("passed", "declined"), ("declined", "passed"), ("declined", "declined")):
        results = [parity.ParityResult("rms_norm", promising.id, "tied", str(i), status, []) for i, status in enumerate(statuses)]
        assert parity._tie_row(suite, promising, results, "cpu") == []
    others = parity.ParityResult("rms_norm", promising.id, "plain", "float32", "passed", [])
    assert len(parity._tie_row(suite, promising, [*results, others], "cpu")) == 1


# -- mutated arguments -------------------------------------------------------------------------------------------------


@pytest.fixture
def fill(declare, set_flags):
    def fill(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
        cache[slots] = rows.to(cache.dtype)

    operator = declare(fill, mutates=("cache",), fake=lambda rows, cache, slots: None, budget=Budget(floor=16.0))
    case = Case("plain", lambda make: {"rows": make.normal(2, 4), "cache": make.zeros(6, 4), "slots": torch.tensor([4, 1])})
    return Suite(operator, (case,), rows=("rows",))


def test_rows_that_nobody_names_must_stay(fill):
    def clears_the_rest(rows, cache, slots):
        cache.zero_()
        cache[slots] = rows

    failed_with("16 elements written that must be left alone, first at (0, 0)", clears_the_rest, case="plain", suite=fill)
    assert verdict(fill.operator.reference, case="plain", suite=fill).status == "passed"


def test_rows_that_are_not_written_show(fill):
    def forgets_one(rows, cache, slots):
        cache[slots[:1]] = rows[:1]

    assert verdict(forgets_one, case="plain", suite=fill).status == "failed"


# -- runs --------------------------------------------------------------------------------------------------------------


def test_run_filters_and_reports_progress():
    seen = []
    results = parity.run(
        [implementation(EAGER)],
        dtypes=[torch.bfloat16],
        only_tags=WIDTH,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    widths = [case for case in SUITE.cases if case.tags & WIDTH]
    assert [r.case for r in results] == [case.name for case in widths]
    assert {r.dtype for r in results} == {"bfloat16"}
    assert seen == [(f"rms_norm {case.name} bfloat16", place, len(widths)) for place, case in enumerate(widths)]


def test_implementations_on_a_chip():
    assert {i.backend for i in parity.implementations_on("cpu", ["rms_norm"])} <= {"cpu", "torch"}
    with pytest.raises(InputError, match=r"no such operator: rms_nrom; did you mean rms_norm\?"):
        parity.implementations_on("cpu", ["rms_nrom"])
    with pytest.raises(InputError, match=r"no such backend: cpuu; did you mean cpu\?"):
        parity.implementations_on("cpuu")


def test_cases_are_the_same_on_every_run():
    for suite in load_suites().values():
        case = suite.cases[-1]
        if case.tags & WIDTH:
            continue
        first, second = (case.arguments(suite.operator, torch.bfloat16) for _ in range(2))
        for name, value in first.items():
            ours, theirs = ([v] if isinstance(v, Tensor) else v for v in (value, second[name]))
            if isinstance(ours, list):
                assert all(parity.same_bits(a, b) for a, b in zip(ours, theirs, strict=True)), name
