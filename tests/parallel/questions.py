"""Questions to the planner, for tests."""

from __future__ import annotations

from typing import Any

from glm5_port.config import released
from glm5_port.parallel.cost.service import Workload
from glm5_port.parallel.engines import find_engine, serving_engines
from glm5_port.parallel.plan import Layout, ParallelPlan, Role, even
from glm5_port.parallel.planner import rank
from glm5_port.parallel.search import Candidate, Dropped, Pins, Question
from glm5_port.parallel.topology import find_hardware

GLM_5, GLM_5_2 = released("GLM-5"), released("GLM-5.2")


def question(hardware: str, machines: int = 1, **changes: Any) -> Question:
    """4,096 tokens in, 1,024 out, FP8 on NVIDIA's, W4A8 on Ascend, 32 at once, unless said otherwise."""
    topology = find_hardware(hardware)
    engine = changes.pop("engine", None)
    ascend = topology.chip.backend == "npu"
    values: dict[str, Any] = {
        "config": GLM_5,
        "topology": topology,
        "devices": machines * topology.node_devices,
        "weights": "w4a8" if ascend else "fp8",
        "kv_format": "plain" if ascend else "fp8",
        "work": Workload(4096, 1024, 8192),
        "concurrency": 32,
        "tpot": None,
        "ttft": None,
        "engines": tuple(serving_engines(topology)) if engine is None else (find_engine(engine),),
        "pins": Pins(),
    }
    return Question(**(values | changes))


def best(asked: Question) -> Candidate:
    """The winner."""
    return rank(asked, asked.topology, Dropped())[0]


def decoding(candidate: Candidate) -> Layout:
    """The layout that decodes."""
    return candidate.roles[-1].layout


def two_a2_servers(max_sequences: int) -> tuple[Question, ParallelPlan]:
    """Two servers of eight A2 cards that exchange hierarchically in decode, by gathering in prefill, in 8 bits."""
    layout = Layout(data=16, expert=16, exchange="hierarchical", prefill_exchange="all_gather", exchange_bits=8)
    plan = ParallelPlan(
        model="GLM-5",
        hardware="atlas-800-a2",
        node_devices=8,
        weights="w4a8",
        kv_format="plain",
        roles=(Role(name="mixed", layout=even(layout, 78)),),
        max_context=5120,
        max_sequences=max_sequences,
        chunk=8192,
    )
    return question("atlas-800-a2", 2), plan
