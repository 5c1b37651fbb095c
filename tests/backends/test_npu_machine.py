"""The npu backend's view of the machine: chips, CANN versions, missing kernels; what is chosen; weights as they are prepared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm5_port import plugins
from glm5_port.backends.npu import machine as vendor
from glm5_port.backends.npu.experts import encoded_scale
from glm5_port.backends.npu.rules import NEEDS
from glm5_port.cli.explain import assumed_facts
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.int4 import int4_quantize
from glm5_port.quant.packing import unpack_int4
from glm5_port.registry import BACKENDS, OPERATORS
from glm5_port.selection import decide
from tests.backends.npu_host import host_npu, npu_convert_weight_to_int4pack

plugins.load_plugins()


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("Ascend910B2", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9391", "A3"),
        ("Ascend950PR_9589", "950PR"),
        ("Ascend950DT_9581", "950DT"),
        ("Ascend310P3", "Ascend310P3"),
    ],
)
def test_chip_of(name: str, chip: str) -> None:
    assert vendor.chip_of(name) == chip


@pytest.mark.parametrize(
    ("text", "numbers"), [("9.0.0", (9, 0, 0)), ("8.5.RC1", (8, 5)), ("9.1.0-beta.1", (9, 1, 0)), ("", ()), ("unknown", ())]
)
def test_version_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert vendor.version_numbers(text) == numbers


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch_npu that answers what the test says."""
    vendor.ask.cache_clear()
    package = SimpleNamespace(__version__="2.13.0", npu_rms_norm=len, npu=SimpleNamespace(utils=SimpleNamespace()))
    package.npu.get_device_name = lambda index: "Ascend910_9391"
    package.npu.utils.get_cann_version = lambda module: "9.0.0"
    monkeypatch.setattr(vendor, "_import", lambda: package)
    monkeypatch.setattr(vendor, "_kernel_libraries", lambda: (SimpleNamespace(aclnnRmsNormGetWorkspaceSize=1),))
    yield package
    vendor.ask.cache_clear()


def test_machine_is_asked(driver: SimpleNamespace) -> None:
    found = vendor.ask()
    assert (found.chip, found.cann, found.torch_npu) == ("A3", (9, 0, 0), "2.13.0")
    assert (found.offers("npu_rms_norm"), found.offers("npu_swiglu")) == (True, False)
    assert (found.has_kernel("aclnnRmsNorm"), found.has_kernel("aclnnSwiGlu")) == (True, False)


def test_machine_that_does_not_answer(driver: SimpleNamespace) -> None:
    def fail(index: int) -> str:
        raise RuntimeError("driver")

    driver.npu.get_device_name = fail
    assert vendor.ask() is vendor.ASSUMED


def test_kernels_cannot_be_asked_without_libraries(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "_kernel_libraries", tuple)
    assert vendor.ask().has_kernel("aclnnSwiGlu")


