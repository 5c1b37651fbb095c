"""`glm5-port probe`: two real ranks with gloo, the file that plan reads, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm5_port.parallel.hardware import MEASURED
from glm5_port.parallel.topology import find_hardware

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glm5_port", "probe")


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLM5_PORT")} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_two_ranks_write_a_topology_that_plan_reads(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    done = start("--output", str(own), "--seconds", "0.02", "--large", "1 MiB", "--backend", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # rank 0 alone speaks
    assert (report["machines"], report["ranks"], report["library"]) == (1, 2, "gloo")
    assert report["files"] == [str(own), str(tmp_path / "mine-chip.yaml")]
    (node,) = report["links"]
    assert all(min(both) > 0 for both in node["seconds"].values())
    topology = find_hardware(str(own))
    assert topology.levels[0].rate(2, "send") == pytest.approx(node["bandwidth"]["send"], rel=1e-3)
    assert topology.levels[0].confidence == topology.chip.memory_bandwidth.confidence == MEASURED


def test_an_error_on_every_rank_before_anything_is_measured(tmp_path: Path) -> None:
    done = start("--output", str(tmp_path / "no" / "mine.yaml"))
    assert done.returncode != 0
    assert done.stderr.count("expected a file ending in .yaml in a directory that exists") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [None, "1"])
def test_without_other_ranks_there_is_nothing_to_measure(
    command_line, monkeypatch: pytest.MonkeyPatch, world: str | None
) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if world is not None:
            monkeypatch.setenv(name, world)
    done = command_line("probe", "--output", "mine.yaml")
    assert (done.code, done.out) == (2, "")
    assert "probe measures links between ranks" in done.err
    assert "torchrun --nnodes 2" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "mine.json"), "expected a file ending in .yaml"),
        (("--output", "mine.yaml", "--chip", "h2000"), "is no chip known here; did you mean h200"),
        (("--output", "mine.yaml", "--small", "64"), "has no unit"),
        (("--output", "mine.yaml", "--small", "1 MiB", "--large", "2 MiB"), "at least four times as many"),
    ],
)
def test_bad_input_is_one_clear_error(
    command_line, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command_line("probe", "--backend", "cpu", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
