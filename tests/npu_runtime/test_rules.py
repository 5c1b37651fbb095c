"""Rules read from the documents twice: by the backend, which says no beforehand, and by the bodies, which refuse the call.

Each reason of the backend that alone keeps a parity case out is taken away, and so are its checks before a call: then the
stand-in runtime, or the vendor's front end, must refuse what comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from glm5_port.backends.npu.rules import NEEDS, VendorOperator
from glm5_port.registry import OPERATORS
from glm5_port.testing import parity
from glm5_port.testing.calls import flat
from glm5_port.testing.cases import Case, load_suites
from tests.npu_runtime.bodies import BODIES

OURS = {("lightning_indexer/aclnn_int8", "dtype")}
"""Rules of the backend and not of the vendor's: the query becomes int8 before this call, whatever it was."""


def kept_out_alone() -> Iterator[tuple[str, str, Case, torch.dtype]]:
    """For each rule on facts the first parity case that it alone keeps out."""
    seen = set()
    for needs, table in sorted(NEEDS.items()):
        operator = OPERATORS[needs.split("/")[0]]
        for case in load_suites()[operator.name].cases:
            for dtype in case.dtypes:
                arguments = case.arguments(operator, dtype)
                if not all(tensor.numel() for tensor in flat(arguments)):
                    continue  # without tokens nothing is called
                facts = operator.facts_of(arguments) | {"device_type": "npu"}
                broken = [rule.name for rule in table.rules if not rule.holds(**facts)]
                if len(broken) == 1 and (needs, broken[0]) not in seen | OURS:
                    seen.add((needs, broken[0]))
                    yield needs, broken[0], case, dtype


CASES = list(kept_out_alone())


@pytest.mark.parametrize(("needs", "rule", "case", "dtype"), CASES, ids=[f"{needs}-{rule}" for needs, rule, *_ in CASES])
def test_without_the_rule_the_call_is_refused(
    needs: str, rule: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, variant = needs.split("/")
    without = replace(NEEDS[needs], rules=tuple(one for one in NEEDS[needs].rules if one.name != rule))
    monkeypatch.setitem(NEEDS, needs, without)
    monkeypatch.setattr(VendorOperator, "check", lambda operator, arguments: None)
    implementation = OPERATORS[name].implementations[f"npu/{variant}"]
    result = parity.run_case(load_suites()[name], implementation, case, dtype, "npu", backend="npu")
    assert result.status == "failed", str(result)


def test_most_rules_have_a_case() -> None:
    assert len({needs for needs, *_ in CASES}) >= 15


def test_every_vendor_operator_has_a_body() -> None:
    from glm5_port.backends.npu.contracts import VENDOR_OPERATORS

    with_kernels = {name for name, operator in VENDOR_OPERATORS.items() if operator.kernels}
    assert with_kernels <= set(BODIES)
    for name in with_kernels:
        assert set(VENDOR_OPERATORS[name].kernels) & set(BODIES[name].kernels)
