"""The command line under torchrun: a plan generates what one process does, and refusals come on every rank before any weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glm5_port import flags
from glm5_port.parallel.plan import Layout, ParallelPlan, Role
from tests.model.int4_checkpoints import int4_export
from tests.model.models import prompt

IDS = ",".join(map(str, prompt(11)))
LIMIT = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT4 experts and INT4 everything else, with heads for two ranks."""
    return int4_export(
        tmp_path_factory.mktemp("int4"),
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=64,
    )


def save_plan(folder: Path, *layouts: Layout, **changes: Any) -> Path:
    names = ("mixed",) if len(layouts) == 1 else ("prefill", "decode")
    plan = ParallelPlan(
        **{
            "model": "GLM-5.2", "hardware": "here", "node_devices": 2, "weights": "int4", "kv_format": "plain",
            "roles": tuple(Role(name=name, layout=layout) for name, layout in zip(names, layouts, strict=True)),
            "max_context": 64, "max_sequences": 1, "chunk": 64, **changes,
        }
    )  # fmt: skip
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(flags.PREFIX)}
    return clean | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def torchrun(ranks: int, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone -m glm5_port generate ...` on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "glm5_port"]
    command += ["generate", *arguments, "--backend", "cpu", "--ids", IDS, "--max-new-tokens", "5"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=LIMIT, check=False)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, expert=2),
        pytest.param(Layout(data=2, expert=2, exchange="deduplicated", drafts=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_plan_generates_what_one_process_does(checkpoint: Path, tmp_path: Path, layout: Layout) -> None:
    plan = save_plan(tmp_path, layout)
    done = torchrun(2, str(checkpoint), "--plan", str(plan), "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    alone = [sys.executable, "-m", "glm5_port", "generate", str(checkpoint), "--backend", "cpu", "--ids", IDS, "--json"]
    alone += ["--max-new-tokens", "5", "--dtype", "float32", "--max-context", "64"]
    expected = json.loads(subprocess.run(alone, capture_output=True, text=True, env=environment(), check=True).stdout)
    assert told["new_ids"] == expected["new_ids"]
    assert told["plan"]["ranks"] == 2 and told["plan"]["layout"] == str(layout)
    assert expected["plan"] is None


def test_without_torchrun_and_with_two_roles_it_says_how() -> None:
    from glm5_port.errors import PlanError
    from glm5_port.parallel.launch import role_to_run

    two = ParallelPlan(
        model="GLM-5", hardware="here", node_devices=2, weights="int4", kv_format="plain", max_context=64, max_sequences=1,
        chunk=64,
        roles=(
            Role(name="prefill", layout=Layout(context=2, expert=2, exchange="all_gather")),
            Role(name="decode", layout=Layout(data=2, expert=2, exchange="all_gather"), replicas=2),
        ),
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"(?s)one replica of one role at a time.*--role prefill or --role decode.*\(2, 2\)"):
        role_to_run(two, None, 6)
    assert role_to_run(two, "prefill", 2).layout.context == 2
    with pytest.raises(PlanError, match="one replica of decode is for 2 ranks, and 4 were started"):
        role_to_run(two, "decode", 4)
    with pytest.raises(PlanError, match="no role 'prefil'; did you mean prefill"):
        role_to_run(two, "prefil", 2)


def ranks_by_hand(count: int, arguments: list[list[str]], tmp_path: Path, **more: str) -> list[tuple[int, str, float]]:
    """Ranks without an agent that ends them: (exit code, stderr, seconds) of each."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun, started = time.monotonic(), []
    for rank in range(count):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", arguments[rank][0], *arguments[rank][1:]]
        log = (tmp_path / f"log{rank}").open("w")
        given = environment(MASTER_PORT=str(port), **ranks, **more)
        started.append(subprocess.Popen(command, stderr=log, stdout=log, env=given))
    found = []
    for rank, process in enumerate(started):
        code = process.wait(LIMIT)
        found.append((code, (tmp_path / f"log{rank}").read_text(), time.monotonic() - begun))
    return found


def test_another_number_of_processes_is_refused_on_every_rank_before_weights(checkpoint: Path, tmp_path: Path) -> None:
    plan = save_plan(tmp_path, Layout(data=4, expert=4, exchange="all_gather"))
    command = [RUN, "generate", str(checkpoint), "--plan", str(plan), "--backend", "cpu", "--ids", IDS]
    for code, text, _ in ranks_by_hand(2, [command, command], tmp_path):
        assert code == 2
        assert text.startswith("this plan is for 4 ranks, and 2 were started\n  mixed: 1 x DP4, EP4, all_gather\n  Start 4 ranks")
        assert "reading tensors" not in text


RUN = "import sys; from glm5_port.cli.app import main; main(sys.argv[1:])"
DIES = """
import os, sys
from glm5_port.model.decoder import Glm5Model
inner, steps = Glm5Model.step, []
def step(*arguments):
    steps.append(1)
    if len(steps) == 3:
        {what}
    return inner(*arguments)
Glm5Model.step = step
from glm5_port.cli.app import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os._exit(9)", "No rank left a message: it was killed, or it hangs"),
        ("raise ValueError('out of memory')", "rank 1 stopped: ValueError: out of memory"),
        ("__import__('time').sleep(30)", "No rank left a message: it was killed, or it hangs"),
    ],
    ids=["killed", "raises", "hangs"],
)
def test_a_lost_rank_ends_the_others_with_a_message_in_time(checkpoint: Path, tmp_path: Path, what: str, said: str) -> None:
    plan = save_plan(tmp_path, Layout(tensor=2, expert=2))
    options = ["generate", str(checkpoint), "--plan", str(plan), "--backend", "cpu", "--ids", IDS, "--max-new-tokens", "6"]
    options += ["--timeout", "10"]
    (code, text, seconds), _ = ranks_by_hand(2, [[RUN, *options], [DIES.format(what=what), *options]], tmp_path)
    assert code == 2, text
    assert "rank 0 of 2: another rank stopped or did not answer" in text
    assert said in text
    assert seconds < 60


@pytest.mark.slow
def test_ranks_with_other_plans_or_prompts_stop(checkpoint: Path, tmp_path: Path) -> None:
    plan = save_plan(tmp_path, Layout(tensor=2, expert=2))
    (tmp_path / "other").mkdir()
    other = save_plan(tmp_path / "other", Layout(tensor=2, expert=2, exchange="all_gather"))
    base = ["generate", str(checkpoint), "--backend", "cpu", "--max-new-tokens", "2", "--timeout", "20"]
    for difference, options in (
        ("plan", [["--plan", str(plan), "--ids", IDS], ["--plan", str(other), "--ids", IDS]]),
        ("prompt", [["--plan", str(plan), "--ids", IDS], ["--plan", str(plan), "--ids", "1,2"]]),
    ):
        for code, text, _ in ranks_by_hand(2, [[RUN, *base, *each] for each in options], tmp_path):
            assert code == 2, text
            assert f"ranks differ in: {difference}\n  rank 0: " in text
