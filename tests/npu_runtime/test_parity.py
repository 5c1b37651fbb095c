"""Every implementation of the npu backend on `npu:0` of the stand-in runtime, held against the float64 gold of its operator.

What passes here is the call as documented, the packing of weights and everything that our own code does around a kernel; the
numbers are those of our bodies, in the order of the CPU.
"""

from __future__ import annotations

import pytest

from glm5_port.backends.npu.rules import NEEDS
from glm5_port.registry import Implementation
from glm5_port.requests import probe
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites
from tests.npu_runtime import machine

BACKEND = "npu"


def _implementations(*, portable: bool) -> list[Implementation]:
    found = parity.implementations_on(BACKEND)
    return [i for i in found if i.portable == portable and i.operator.name in load_suites()]


def _name(implementation: Implementation) -> str:
    return f"{implementation.operator.name}-{implementation.id}"


def _judge(results: list[parity.ParityResult]) -> None:
    failed = [str(result) for result in results if result.status == "failed"]
    assert not failed, "\n".join(failed)


def test_the_backend_is_usable_here() -> None:
    assert probe(BACKEND).missing is None


@pytest.mark.parametrize("implementation", _implementations(portable=False), ids=_name)
def test_vendor_kernels(implementation: Implementation) -> None:
    """All cases, those at GLM-5's widths included: most fused operators fit nothing smaller."""
    with machine.recorded() as calls:
        results = parity.run([implementation], backend=BACKEND)
    _judge(results)
    assert any(result.status == "passed" for result in results), "no case fits"
    refused = sorted({call.kernel for call in calls if not call.ran})
    assert not refused, f"kernels without a body were called: {refused}"
    ran = {call.kernel for call in calls}
    for operator in NEEDS[f"{implementation.operator.name}/{implementation.variant}"].uses:
        assert not operator.kernels or ran & set(operator.kernels), f"{operator.name} was never called: {sorted(ran)}"


@pytest.mark.parametrize("implementation", _implementations(portable=True), ids=_name)
def test_portable(implementation: Implementation) -> None:
    """What runs where the vendor has nothing that fits."""
    _judge(parity.run([implementation], backend=BACKEND, without_tags=WIDTH))
