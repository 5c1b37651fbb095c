"""The plugin's own tests: what conformance cannot know. Parity with the gold is glm5_port's part:

pytest --pyargs glm5_port.testing.conformance -k toychip --require-backend toychip
"""

from __future__ import annotations

import pytest
import torch

from glm5_port import OPERATORS, use_backend
from glm5_port.errors import InputError
from glm5_port.requests import probe, search_order
from glm5_port.testing import parity
from glm5_port_toychip.norm import not_supported


def implementations():
    return [i for i in parity.implementations_on("toychip") if i.backend == "toychip"]


def test_it_is_found_before_the_cpu() -> None:
    names = [backend.name for backend in search_order()]
    assert names.index("toychip") == names.index("cpu") - 1
    assert probe("toychip").missing is None


def test_reasons_are_pure() -> None:
    assert not_supported(width=6144, dtype=torch.bfloat16) == []
    assert "width 77 is not a multiple" in not_supported(width=77, dtype=torch.bfloat16)[0]
    assert "no float16" in not_supported(width=64, dtype=torch.float16)[0]


def test_both_kernels_are_right() -> None:
    assert {i.id for i in implementations()} == {"toychip/lanes", "toychip/transposed"}
    results = parity.run(implementations(), backend="toychip")
    assert [str(r) for r in results if r.status == "failed"] == []
    assert {r.operator for r in results if r.status == "passed"} == {"rms_norm", "linear"}
    assert {r.case for r in results if r.status == "declined"} >= {"odd_width"}


def test_a_bound_linear_prepares_its_weight() -> None:
    weight = torch.randn(16, 24)
    with use_backend("toychip"):
        bound = OPERATORS["linear"].bind(device_type="cpu", dtype=torch.float32, width_in=24, width_out=16)
    preparation = bound.prepare()
    preparation.add(None, {"weight": weight})
    prepared = preparation.finish()
    assert prepared["weight_transposed"].shape == (24, 16)
    x = torch.randn(3, 24)
    torch.testing.assert_close(bound(x, **prepared), x @ weight.t())


def test_a_weight_of_another_shape_is_refused() -> None:
    with use_backend("toychip"):
        bound = OPERATORS["linear"].bind(device_type="cpu", dtype=torch.float32, width_in=24, width_out=16)
    with pytest.raises(InputError, match="bound for a weight"):
        bound.prepare().add(None, {"weight": torch.zeros(16, 16)})
