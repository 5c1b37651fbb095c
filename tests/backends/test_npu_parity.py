"""Every implementation of the npu backend on the parity cases, with host maths in place of the vendor's kernels.

What this judges is ours: weights as they are prepared, arguments as they are laid out, results as they are taken back, what is
read of what the vendor leaves undefined. The bodies are written from the vendor's documents; no kernel of CANN runs here.
"""

from __future__ import annotations

import pytest
import torch

from glm5_port import plugins
from glm5_port.backends.npu.rules import NEEDS
from glm5_port.registry import OPERATORS, Implementation
from glm5_port.testing import parity
from glm5_port.testing.cases import DTYPES, WIDTH, load_suites
from tests.backends.npu_host import host_npu

plugins.load_plugins()


def implementation(needs: str) -> Implementation:
    operator, variant = needs.split("/")
    return OPERATORS[operator].implementations[f"npu/{variant}"]


def results(needs: str, dtype: torch.dtype) -> list[parity.ParityResult]:
    mine = implementation(needs)
    suite = load_suites()[mine.operator.name]
    cases = [case for case in suite.cases if dtype in case.dtypes and not case.tags & WIDTH]
    return [parity.run_case(suite, mine, case, dtype) for case in cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("needs", sorted(NEEDS))
def test_parity_on_host_maths(needs: str, dtype: torch.dtype) -> None:
    with host_npu():
        found = results(needs, dtype)
    failed = [str(result) for result in found if result.status == "failed"]
    assert not failed, "\n".join(failed)