def test_probe_shows_what_is_missing(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_port.backends import npu
    from glm5_port.registry import Probe

    monkeypatch.setattr(npu, "_probe_package", lambda: Probe(None, {"torch_npu": "2.13.0"}))
    details = BACKENDS["npu"].probe().details
    assert (details["chip"], details["CANN"]) == ("A3", "9.0.0")
    missing = details["operators missing here"].split(", ")
    assert "npu_swiglu" in missing
    assert "npu_rms_norm" not in missing


def test_nothing_is_imported_without_a_usable_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise AssertionError("torch_npu was imported")

    monkeypatch.setattr(vendor, "_import", refuse)
    vendor.ask.cache_clear()
    assert vendor.machine() is vendor.ASSUMED
    assert OPERATORS["rms_norm"].implementations["npu/aclnn"].not_supported(dtype=torch.bfloat16, width=8) == []


# -- what is chosen ------------------------------------------------------------------------------------------------------

PORTABLE = {
    "int4_dequantize",
    "int4_quantize",
    "int4_quantize_measured",
    "indexer_scores",
    "mla_attention_expanded",
    "select_top_k",
}
"""What the vendor has no operator for."""


def chosen(operator: Operator, **facts: Any) -> str:
    known = {"device_type": "npu", "dtype": torch.bfloat16, **assumed_facts(None)[operator.name], **facts}
    selection = decide(operator, operator.complete_facts(known), as_backend="npu")
    assert selection.chosen is not None
    return selection.chosen.id


def test_every_operator_of_the_released_model() -> None:
    facts = {"expert_mlp_int4_w4a8": {"group_size": -1}}
    names = {needs.split("/")[0] for needs in NEEDS}
    found = {name: chosen(OPERATORS[name], **facts.get(name, {})) for name in names}
    assert set(found.values()) == {"npu/aclnn"}
    exchanges = {name for name in OPERATORS if "exchange" in OPERATORS[name].__module__}
    assert {name for name in OPERATORS if name not in names} - exchanges == PORTABLE


def test_the_variant_that_keeps_the_tie_rule() -> None:
    both = OPERATORS["lightning_indexer"].implementations
    assert "tie_rule" not in both["npu/aclnn"].promises
    assert {"tie_rule", "deterministic"} <= both["npu/ordered"].promises
    assert chosen(OPERATORS["lightning_indexer"], cache_format="int8") == "npu/ordered"


def test_ordered_indexer_on_ties() -> None:
    """The stand-in takes the last of equal scores, as the vendor may; `ordered` the first ones."""
    query, keys = torch.ones(1, 2, 128, dtype=torch.bfloat16), torch.zeros(1, 16, 128, dtype=torch.bfloat16)
    arguments = {
        "index_query": query,
        "head_weights": torch.ones(1, 2),
        "index_cache": [keys],
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "query_starts": torch.tensor([0, 1], dtype=torch.int32),
        "lengths": torch.tensor([9], dtype=torch.int32),
        "top_k": 3,
        "cache_format": "plain",
    }
    both = OPERATORS["lightning_indexer"].implementations
    with host_npu():
        assert both["npu/aclnn"].function(**arguments).tolist() == [[6, 7, 8]]
    assert both["npu/ordered"].function(**arguments).tolist() == [[0, 1, 2]]


# -- prepared weights ----------------------------------------------------------------------------------------------------


def _expert(make: torch.Generator, group_size: int) -> dict[str, torch.Tensor]:
    made = {}
    for name, shape in (("gate_up", (32, 64)), ("down", (64, 16))):
        weight = torch.randn(shape, generator=make).to(torch.bfloat16)
        size = group_size if group_size < 0 else min(group_size, shape[1])
        made[f"{name}_packed"], made[f"{name}_scales"] = int4_quantize.reference(weight, group_size=size, rule="amax7")
    return made


def test_w4a8_weights() -> None:
    """Words in the vendor's order, scales as bits, and 8 times the sum of q * s of each output."""
    implementation = OPERATORS["expert_mlp_int4_w4a8"].implementations["npu/aclnn"]
    experts = [_expert(torch.Generator().manual_seed(seed), -1) for seed in range(2)]
    with host_npu() as package:
        preparation = implementation.prepare({"experts": 2, "group_size": -1})
        for part, tensors in enumerate(experts):
            preparation.add(part, tensors)
        ready = preparation.finish()
    codes = unpack_int4(experts[1]["down_packed"])
    scales = experts[1]["down_scales"].float()
    assert torch.equal(ready["down_words"][1], npu_convert_weight_to_int4pack(codes.t().to(torch.int32).contiguous()))
    assert ready["down_scales"].shape == (2, 1, 64)
    assert torch.equal(ready["down_scales"][1, 0], encoded_scale(scales.squeeze(1)))
    assert torch.equal(ready["down_bias"][1], 8 * (codes.float() * scales).sum(1))
    assert [name for name, _, _ in package.calls] == ["npu_convert_weight_to_int4pack"] * 4


def test_encoded_scale() -> None:
    assert encoded_scale(torch.tensor([1.0, -2.0])).tolist() == [0x3F800000, 0xC0000000]


def test_expert_that_never_came() -> None:
    implementation = OPERATORS["expert_mlp_int4"].implementations["npu/aclnn"]
    with host_npu():
        preparation = implementation.prepare({"experts": 2, "group_size": 16})
        preparation.add(1, _expert(torch.Generator().manual_seed(0), 16))
    with pytest.raises(InputError, match=r"experts missing: \[0\]"):
        preparation.finish()
    with pytest.raises(InputError, match="part 5 arrived; expected experts 0 to 1"):
        preparation.add(5, {})


def test_blocked_weights_are_allowed_and_asked_for() -> None:
    implementation = OPERATORS["int8_matmul"].implementations["npu/aclnn"]
    with host_npu() as package:
        preparation = implementation.prepare({})
        preparation.add(None, {"weight": torch.ones(3, 5, dtype=torch.int8), "weight_scale": torch.ones(3)})
    assert package.npu.config.allow_internal_format
    assert [(name, args[0].shape, args[1]) for name, args, _ in package.calls] == [("npu_format_cast", (5, 3), 29)]
