"""The commands that start a plan, for each machine, in an engine's own words. What it cannot express is refused.

Versions: vllm 0.33.0, sglang 0.5.23, vllm-ascend 0.23.0; torchrun starts this library. Every option and value is checked against
the engines' own parsers by tests/parallel/test_recipes.py. $NODE0, $NODE1, ... stand for the addresses of the machines, $NIC for
the interface between them, $CHECKPOINT and $PROMPT for what the user has.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from glm5_port.config import Glm5Config
from glm5_port.errors import PlanError
from glm5_port.parallel.cost.memory import RUNTIME
from glm5_port.parallel.engines import TORCHRUN, find_engine
from glm5_port.parallel.plan import ALL_GATHER, ALL_TO_ALL, DECODE, HIERARCHICAL, MIXED, PREFILL, Layout, ParallelPlan, Role
from glm5_port.parallel.topology import Topology

MASTER_PORT, DATA_PORT, SGLANG_PORT, SERVE_PORT = 29501, 13345, 20000, 8000
PUBLISHED = {"bf16": "zai-org/{}", "fp8": "zai-org/{}-FP8", "w4a8": "Eco-Tech/{}-w4a8", "int4": "$CHECKPOINT"}
"""Checkpoints of a release by kind of weights; INT4 is one's own export (docs/export.md)."""
COLLECTIVE_INTERFACES = {"npu": ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"), "cpu": ("GLOO_SOCKET_IFNAME",)}
"""Variables that name the interface between machines; NCCL's and its kin's elsewhere."""
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
"""Variables that show a process some devices of its machine."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start.

    Attributes:
        node: place of the machine.
        role: "mixed", "prefill" or "decode"; replica counts within it.
        environment: variables to set.
        arguments: the command line.
    """

    node: int
    role: str
    replica: int
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """As a shell understands it; variables stay variables."""
        words = [*(f"{name}={_quoted(value)}" for name, value in self.environment.items()), *map(_quoted, self.arguments)]
        return " ".join(words)


def _quoted(word: str) -> str:
    return word if word.startswith("$") else shlex.quote(word)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process of a replica runs.

    Attributes:
        node: place of the machine in the deployment.
        index: place of the machine in the replica.
        nodes: machines of the replica.
        first: place of the replica's first machine.
        devices: of the machine, where replicas share one; empty for all.
    """

    node: int
    index: int
    nodes: int
    first: int
    devices: tuple[int, ...] = ()


def emit(plan: ParallelPlan, topology: Topology, config: Glm5Config, engine: str) -> list[Command]:
    """The commands of every machine.

    Args:
        plan: what to start.
        topology: the hardware that it was made for.
        config: the model.
        engine: "vllm", "sglang", "vllm-ascend" or "torchrun".

    Raises:
        PlanError: the engine cannot express the plan; every reason.
    """
    rules = find_engine(engine)
    reasons = []
    for role in plan.roles:
        found = rules.reasons(topology, role.layout, role.name, plan.weights, config)
        reasons += [f"{role.name}: {reason}" for reason in found]
    if plan.kv_format == "int8" and engine not in ("vllm-ascend", TORCHRUN):
        reasons.append(f"{engine} has no cache in the int8 format of this library")
    if plan.kv_format == "fp8" and engine == "vllm-ascend":
        reasons.append("vllm-ascend has no FP8 cache on this hardware")
    if reasons:
        raise PlanError("\n  ".join([f"{engine} {rules.version} cannot express this plan", *reasons]))
    write: dict[str, Callable[..., Command]] = {
        "vllm": _vllm,
        "sglang": _sglang,
        "vllm-ascend": functools.partial(_vllm_ascend, config),
        TORCHRUN: _torchrun,
    }
    commands = []
    node = 0
    for role in plan.roles:
        for replica, places in enumerate(_places(plan, role, node)):
            commands += [write[engine](plan, role, place, replica, topology) for place in places]
        node += -(-role.ranks // plan.node_devices)
    return commands


def _places(plan: ParallelPlan, role: Role, first: int) -> Iterator[list[Place]]:
    """The processes of each replica of a role, whose machines begin at `first`."""
    ranks, size = role.layout.ranks, plan.node_devices
    if ranks >= size:
        nodes = ranks // size
        for replica in range(role.replicas):
            begin = first + replica * nodes
            yield [Place(begin + index, index, nodes, begin) for index in range(nodes)]
    else:
        share = size // ranks
        for replica in range(role.replicas):
            node, slot = first + replica // share, replica % share
            yield [Place(node, 0, 1, node, tuple(range(slot * ranks, (slot + 1) * ranks)))]


def _utilisation(topology: Topology) -> str:
    capacity = topology.chip.memory.value or 1.0
    return f"{min(0.95, (capacity - RUNTIME) / capacity):.2f}"


def checkpoint(plan: ParallelPlan) -> str:
    """What the engine loads: a published checkpoint, or the path that the plan was made for."""
    return PUBLISHED[plan.weights].format(plan.model) if plan.model.startswith("GLM-") else plan.model


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))


def _network(nodes: int, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, "$NIC") if nodes > 1 else {}


# --- vllm -----------------------------------------------------------------------------------------------------------------------

_VLLM_EXCHANGE = {ALL_GATHER: "allgather_reducescatter", ALL_TO_ALL: "deepep_low_latency", HIERARCHICAL: "deepep_high_throughput"}


def _vllm_parallel(layout: Layout, place: Place) -> list[str]:
    """Sizes and machines, in words that both vllm and vllm-ascend have."""
    arguments = ["-tp", str(layout.tensor), "-pp", str(layout.pipeline)]
    if layout.data > 1:
        local = layout.data // place.nodes
        arguments += ["-dp", str(layout.data), "-dpl", str(local), "-dpa", f"$NODE{place.first}", "-dpp", str(DATA_PORT)]
        arguments += ["-dpr", str(place.index * local), "--headless"] if place.index else []
    elif place.nodes > 1:
        arguments += ["--nnodes", str(place.nodes), "--node-rank", str(place.index), "--master-addr", f"$NODE{place.first}"]
        arguments += ["--master-port", str(MASTER_PORT), "--distributed-executor-backend", "mp"]
        arguments += ["--headless"] if place.index else []
    arguments += ["-dcp", str(layout.decode_context)] if layout.decode_context > 1 else []
    arguments += ["-ep"] if layout.expert > 1 else []
    return arguments


def _vllm_limits(plan: ParallelPlan, topology: Topology) -> list[str]:
    return [
        "--max-model-len",
        str(plan.max_context),
        "--max-num-seqs",
        str(plan.max_sequences),
        "--max-num-batched-tokens",
        str(plan.chunk),
        "--gpu-memory-utilization",
        _utilisation(topology),
    ]


def _vllm(plan: ParallelPlan, role: Role, place: Place, replica: int, topology: Topology) -> Command:
    layout = role.layout
    arguments = ["vllm", "serve", checkpoint(plan), *_vllm_parallel(layout, place)]
    environment = _network(place.nodes, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    if layout.expert > 1 and layout.exchange in _VLLM_EXCHANGE:
        arguments += ["--all2all-backend", _VLLM_EXCHANGE[layout.exchange]]
    if layout.redundant_experts:
        arguments += ["--enable-eplb", "--eplb-config", _json({"num_redundant_experts": layout.redundant_experts})]
    if layout.context > 1:
        arguments += ["-pcp", str(layout.context)]
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    arguments += ["--enable-dbo"] if layout.overlap else []
    arguments += ["--kv-cache-dtype", "fp8"] if plan.kv_format == "fp8" else []
    if layout.drafts:
        arguments += ["--speculative-config", _json({"method": "mtp", "num_speculative_tokens": layout.drafts})]
    if role.name != MIXED:
        arguments += ["--kv-transfer-config", _json({"kv_connector": "NixlConnector", "kv_role": "kv_both"})]
    if place.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
        arguments += ["--port", str(SERVE_PORT + replica)]
    return Command(place.node, role.name, replica, (*arguments, *_vllm_limits(plan, topology)), environment)


HCCL_DEFAULT = 200
"""Megabytes of a communicator's buffer where HCCL_BUFFSIZE is not set."""


def hccl_buffer(layout: Layout, rows: int, config: Glm5Config) -> int:
    """Megabytes that Ascend's fused dispatch and combine want of each communicator; smaller ones end in errors of memory access.

    2 * (rows * ranks * min(experts of a rank, top k) * hidden size * 2 bytes + 2 MiB), the vendor's formula.

    Args:
        layout: of the role; its expert groups are the ranks.
        rows: tokens of a step in one attention group.
        config: of the model.
    """
    experts = -(-(config.n_routed_experts + layout.redundant_experts) // layout.expert)
    sent = rows * layout.expert * min(experts, config.num_experts_per_tok) * config.hidden_size * 2
    return max(HCCL_DEFAULT, -(-2 * (sent + 2 * 2**20) // 2**20))


def _vllm_ascend(config: Glm5Config, plan: ParallelPlan, role: Role, place: Place, replica: int, topology: Topology) -> Command:
    layout = role.layout
    if layout.context > 1:  # its tensor group shares the prompts
        layout = Layout(**{**_plain(layout), "tensor": layout.context, "context": 1})
    arguments = ["vllm", "serve", checkpoint(plan), *_vllm_parallel(layout, place)]
    environment = {"HCCL_OP_EXPANSION_MODE": "AIV"} | _network(
        place.nodes, "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"
    )
    if layout.expert > 1 and {ALL_TO_ALL, HIERARCHICAL} & {layout.exchange, layout.prefill_exchange}:
        rows = plan.max_sequences * (1 + layout.drafts)
        environment["HCCL_BUFFSIZE"] = str(hccl_buffer(layout, rows, config))
    extra: dict[str, Any] = {}
    if role.layout.context > 1:
        extra["enable_dsa_cp"] = True
    if HIERARCHICAL in (layout.exchange, layout.prefill_exchange):
        extra["enable_mc2_hierarchy_comm"] = True
        environment |= {"HCCL_INTRA_ROCE_ENABLE": "1"} if topology.chip.generation == "a2" else {}
    if place.nodes > 1 and topology.chip.generation == "a3" and len(topology.levels) == 2:
        environment |= {"HCCL_LOGIC_SUPERPOD_ID": str(place.node), "VLLM_ASCEND_ENABLE_FUSED_MC2": "0"}
    if plan.kv_format == "int8":
        extra |= {"enable_sparse_sfa_c8": True, "enable_sparse_li_c8": True}
    if layout.redundant_experts:
        extra["eplb_config"] = {"dynamic_eplb": True, "num_redundant_experts": layout.redundant_experts}
    arguments += ["--quantization", "ascend"] if plan.weights == "w4a8" else []
    if layout.drafts:
        drafts = {"method": "deepseek_mtp", "num_speculative_tokens": layout.drafts, "enforce_eager": True}
        arguments += ["--speculative-config", _json(drafts)]
    if role.name != PREFILL:
        arguments += ["--compilation-config", _json({"cudagraph_mode": "FULL_DECODE_ONLY"})]
    if role.name != MIXED:
        kind = "kv_producer" if role.name == PREFILL else "kv_consumer"
        arguments += ["--kv-transfer-config", _json({"kv_connector": "MooncakeConnectorV1", "kv_role": kind})]
    if extra:
        arguments += ["--additional-config", _json(extra)]
    if place.devices:
        environment["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
        arguments += ["--port", str(SERVE_PORT + replica)]
    return Command(place.node, role.name, replica, (*arguments, *_vllm_limits(plan, topology)), environment)


def _plain(layout: Layout) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in layout.__dataclass_fields__}


# --- sglang ---------------------------------------------------------------------------------------------------------------------


def _sglang(plan: ParallelPlan, role: Role, place: Place, replica: int, topology: Topology) -> Command:
    """Tensor size counts all ranks of a stage: attention groups and shared prompts lie inside it."""
    layout, npu = role.layout, topology.chip.backend == "npu"
    arguments = ["python3", "-m", "sglang.launch_server", "--model-path", checkpoint(plan), "--tp-size", str(layout.stage_ranks)]
    environment = _network(place.nodes, "GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME" if npu else "NCCL_SOCKET_IFNAME")
    arguments += ["--pp-size", str(layout.pipeline)] if layout.pipeline > 1 else []
    if layout.pipeline > 1:
        environment["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, layout.stages))
    arguments += ["--attn-dp-size", str(layout.data)] if layout.data > 1 else []
    if layout.context > 1:
        arguments += ["--attn-cp-size", str(layout.context), "--enable-prefill-cp", "--cp-strategy", "interleave"]
    arguments += ["--dcp-size", str(layout.decode_context)] if layout.decode_context > 1 else []
    arguments += ["--ep-size", str(layout.expert)] if layout.expert > 1 else []
    if layout.exchange in (ALL_TO_ALL, HIERARCHICAL):
        modes = {(ALL_TO_ALL, HIERARCHICAL): "auto"}
        pair = (layout.exchange, layout.prefill_exchange or layout.exchange)
        mode = modes.get(pair, "low_latency" if layout.exchange == ALL_TO_ALL and role.name == DECODE else "normal")
        arguments += ["--moe-a2a-backend", "deepep", "--deepep-mode", mode]
    if layout.redundant_experts:
        arguments += ["--enable-eplb", "--ep-num-redundant-experts", str(layout.redundant_experts)]
    arguments += ["--enable-two-batch-overlap"] if layout.overlap else []
    arguments += ["--kv-cache-dtype", "fp8_e4m3"] if plan.kv_format == "fp8" else []
    if layout.drafts:
        arguments += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(layout.drafts)]
        arguments += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(layout.drafts + 1)]
    if role.name != MIXED:
        arguments += ["--disaggregation-mode", role.name, "--disaggregation-transfer-backend", "ascend" if npu else "mooncake"]
    if npu:
        arguments += ["--device", "npu", "--attention-backend", "ascend"]
        arguments += ["--quantization", "modelslim"] if plan.weights == "w4a8" else []
        environment["HCCL_OP_EXPANSION_MODE"] = "AIV"
    if place.nodes > 1:
        arguments += ["--nnodes", str(place.nodes), "--node-rank", str(place.index)]
        arguments += ["--dist-init-addr", f"$NODE{place.first}:{SGLANG_PORT}"]
    if place.devices:
        environment["ASCEND_RT_VISIBLE_DEVICES" if npu else "CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
        arguments += ["--port", str(SERVE_PORT + replica)]
    arguments += ["--context-length", str(plan.max_context), "--max-running-requests", str(plan.max_sequences * layout.data)]
    arguments += ["--chunked-prefill-size", str(plan.chunk * layout.data), "--mem-fraction-static", _utilisation(topology)]
    return Command(place.node, role.name, replica, tuple(arguments), environment)


# --- torchrun -------------------------------------------------------------------------------------------------------------------


def _torchrun(plan: ParallelPlan, role: Role, place: Place, replica: int, topology: Topology) -> Command:
    """This library, one replica at a time. $PLAN is where the plan was saved (--save)."""
    ranks = role.layout.ranks // place.nodes
    arguments = ["torchrun", "--nproc-per-node", str(ranks), "--nnodes", str(place.nodes)]
    if place.nodes > 1:
        arguments += ["--node-rank", str(place.index), "--master-addr", f"$NODE{place.first}"]
    if place.nodes > 1 or replica:
        arguments += ["--master-port", str(MASTER_PORT + replica)]
    source = plan.model if not plan.model.startswith("GLM-") else "$CHECKPOINT"
    arguments += ["-m", "glm5_port", "generate", source, "--plan", "$PLAN"]
    arguments += ["--role", role.name] if role.replicas > 1 else []
    arguments += ["--backend", topology.chip.backend, "--prompt", "$PROMPT"]
    interfaces = COLLECTIVE_INTERFACES.get(topology.chip.backend, ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
    environment = _network(place.nodes, *interfaces)
    if place.devices and topology.chip.backend in VISIBLE_DEVICES:
        environment[VISIBLE_DEVICES[topology.chip.backend]] = ",".join(map(str, place.devices))
    return Command(place.node, role.name, replica, tuple(arguments), environment)
