"""Every implementation of the npu backend on the parity cases, with host maths in place of the vendor's kernels.

What this judges is ours: weights as they are prepared, arguments as they are laid out, results as they are taken back, what is
read of what the vendor leaves undefined. The bodies are written from the vendor's documents; no kernel of CANN runs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from glm5_port import plugins
from glm5_port.backends.npu.rules import NEEDS, Needs, VendorOperator, plain
from glm5_port.registry import OPERATORS, Implementation
from glm5_port.testing import parity
from glm5_port.testing.cases import DTYPES, WIDTH, load_suites
from tests.backends.npu_host import host_npu

plugins.load_plugins()


def implementation(needs: str) -> Implementation:
    operator, variant = needs.split("/")
    return OPERATORS[operator].implementations[f"npu/{variant}"]


KEPT = ("dtype", "cache format", "rotation", "renormalise", "group size", "outputs", "packed widths")
"""Rules on facts that hold whatever the size of a model."""
SIZES = (
    "page size", "latent width", "rope width", "rope shape", "key width", "query width", "head width", "heads", "query heads",
    "whole 16s", "x dims", "groups", "group size", "sparse_count", "weight unit",
)  # fmt: skip
"""Rules of calls about sizes: the bodies on the host take any."""


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The common parity cases are smaller than what the vendor's kernels take: sizes are not looked at."""
    for name, needs in NEEDS.items():
        monkeypatch.setitem(NEEDS, name, Needs(needs.uses, tuple(rule for rule in needs.rules if rule.name in KEPT)))
    check = VendorOperator.check

    def without_sizes(operator: VendorOperator, arguments: Mapping[str, Any]) -> None:
        check(replace(operator, rules=tuple(rule for rule in operator.rules if rule.name not in SIZES)), arguments)

    monkeypatch.setattr(VendorOperator, "check", without_sizes)


def failures(needs: str, dtype: torch.dtype, *, width: bool, at_least: int) -> list[str]:
    """What fails of an implementation's cases; too few that run fail as well."""
    mine = implementation(needs)
    suite = load_suites()[mine.operator.name]
    cases = [case for case in suite.cases if dtype in case.dtypes and bool(case.tags & WIDTH) == width]
    taken = [case for case in cases if not mine.not_supported(**mine.operator.facts_of(case.arguments(mine.operator, dtype)))]
    found = [parity.run_case(suite, mine, case, dtype) for case in taken]
    passed = sum(result.status == "passed" for result in found)
    failed = [str(result) for result in found if result.status == "failed"]
    return [*failed, f"only {passed} cases ran:", *map(str, found)] if passed < at_least else failed


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, id=plain(dtype), marks=[] if dtype == torch.bfloat16 else [pytest.mark.slow]) for dtype in DTYPES],
)
@pytest.mark.parametrize("needs", sorted(NEEDS))
def test_common_cases_on_host_maths(needs: str, dtype: torch.dtype) -> None:
    with host_npu():
        failed = failures(needs, dtype, width=False, at_least=1 if dtype == torch.bfloat16 else 0)
    assert not failed, "\n".join(failed)


GROUPS_ONLY = "expert_mlp_int4_w4a8/aclnn"
"""Its one case at GLM-5's widths has groups of inputs, which it declines."""
WITH_WIDTHS = [
    pytest.param(needs, marks=[pytest.mark.slow] if needs.startswith("expert_mlp_int4") else [])
    for needs in sorted(NEEDS)
    if needs != GROUPS_ONLY and any(case.tags & WIDTH for case in load_suites()[needs.split("/")[0]].cases)
]


@pytest.mark.parametrize("needs", WITH_WIDTHS)
def test_glm5_widths_on_host_maths(needs: str) -> None:
    """Every rule holds at the released model's widths."""
    with host_npu():
        failed = failures(needs, torch.bfloat16, width=True, at_least=1)
    assert not failed, "\n".join(failed)
