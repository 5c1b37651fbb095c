"""Commands for engines: every option and value is one that the engine's own parser declares, and ranks add up."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from glm5_port.errors import PlanError
from glm5_port.parallel.planner import ask
from glm5_port.parallel.recipes import Command, emit
from tests.parallel.freeze_engine_flags import VERSIONS
from tests.parallel.questions import question, two_a2_servers

FROZEN = json.loads((Path(__file__).parent / "engine_flags.json").read_text())
ASKED = [
    ("vllm", "hgx-h200", 1, {"concurrency": 8}),
    ("vllm", "hgx-h200", 2, {"concurrency": 64}),
    ("vllm", "hgx-h800", 4, {"concurrency": 512}),
    ("vllm", "hgx-a100", 2, {"concurrency": 1, "weights": "int4", "kv_format": "plain"}),
    ("vllm", "pcie-rtx-pro-6000", 2, {"concurrency": 16, "weights": "int4", "kv_format": "plain"}),
    ("sglang", "hgx-h200", 2, {"concurrency": 64}),
    ("sglang", "hgx-h20-141", 4, {"concurrency": 256}),
    ("sglang", "cloudmatrix384", 4, {"concurrency": 512}),
    ("vllm-ascend", "atlas-800-a2", 2, {"concurrency": 32}),
    ("vllm-ascend", "atlas-800-a2", 4, {"concurrency": 256}),
    ("vllm-ascend", "atlas-800-a3", 1, {"concurrency": 16}),
    ("vllm-ascend", "atlas-800-a3", 4, {"concurrency": 256}),
]


def commands(engine: str, hardware: str, machines: int, changes: dict) -> tuple[object, list[Command]]:
    asked = question(hardware, machines, engine=engine, **changes)
    answer = ask(asked, model="GLM-5", with_flips=False)
    return answer, emit(answer.plan, asked.topology, asked.config, engine)


def options(command: Command) -> dict[str, str | None]:
    """Option -> value."""
    words = shlex.split(" ".join(shlex.quote(word) for word in command.arguments))
    first = 3 if words[:2] == ["vllm", "serve"] else words.index("sglang.launch_server") + 1
    found: dict[str, str | None] = {}
    for place in range(first, len(words)):
        if words[place].startswith("-") and not re.fullmatch(r"-\d+", words[place]):
            following = words[place + 1] if place + 1 < len(words) else "-"
            assert words[place] not in found, f"{words[place]} twice"
            found[words[place]] = None if following.startswith("-") else following
    return found


@pytest.mark.parametrize(("engine", "hardware", "machines", "changes"), ASKED)
def test_every_option_and_value_is_the_engines_own(engine: str, hardware: str, machines: int, changes: dict) -> None:
    _, found = commands(engine, hardware, machines, changes)
    declared = FROZEN[engine]
    for command in found:
        for option, value in options(command).items():
            assert option in declared["options"], f"{engine} has no {option}"
            if choices := declared["options"][option]:
                assert value in choices
        additional = options(command).get("--additional-config")
        if additional is not None:
            assert set(json.loads(additional)) <= set(declared["additional_config"])
        for name in command.environment:
            assert not name.startswith("VLLM_ASCEND_") or name in declared["environment"]


@pytest.mark.parametrize(("engine", "hardware", "machines", "changes"), ASKED)
def test_sizes_multiply_to_the_ranks_of_the_plan(engine: str, hardware: str, machines: int, changes: dict) -> None:
    answer, found = commands(engine, hardware, machines, changes)
    names = ("--tp-size", "--pp-size") if engine == "sglang" else ("-tp", "-pp", "-dp", "-pcp")
    started = 0
    for command in found:
        given = options(command)
        if "--headless" not in given and given.get("--node-rank", "0") == "0":
            ranks = 1
            for name in names:
                ranks *= int(given.get(name) or 1)
            started += ranks
    assert started == answer.plan.ranks
    assert {command.node for command in found} == set(range(machines))


def test_versions_are_those_of_the_issue() -> None:
    assert {name: FROZEN[name]["version"] for name in FROZEN} == VERSIONS
    assert VERSIONS == {"vllm": "0.33.0", "sglang": "0.5.23", "vllm-ascend": "0.23.0"}
    for engine, option in (("vllm", "--all2all-backend"), ("sglang", "--attn-dp-size"), ("vllm-ascend", "--additional-config")):
        assert option in FROZEN[engine]["options"]
    assert "enable_mc2_hierarchy_comm" in FROZEN["vllm-ascend"]["additional_config"]
    assert "--no-such-option" not in FROZEN["vllm"]["options"]


def test_two_910b_servers_on_roce_get_a_vllm_ascend_command() -> None:
    _, (first, second) = commands("vllm-ascend", "atlas-800-a2", 2, {"concurrency": 32})
    assert first.arguments[:3] == ("vllm", "serve", "Eco-Tech/GLM-5-w4a8")
    assert options(first)["--quantization"] == "ascend"
    assert "--headless" not in first.arguments and "--headless" in second.arguments
    assert first.environment["HCCL_SOCKET_IFNAME"] == "$NIC"
    assert "HCCL_SOCKET_IFNAME=$NIC " in first.text()
    assert "$NODE0" in second.text() and "'$NODE0'" not in second.text()


def test_hierarchical_exchange_asks_for_it() -> None:
    asked, plan = two_a2_servers(max_sequences=2)
    for command in emit(plan, asked.topology, asked.config, "vllm-ascend"):
        assert json.loads(options(command)["--additional-config"] or "")["enable_mc2_hierarchy_comm"] is True
    with pytest.raises(PlanError, match="no exchange that is hierarchical in decode and all_gather in prefill"):
        emit(plan, asked.topology, asked.config, "sglang")


def test_what_an_engine_cannot_express_is_refused_with_reasons() -> None:
    asked = question("hgx-h200", 1, engine="torchrun", weights="int4")
    answer = ask(asked, model="GLM-5", with_flips=False)
    with pytest.raises(PlanError, match="cannot express this plan\n  mixed: vllm-ascend 0.23.0 does not run on cuda"):
        emit(answer.plan, asked.topology, asked.config, "vllm-ascend")
    with pytest.raises(PlanError, match="did you mean vllm"):
        emit(answer.plan, asked.topology, asked.config, "vlm")


def test_torchrun_starts_this_library_on_each_machine() -> None:
    from glm5_port.parallel.plan import Layout, ParallelPlan, Role, even

    def plan(**changes: object) -> ParallelPlan:
        values = {"model": "GLM-5", "hardware": "atlas-800-a2", "node_devices": 8, "weights": "int4", "kv_format": "plain"}
        role = Role(name="mixed", layout=even(Layout(data=16, expert=16, exchange="all_gather"), 78))
        return ParallelPlan(**{**values, "roles": (role,), "max_context": 512, "max_sequences": 2, "chunk": 512, **changes})

    asked = question("atlas-800-a2", 2)
    first, second = emit(plan(), asked.topology, asked.config, "torchrun")
    assert first.text() == (
        "GLOO_SOCKET_IFNAME=$NIC HCCL_SOCKET_IFNAME=$NIC torchrun --nproc-per-node 8 --nnodes 2 --node-rank 0 "
        "--master-addr $NODE0 --master-port 29501 -m glm5_port generate $CHECKPOINT --plan $PLAN --backend npu --prompt $PROMPT"
    )
    assert "--node-rank 1 --master-addr $NODE0" in second.text()
    with pytest.raises(PlanError, match="torchrun loads bf16, int4 on npu, not w4a8"):
        emit(plan(weights="w4a8"), asked.topology, asked.config, "torchrun")
    overlapping = Layout(data=16, expert=16, exchange="all_to_all", overlap=True, stages=(78,))
    with pytest.raises(PlanError, match="no two micro-batches"):
        emit(plan(roles=(Role(name="mixed", layout=overlapping),)), asked.topology, asked.config, "torchrun")
    replicas = Role(name="mixed", layout=even(Layout(tensor=8, expert=8), 78), replicas=2)
    commands = emit(plan(roles=(replicas,)), asked.topology, asked.config, "torchrun")
    assert [command.node for command in commands] == [0, 1]
    assert all("--nproc-per-node 8 --nnodes 1" in command.text() and "--role mixed" in command.text() for command in commands)
