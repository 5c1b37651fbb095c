"""`glm5-port plan`: text, JSON, saved plans, commands, pictures, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm5_port.parallel.hardware import DATA
from glm5_port.parallel.plan import ParallelPlan

TWO_910B = ("plan", "--model", "GLM-5.1", "--hardware", "atlas-800-a2", "--nodes", "2", "--concurrency", "32")


def test_two_910b_servers_in_one_call(command_line, tmp_path: Path) -> None:
    """A plan, its reasons, the flip curve and a vllm-ascend command."""
    picture = tmp_path / "plan.svg"
    done = command_line(*TWO_910B, "--emit", "vllm-ascend", "--plot", str(picture))
    assert done.code == 0, done.err
    for part in (
        "weights w4a8, cache plain, on 16 x Huawei Ascend 910B3",
        "plan: 1 x (",
        "vllm-ascend: can run it",
        "torchrun: cannot: ",
        "trust the ranking and the ratios. Absolute figures are estimates",
        "ranking",
        "decode step: ",
        "routed experts",
        "why not ",
        "left out\n  1 x ",
        " a device\n",
        "vllm-ascend sends 16 bits in its all_gather exchange (",
        "what would change the choice",
        "cluster links (25 GB/s a device): at ",
        "vllm serve Eco-Tech/GLM-5.1-w4a8",
    ):
        assert part in done.out
    text = picture.read_text()
    assert "<svg" in text
    assert "cluster links" in text


def test_json_is_whole_and_alone(command_line, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    done = command_line(*TWO_910B, "--json", "--emit", "vllm-ascend", "--save", str(saved))
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert ParallelPlan.from_dict(data["plan"]) == ParallelPlan.load(saved)
    assert data["plan"]["roles"][0]["layout"]["stages"] == [78]
    assert data["calibrated"] is False and data["band"]["measured_over_estimated"] == [0.6, 1.6]
    assert [each["relative_rate"] for each in data["ranking"]][0] == 1
    for step in ("prefill", "decode"):
        assert sum(term["seconds"] for term in data[step]["terms"]) == pytest.approx(data[step]["seconds"])
        assert all(term["formula"] and term["source"] for term in data[step]["terms"])
    assert all(missing > 0 for missing in data["left_out"]["short_of_memory"].values())
    assert {flip["level"] for flip in data["flips"]} == {"node", "cluster"}
    assert data["runs_on"]["vllm-ascend"] == {"can": True, "reasons": []}
    assert data["runs_on"]["vllm"]["can"] is False
    assert len(data["commands"]) == 2
    memory = data["memory"][0]
    assert memory["cache"] == memory["capacity"] - memory["weights"] - memory["buffers"] - memory["runtime"]
    assert data["figures"]["memory_bandwidth"]["confidence"] == "unsure"


def test_a_users_own_topology_and_a_config_file(command_line, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    described = (DATA / "topologies" / "hgx-h200.yaml").read_text().replace("confidence: datasheet", "confidence: measured")
    own.write_text(described.replace("chip: h200", "calibrated: yes\nchip: h200"))
    config = tmp_path / "config.json"
    from glm5_port.config import released

    config.write_text(json.dumps(released("GLM-5.2").as_dict()))
    arguments = ("plan", "--model", str(config), "--hardware", str(own), "--tpot-ms", "30", "--ttft-ms", "3000")
    done = command_line(*arguments, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["calibrated"] is True and data["band"] is None
    assert data["ranking"][0]["tpot"] <= 0.030
    text = command_line("plan", "--model", str(config), "--hardware", str(own), "--concurrency", "8").out
    assert "on links that were measured here" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "hgx-h200", "--tp", "7", "--nodes", "7", "--concurrency", "8"), "7 does not divide 64 attention heads"),
        (("--hardware", "hgx-h20", "--concurrency", "8"), "did you mean"),
        (("--hardware", "hgx-h200"), "give either a concurrency, or targets"),
        (("--hardware", "hgx-h200", "--concurrency", "8", "--weights", "int3"), "weights = 'int3'"),
        (("--hardware", "hgx-h200", "--concurrency", "8", "--engine", "vlm"), "'vlm' is no engine; did you mean vllm"),
        (("--hardware", "hgx-h200", "--concurrency", "8", "--emit", "vllm-ascend"), "vllm-ascend 0.23.0 does not run on cuda"),
        (("--hardware", "pcie-rtx4090", "--concurrency", "1"), "GiB a device"),
        (("--hardware", "enflame-s60-8", "--concurrency", "1"), "memory_bandwidth of enflame-s60 is unknown: not published"),
        (("--hardware", "hgx-h200", "--concurrency", "8", "--plot", "plan.pdf"), "expected a file ending in .png or .svg"),
        (("--hardware", "ascend-910c", "--concurrency", "8"), "topologies with it: atlas-800-a3, cloudmatrix384"),
    ],
)
def test_bad_input_is_one_clear_error(command_line, arguments: tuple[str, ...], message: str) -> None:
    done = command_line("plan", "--model", "GLM-5", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_an_unknown_model(command_line) -> None:
    done = command_line("plan", "--model", "GLM-6", "--hardware", "hgx-h200", "--concurrency", "8")
    assert done.code == 2
    assert "is no release of GLM-5" in done.err


def test_without_matplotlib_the_plot_says_what_to_install(command_line, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = command_line(*TWO_910B, "--plot", "plan.png")
    assert done.code == 2
    assert "pip install 'glm5_port[plots]'" in done.err
    assert not Path("plan.png").exists()
