"""Every `cuda/triton` implementation against the float64 gold of its operator's own cases, by the interpreter: no GPU runs here.

Tiles of both generations are run; cases at GLM-5 widths would take hours, and are left to a GPU (`make device-check`) and to the
compile test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_port.backends.cuda.triton_support import BACKEND, DTYPES, VARIANT, assume
from glm5_port.registry import Implementation
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites
from glm5_port.testing.pytest_plugin import RESULTS

COLUMN = "cuda's kernels by the interpreter"
CARDS = {"small tiles": (8, 0), "large tiles": (9, 0)}


def implementations() -> list[Implementation]:
    return [i for i in parity.implementations_on(BACKEND) if i.backend == BACKEND and i.variant.startswith(VARIANT)]


def items() -> list[Any]:
    """Every implementation in every dtype; with the large tiles in bfloat16 alone. Fast: bfloat16, where helpers matter most."""
    fast = (torch.bfloat16, "small tiles")
    return [
        pytest.param(
            i,
            dtype,
            card,
            id=f"{i.operator.name}-{i.variant}-{str(dtype).removeprefix('torch.')}-{card}",
            marks=[] if (dtype, card) == fast else [pytest.mark.slow],
        )
        for i in implementations()
        for card in CARDS
        for dtype in (DTYPES if card == "small tiles" else (torch.bfloat16,))
        if any(dtype in case.dtypes for case in load_suites()[i.operator.name].cases)
    ]


@pytest.mark.parametrize(("implementation", "dtype", "card"), items())
def test_parity(implementation: Implementation, dtype: torch.dtype, card: str, request: pytest.FixtureRequest) -> None:
    suite = load_suites()[implementation.operator.name]
    with assume(CARDS[card]):
        results = [
            parity.run_case(suite, implementation, case, dtype, backend=COLUMN)
            for case in suite.cases
            if dtype in case.dtypes and not case.tags & WIDTH
        ]
    request.node.user_properties.append((RESULTS, [result.as_dict() for result in results]))
    failed = [result for result in results if result.status == "failed"]
    assert not failed, "\n".join(map(str, failed))
    assert any(result.status == "passed" for result in results), sorted({p for r in results for p in r.problems})
