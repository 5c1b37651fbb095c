"""What each engine can express: rules with their source, as reasons why not.

    vllm          0.33.0         CUDA, ROCm
    sglang        0.5.23         CUDA, ROCm, Ascend, MUSA, Hygon
    vllm-ascend   0.23.0         Ascend
    torchrun      this library   what parallel/support.py does not refuse

Sources: the engines' own argument parsers (tests/parallel/engine_flags.json) and, where a rule is in their
code and not in a parser, the file named beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from glm5_port.config import Glm5Config
from glm5_port.errors import PlanError, did_you_mean
from glm5_port.parallel.plan import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, DECODE, DEDUPLICATED, HIERARCHICAL, MIXED, PREFILL, Layout
from glm5_port.parallel.support import WEIGHTS, layout_reasons
from glm5_port.parallel.topology import Topology

ANY_ENGINE = "any"
TORCHRUN = "torchrun"
NVLINK_EXCHANGE = ("hopper", "blackwell")
"""Generations that DeepEP runs on."""
MC2_TOKENS = 512
"""Tokens of a rank that Ascend's fused dispatch takes at once."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, and what it cannot do.

    Attributes:
        name, version: as packages have them.
        backends: of this library that it serves.
        weights: kinds of weights that it loads on a backend: backend ("" for all others) -> kinds.
        pairs: different forms of exchange (decode, prefill) that a mixed role may have; None for any.
        refusals: (topology, layout, role, phase, config) -> reasons why it cannot express a layout in a phase.
        continuous: whether requests come and go and its stages work at the same time; else a batch runs from beginning to end.
    """

    name: str
    version: str
    backends: tuple[str, ...]
    weights: dict[str, tuple[str, ...]]
    pairs: tuple[tuple[str, str], ...] | None
    refusals: Callable[[Topology, Layout, str, str, Glm5Config], list[str]]
    continuous: bool = True

    def reasons(self, topology: Topology, layout: Layout, role: str, weights: str, config: Glm5Config) -> list[str]:
        """Why it cannot run a layout; empty if it can."""
        found, chip = [], topology.chip
        if chip.backend not in self.backends:
            found.append(f"{self.name} {self.version} does not run on {chip.backend}; it runs on {', '.join(self.backends)}")
        kinds = self.weights.get(chip.backend, self.weights[""])
        if weights not in kinds:
            found.append(f"{self.name} loads {', '.join(kinds)} on {chip.backend}, not {weights}")
        pair = (layout.exchange, layout.prefill_exchange or layout.exchange)
        if self.pairs is not None and pair[0] != pair[1] and pair not in self.pairs:
            found.append(f"{self.name} has no exchange that is {pair[0]} in decode and {pair[1]} in prefill")
        for phase in (PREFILL, DECODE) if role == MIXED else (role,):
            found += [
                reason for reason in self.refusals(topology, layout.in_phase(phase), role, phase, config) if reason not in found
            ]
        return found


def _whole_or_split(name: str, layout: Layout) -> list[str]:
    """Both vLLMs have one switch for experts: whole over all ranks of a stage, or every one split over all of them."""
    if layout.expert > 1 and layout.expert_tensor > 1:
        return [
            f"{name} has experts either whole (EP = TP x DP) or split over all ranks, "
            f"not EP{layout.expert} x TP{layout.expert_tensor}"
        ]
    return []


def _vllm(topology: Topology, layout: Layout, role: str, phase: str, config: Glm5Config) -> list[str]:
    found = _whole_or_split("vllm", layout)
    if layout.exchange == DEDUPLICATED:
        found.append("vllm has no exchange with one copy for each rank (deepep copies by expert or by node)")
    if layout.exchange in (ALL_TO_ALL, HIERARCHICAL) and topology.chip.generation not in NVLINK_EXCHANGE:
        found.append(f"vllm's deepep exchanges need Hopper or Blackwell with NVLink, not {topology.chip.generation}")
    if layout.exchange == ALL_TO_ALL and phase == PREFILL:
        found.append("vllm's deepep_low_latency is for decode: its buffers do not hold a chunk of a prompt")
    if layout.pipeline > 1 and layout.data > 1 and layout.ranks > topology.node_devices:
        found.append("vllm keeps the stages of a data-parallel rank on its own machine: PP between machines goes with DP1 only")
    if layout.exchange in (ALL_REDUCE, ALL_GATHER) and layout.exchange_bits == 8:
        found.append(f"vllm sends 16 bits in its {layout.exchange} exchange")
    if layout.exchange in (ALL_TO_ALL, HIERARCHICAL) and layout.exchange_bits == 16:
        found.append("vllm's deepep exchanges dispatch FP8")
    if layout.overlap and layout.exchange not in (ALL_TO_ALL, HIERARCHICAL):
        found.append("vllm's --enable-dbo needs a deepep exchange")
    if layout.overlap and (layout.drafts or layout.pipeline > 1 or layout.decode_context > 1 or layout.context > 1):
        found.append("vllm's --enable-dbo excludes MTP, PP and context parallelism")
    if layout.context > 1 and layout.pipeline > 1:
        found.append("vllm's prefill context parallelism is not combined with PP here: no recipe shows it")
    return found


def _sglang(topology: Topology, layout: Layout, role: str, phase: str, config: Glm5Config) -> list[str]:
    found = []
    npu = topology.chip.backend == "npu"
    if layout.exchange == DEDUPLICATED:
        found.append("sglang has no exchange with one copy for each rank")
    if layout.exchange in (ALL_TO_ALL, HIERARCHICAL):
        if not npu and topology.chip.generation not in NVLINK_EXCHANGE:
            found.append(f"sglang's deepep needs Hopper or Blackwell with NVLink, not {topology.chip.generation}")
        if layout.exchange == ALL_TO_ALL and phase == PREFILL and not npu:
            found.append("sglang's low-latency deepep is for decode: its buffers do not hold a chunk of a prompt")
        if layout.expert_tensor > 1 or layout.expert != layout.stage_ranks:
            found.append("sglang's deepep takes EP = all ranks of a stage")
        if layout.exchange_bits == 16:
            found.append("sglang's deepep dispatches 8 bits")
    if layout.exchange in (ALL_REDUCE, ALL_GATHER) and layout.exchange_bits == 8:
        found.append(f"sglang sends 16 bits in its {layout.exchange} exchange")
    if layout.exchange == ALL_GATHER and layout.data * layout.context == 1:
        found.append("sglang gathers tokens between attention groups only")
    if layout.pipeline > 1 and role != PREFILL:
        found.append("sglang with PP crashed on GLM-5.2 outside prefill (sglang #28659, #29162, closed): not before you tried it")
    if layout.decode_context > 1 and layout.context > 1:
        found.append("sglang has either --dcp-size or prefill context parallelism")
    if layout.overlap and layout.exchange not in (ALL_TO_ALL, HIERARCHICAL):
        found.append("sglang's --enable-two-batch-overlap needs deepep")
    return found


def _vllm_ascend(topology: Topology, layout: Layout, role: str, phase: str, config: Glm5Config) -> list[str]:
    """ascend_forward_context.select_moe_comm_method of 0.23.0 chooses the exchange; a plan that needs another one is refused."""
    found = _whole_or_split("vllm-ascend", layout)
    generation, ranks = topology.chip.generation, layout.stage_ranks
    across = ranks > topology.node_devices and len(topology.levels) == 2
    local = config.n_routed_experts / layout.expert
    if layout.exchange in (ALL_TO_ALL, HIERARCHICAL):
        if generation == "a2" and (local > 24 or layout.expert < 16):
            found.append(
                f"vllm-ascend uses MC2 on A2 only with at most 24 experts a device and EP >= 16; here {local:g} "
                f"and EP{layout.expert}, so it all-gathers"
            )
        if phase == PREFILL and generation == "a2":
            found.append(f"vllm-ascend all-gathers on A2 above {MC2_TOKENS} tokens a rank, which a prefill chunk is")
    if layout.expert > 1 and layout.exchange in (ALL_REDUCE, ALL_GATHER):
        if generation != "a2":
            found.append(f"vllm-ascend with EP never gathers on {generation}: MC2 or all-to-all; without EP it does")
        elif phase == DECODE and local <= 24 and layout.expert >= 16:
            found.append("vllm-ascend takes MC2 on A2 from EP16 on, not a gather, for the few tokens of a decode step")
    if layout.exchange == ALL_TO_ALL and across:
        found.append("vllm-ascend needs enable_mc2_hierarchy_comm between nodes on RoCE (docs GLM5.2.md)")
    if layout.pipeline > 1 and layout.data > 1 and layout.ranks > topology.node_devices:
        found.append("vllm keeps the stages of a data-parallel rank on its own machine: PP between machines goes with DP1 only")
    if layout.exchange == HIERARCHICAL and not across:
        found.append("vllm-ascend's hierarchy is for nodes joined by RoCE")
    if layout.exchange == DEDUPLICATED:
        found.append("vllm-ascend has no exchange with one copy for each rank")
    if layout.exchange in (ALL_REDUCE, ALL_GATHER) and layout.exchange_bits == 8:
        found.append(f"vllm-ascend sends 16 bits in its {layout.exchange} exchange")
    if layout.exchange == ALL_GATHER and layout.data * layout.context == 1 and layout.expert_tensor > 1:
        found.append("vllm-ascend all-reduces experts that are split")
    if layout.overlap:
        found.append("vllm-ascend has no two micro-batches for GLM-5 in 0.23")
    if layout.redundant_experts and local <= 8:
        found.append("vllm-ascend advises against redundant experts at 8 or fewer a device")
    if layout.context > 1 and layout.context != ranks // layout.data:
        found.append("vllm-ascend's enable_dsa_cp shares prompts over the whole tensor group")
    if layout.context > 1 and layout.tensor > 1:
        found.append("vllm-ascend's enable_dsa_cp uses all tensor ranks for context")
    return found


def _torchrun(topology: Topology, layout: Layout, role: str, phase: str, config: Glm5Config) -> list[str]:
    found = layout_reasons(layout)
    if role != MIXED:
        found.append("this library hands no cache from prefill ranks to decode ranks")
    if topology.chip.backend == "cpu" and layout.expert_tensor > 1:
        found.append("the CPU kernels of this library prepare whole experts: a NUMA node holds experts, not parts of each")
    return found


_GPU = ("bf16", "fp8", "int4")
ENGINES: dict[str, Engine] = {
    "vllm": Engine("vllm", "0.33.0", ("cuda",), {"": _GPU}, (), _vllm),
    "sglang": Engine(
        "sglang",
        "0.5.23",
        ("cuda", "npu", "musa", "hygon"),
        {"": _GPU, "npu": ("bf16", "w4a8"), "hygon": ("bf16", "w4a8")},
        ((ALL_TO_ALL, HIERARCHICAL),),
        _sglang,
    ),
    "vllm-ascend": Engine(
        "vllm-ascend",
        "0.23.0",
        ("npu",),
        {"": ("bf16", "w4a8")},
        ((HIERARCHICAL, ALL_GATHER), (ALL_TO_ALL, ALL_GATHER)),
        _vllm_ascend,
    ),
    TORCHRUN: Engine(
        TORCHRUN,
        "this library",
        ("cuda", "npu", "musa", "mlu", "gcu", "hygon", "metax", "kunlunxin", "iluvatar", "cpu"),
        {"": WEIGHTS},
        None,
        _torchrun,
        continuous=False,
    ),
}
"""Engines by name, in the order in which they are named to a user."""


def find_engine(name: str) -> Engine:
    """An engine by name.

    Raises:
        PlanError: no such engine.
    """
    if name not in ENGINES:
        raise PlanError(f"{name!r} is no engine{did_you_mean(name, ENGINES)}; known are {', '.join(ENGINES)}")
    return ENGINES[name]


def serving_engines(topology: Topology) -> list[Engine]:
    """Engines that serve a chip; this library alone where there is no other."""
    found = [engine for engine in ENGINES.values() if engine.name != TORCHRUN and topology.chip.backend in engine.backends]
    return found or [ENGINES[TORCHRUN]]


def who_can(topology: Topology, layout: Layout, role: str, weights: str, config: Glm5Config) -> dict[str, list[str]]:
    """Engine -> reasons why not; empty for those that can."""
    return {name: engine.reasons(topology, layout, role, weights, config) for name, engine in ENGINES.items()}
