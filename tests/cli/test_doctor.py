"""`glm5-port doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm5_port import requests, selection
from glm5_port.registry import BACKENDS, OPERATORS, Probe
from glm5_port.requests import search_order
from glm5_port.testing.evidence import read_evidence


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch):
    """`usable("npu", "cpu")`: exactly these backends are found, whatever this machine has."""

    def apply(*names: str) -> None:
        found = {name: Probe(None if name in names else f"{name} is not here") for name in BACKENDS}
        for module in (requests, selection):
            monkeypatch.setattr(module, "probe", found.__getitem__)

    return apply


def test_every_backend_in_search_order_with_what_is_missing(command_line, usable) -> None:
    usable("cpu")
    done = command_line("doctor")
    assert done.code == 0
    names = [backend.name for backend in search_order()]
    places = [done.out.index(f"  {name} ") for name in names]
    assert places == sorted(places)
    for name in set(names) - {"cpu"}:
        assert f"{name} is not here" in done.out
    assert "auto would choose: cpu" in done.out


def test_json_holds_what_the_text_says(command_line, usable) -> None:
    usable("mlu", "cpu")
    report = json.loads(command_line("doctor", "--json", GLM5_PORT_STRICT="1").out)
    assert list(report["backends"]) == [backend.name for backend in search_order()]
    assert report["backends"]["mlu"] | {"details": {}} == {
        "title": "Cambricon MLU",
        "usable": True,
        "missing": None,
        "device_type": "mlu",
        "package": "torch_mlu",
        "collective": "cncl",
        "origin": "built in",
        "unproven": "",
        "operators_of_its_own": 0,
        "details": {},
    }
    assert report["backends"]["npu"]["missing"] == "npu is not here"
    assert (report["auto"], report["chosen"]) == ("mlu", "mlu")
    assert report["flags"] == {"GLM5_PORT_STRICT": "1"}
    assert report["operators"]["declared"] == len(OPERATORS)
    assert report["operators"]["portable"] == sum(
        any(i.portable for i in operator.implementations.values()) for operator in OPERATORS.values()
    )
    assert {"python", "torch", "glm5_port"} <= set(report["versions"])


def test_a_request_that_cannot_be_met_is_shown_with_its_reason(command_line, usable) -> None:
    usable("cpu")
    done = command_line("doctor", GLM5_PORT_BACKEND="npu,mlu")
    assert done.code == 0
    assert "GLM5_PORT_BACKEND=npu,mlu chooses: NOTHING" in done.out
    assert "no requested backend is usable on this machine" in done.out
    assert "usable here: cpu" in done.out


def test_a_request_that_can_be_met(command_line, usable) -> None:
    usable("cuda", "cpu")
    assert "GLM5_PORT_BACKEND=npu,cpu chooses: cpu" in command_line("doctor", GLM5_PORT_BACKEND="npu,cpu").out


def test_require(command_line, usable) -> None:
    usable("cpu")
    assert command_line("doctor", "--require", "cpu").code == 0
    assert command_line("doctor", "--require", "npu").code == 1
    unknown = command_line("doctor", "--require", "npuu")
    assert unknown.code == 2
    assert "did you mean npu?" in unknown.err


def test_what_never_ran_on_its_hardware_says_so(command_line) -> None:
    """As long as evidence/ has no record of it, and no longer."""
    from glm5_port.registry import BACKENDS, OPERATORS

    proven = {record["device"]["backend"] for record in read_evidence(Path(__file__).parents[2] / "evidence")}
    own = {i.backend for operator in OPERATORS.values() for i in operator.implementations.values()} & set(BACKENDS)
    assert {name for name, backend in BACKENDS.items() if backend.unproven} == own - proven >= {"cuda", "npu"}
    assert f"\n           {BACKENDS['cuda'].unproven}\n" in command_line("doctor").out
    assert "never run on hardware  cuda: no GPU has run its kernels" in command_line("explain", "--as", "cuda").out
    one = command_line("explain", "sparse_mla_attention", "--as", "npu").out
    assert "never run on hardware  npu: no NPU has run its calls" in one
    assert "never run on hardware" not in command_line("explain", "sparse_mla_attention", "--as", "cpu").out
