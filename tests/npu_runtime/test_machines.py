"""Other chips, other versions of CANN, and how they are called: each machine is a process of its own, torch_npu reads it once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from glm5_port.errors import ParityError
from glm5_port.requests import probe
from glm5_port.testing.evidence import device_description, write_evidence
from tests.npu_runtime import machine

EXPLAIN = ["-m", "glm5_port", "explain", "--json"]


def on(chip: str, cann: str, *command: str) -> str:
    """What a command prints on another machine."""
    asked = [sys.executable, "-m", "tests.npu_runtime", "--chip", chip, "--cann", cann, *command]
    environment = {**os.environ, "GLM5_PORT_BACKEND": "npu"}
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def choices(chip: str, cann: str) -> tuple[dict[str, str], dict[str, str]]:
    """Operator -> what runs at GLM-5.2's widths; and all reasons against the backend's own, joined."""
    found: list[dict[str, Any]] = json.loads(on(chip, cann, *EXPLAIN))
    reasons = {
        row["operator"]: "; ".join(
            reason for other in row["candidates"] if other["id"].startswith("npu/") for reason in other["reasons"]
        )
        for row in found
    }
    return {row["operator"]: row["chosen"] for row in found}, reasons


FUSED = (
    "mla_prologue_into_cache",
    "lightning_indexer",
    "sparse_mla_attention",
    "route_experts",
    "expert_mlp",
    "attention_output",
)


@pytest.mark.parametrize("chip", ["A2", "A3"])
def test_a2_and_a3_run_the_fused_operators(chip: str) -> None:
    chosen, _ = choices(chip, "9.1.0")
    assert {name: chosen[name] for name in FUSED} == dict.fromkeys(FUSED, "npu/aclnn")


@pytest.mark.parametrize(
    ("chip", "operators"),
    [("A3", ("expert_mlp", "lightning_indexer")), ("950", ("sparse_mla_attention", "add_rms_norm"))],
)
def test_operators_on_other_chips(chip: str, operators: tuple[str, ...]) -> None:
    """Where bodies refuse what is not documented for the chip: the paths that differ from A2's."""
    asked = [word for name in operators for word in ("--operator", name)]
    results = json.loads(on(chip, "9.1.0", "-m", "glm5_port", "parity", "--backend", "npu", "--json", *asked))["results"]
    assert not [result for result in results if result["status"] == "failed"]
    passed = {(result["operator"], result["implementation"]) for result in results if result["status"] == "passed"}
    expected = {(name, "npu/aclnn") for name in operators}
    assert passed >= (expected if chip == "A3" else expected - {("add_rms_norm", "npu/aclnn")})


def test_ascend950_runs_what_is_documented_for_it() -> None:
    chosen, reasons = choices("950", "9.1.0")
    assert chosen["sparse_mla_attention"] == "npu/aclnn"
    for name, vendors in (("expert_mlp", "npu_grouped_matmul"), ("route_experts", "npu_moe_gating_top_k")):
        assert chosen[name].startswith("torch/")
        assert f"{vendors} is documented for A2, A3, this chip is 950" in reasons[name]


def test_an_older_cann_goes_step_by_step() -> None:
    chosen, reasons = choices("A2", "8.5.0")
    assert chosen["mla_prologue_into_cache"] == "npu/aclnn_steps"
    assert "npu_mla_prolog_v3 wants CANN 9.0 or later, this is 8.5.0" in reasons["mla_prologue_into_cache"]
    assert chosen["sparse_mla_attention"] == "npu/aclnn"


def test_the_device_says_what_it_is() -> None:
    assert machine.TITLE in probe("npu").details["device"]
    assert machine.TITLE in json.dumps(device_description("npu"))


def test_no_evidence_is_made_of_it(tmp_path: Any) -> None:
    with pytest.raises(ParityError, match="evidence is of hardware only"):
        write_evidence({"device": device_description("npu")}, tmp_path)
    assert not list(tmp_path.iterdir())
