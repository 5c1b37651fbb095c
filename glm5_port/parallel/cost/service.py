"""Steps put together: what a request waits for its first token, what each further token takes, and tokens a second.

    TPOT    decode step / accepted tokens + (C - 1) prefill / output       mixed role: prompts of the C sequences of a group
    interrupt TTFT    prefill + one decode step, the one that runs when the prompt arrives
    rate    C output / (output x step / accepted + C prefill)              a group, tokens a second; times groups and replicas

Separate roles: TTFT = prefill + cache transfer + decode step; TPOT = decode step / accepted; rate = the smaller of what
prefill delivers and what decode takes. Queues are not modelled: a closed loop of C requests is.

Source: prefill-first batching as vLLM and SGLang do it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from glm5_port.config import Glm5Config
from glm5_port.parallel.cost import collectives as collectives
from glm5_port.parallel.cost import compute as compute  # these three register their terms
from glm5_port.parallel.cost import moe_exchange as moe_exchange
from glm5_port.parallel.cost.step import Step, model_size, mtp_size
from glm5_port.parallel.cost.terms import COMMUNICATION, COMPUTE, FIXED, TERMS, Breakdown, Cost, Term, sum_terms
from glm5_port.parallel.plan import DECODE, PREFILL, Layout
from glm5_port.parallel.sharding import rank_cache_bytes_per_token
from glm5_port.parallel.topology import Topology

ORDER = (
    "attention projections",
    "indexer projections",
    "indexer scores",
    "top-k selection",
    "sparse attention",
    "decode context exchange",
    "context all-gather",
    "tensor all-reduce",
    "tensor reduce-scatter, all-gather",
    "elementwise",
    "dense MLP",
    "shared expert",
    "expert dispatch",
    "routed experts",
    "expert combine",
    "LM head",
    "pipeline hand-off",
    "launches",
)
"""Terms of one pass, in the order of a layer."""
DRAFTS, HIDDEN = "drafts of the MTP layer", "hidden by two micro-batches"
SHARED_UNITS = 0.15
"""Share of compute that communication kernels take while they run beside it; 0 with copy engines or RDMA offload."""
ACCEPTANCE = {False: 0.70, True: 0.80}
"""Chance that a draft is accepted after those before it; with index sharing (GLM-5.2 on) True. 2.76 tokens a step at 4 drafts
for GLM-5 (arXiv 2602.15763), 2.99 at 3 for GLM-5.2 (InferenceX)."""

for _name, _formula, _source, _kind in (
    (
        DRAFTS,
        "drafts x (one layer with experts + LM head) for one token of each sequence.",
        "SGLang and vLLM run the MTP layer once a draft.",
        COMPUTE,
    ),
    (
        HIDDEN,
        "max(compute (1 + shared units), communication) of two halves, weights read twice, less the sum of the whole batch.",
        "DeepSeek's dual micro-batches; 15 % of the units for kernels that copy (DeepEP), 0 with copy engines.",
        FIXED,
    ),
):
    TERMS[_name] = Term(_name, _kind, _formula, _source, lambda step: Cost(0.0))


class Workload(NamedTuple):
    """What is served.

    Attributes:
        input_tokens, output_tokens: of a request.
        chunk: tokens of a prompt that are computed at once.
    """

    input_tokens: int
    output_tokens: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Served:
    """What a role or a deployment delivers.

    Attributes:
        ttft, tpot: seconds.
        output_rate: tokens a second of the whole deployment.
        concurrency: requests that run at the same time; fewer than asked for where the cache is full.
        prefill, decode: breakdowns of a prompt and of a decode step.
    """

    ttft: float
    tpot: float
    output_rate: float
    concurrency: int
    prefill: Breakdown
    decode: Breakdown


@lru_cache(maxsize=64)
def accepted_tokens(config: Glm5Config, drafts: int) -> float:
    """Tokens that a decode step yields: 1 + p + p^2 + ... + p^drafts."""
    p = ACCEPTANCE[len(config.full_layers) < config.num_hidden_layers]
    return sum(p**place for place in range(drafts + 1))


def one_pass(step: Step, known: dict[Hashable, dict[str, Cost]] | None = None) -> Breakdown:
    """All terms of a step, with what two micro-batches hide; `known` as in `sum_terms`."""
    whole = sum_terms(step, ORDER, known)
    if not step.layout.overlap:
        return whole
    half = sum_terms(replace(step, tokens=step.tokens / 2, sequences=max(step.sequences / 2, 1.0)), ORDER, known)
    units = 0.0 if step.topology.tokens_overlap else SHARED_UNITS
    working = 2 * (half.of_kind(COMPUTE) + half.of_kind(FIXED))
    sending = 2 * half.of_kind(COMMUNICATION)
    together = max(working * (1 + units), sending)
    return whole.with_part(HIDDEN, FIXED, Cost(together - whole.seconds))


class Prices:
    """Steps of any layout on one machine room, each priced once.

    Attributes:
        config, topology: the model and the hardware.
        weights, kv_format: how the model is stored.
        work: the requests.
        known: work that links do not change, remembered for prices on links of other speeds.
        continuous: whether requests come and go, and stages work on different micro-batches at the same time; else a batch runs
            from its beginning to its end: prompts together, as many as fit a chunk, and stages one after the other.
    """

    def __init__(
        self,
        config: Glm5Config,
        topology: Topology,
        kinds: tuple[str, str],
        work: Workload,
        known: dict[Hashable, dict[str, Cost]] | None = None,
        *,
        continuous: bool = True,
    ) -> None:
        self.config, self.topology, self.work = config, topology, work
        self.weights, self.kv_format = kinds
        self._work = {} if known is None else known
        self._continuous = continuous
        self._known: dict[tuple[Layout, str, int, int], Breakdown] = {}

    @property
    def calls(self) -> int:
        """Chunks of a prompt."""
        return -(-self.work.input_tokens // self.work.chunk)

    def stages(self, layout: Layout) -> int:
        """Stages that work at the same time."""
        return layout.pipeline if self._continuous else 1

    def together(self, sequences: int) -> int:
        """Prompts of an attention group that are computed at once."""
        return 1 if self._continuous else max(1, min(sequences, self.work.chunk // self.work.input_tokens))

    def prefill(self, layout: Layout, groups: int, prompts: int = 1) -> Breakdown:
        """Whole prompts of one attention group, while `groups` groups compute theirs: all layers, one after the other."""
        key = (_prefill_layout(layout), PREFILL, prompts, groups)
        if key not in self._known:
            tokens = self.work.input_tokens
            step = self._step(key[0], PREFILL, tokens * prompts, prompts, tokens, groups, self.calls)
            self._known[key] = one_pass(step, self._work)
        return self._known[key]

    def decode(self, layout: Layout, sequences: int, groups: int) -> Breakdown:
        """A decode step of `sequences` sequences of each attention group, drafts included.

        With stages that overlap, the sequences are as many micro-batches as there are stages, and each passes all layers while
        the others are on other stages: a token takes all layers at sequences / pipeline.
        """
        layout = layout.in_phase(DECODE)
        batch = -(-sequences // self.stages(layout))
        key = (layout, DECODE, batch, groups)
        if key not in self._known:
            context = self.work.input_tokens + self.work.output_tokens / 2
            step = self._step(layout, DECODE, batch * (1 + layout.drafts), batch, context, groups, 1)
            trunk = one_pass(step, self._work)
            if layout.drafts:
                one = sum_terms(replace(step, tokens=batch, size=mtp_size(self.config)), ORDER, self._work)
                trunk = trunk.with_part(DRAFTS, COMPUTE, one.together * layout.drafts)
            self._known[key] = trunk
        return self._known[key]

    def _step(self, layout: Layout, phase: str, tokens: float, sequences: int, context: float, groups: int, calls: int) -> Step:
        return Step(
            config=self.config,
            topology=self.topology,
            layout=layout,
            weights=self.weights,
            kv_format=self.kv_format,
            phase=phase,
            tokens=tokens,
            sequences=sequences,
            context=context,
            groups=groups,
            calls=calls,
            size=model_size(self.config),
        )


@lru_cache(maxsize=4096)
def _prefill_layout(layout: Layout) -> Layout:
    """What computes prompts: drafts cost nothing there."""
    return replace(layout.in_phase(PREFILL), drafts=0)


def prompt_times(prices: Prices, layout: Layout, prefill: Breakdown) -> tuple[float, float]:
    """(latency, occupation) of a prompt: chunks follow each other through the stages.

    latency = whole (calls + stages - 1) / (calls stages); when prompts follow each other, one leaves every whole / stages.
    """
    stages, calls = prices.stages(layout), prices.calls
    return prefill.seconds * (calls + stages - 1) / (calls * stages), prefill.seconds / stages


def serve_mixed(prices: Prices, layout: Layout, replicas: int, concurrency: int) -> Served:
    """One role that does both. `concurrency` requests over all replicas and groups."""
    work = prices.work
    per_replica = math.ceil(concurrency / replicas)
    groups = min(layout.data, per_replica)
    sequences = math.ceil(per_replica / layout.data)
    together = prices.together(sequences)
    prefill, decode = prices.prefill(layout, groups, together), prices.decode(layout, sequences, groups)
    latency, occupied = prompt_times(prices, layout, prefill)
    others = -(-sequences // together) - 1  # prompts, or batches of prompts, that a request waits for
    token = decode.seconds / accepted_tokens(prices.config, layout.drafts)
    request = work.output_tokens * token + others * occupied + latency
    return Served(
        ttft=latency + decode.seconds,
        tpot=token + others * occupied / work.output_tokens,
        output_rate=concurrency * work.output_tokens / request,
        concurrency=concurrency,
        prefill=prefill,
        decode=decode,
    )


def cache_transfer(prices: Prices, layout: Layout) -> float:
    """Seconds that the cache of a prompt takes from a prefill replica to a decode replica: all ranks send their part.

    a + input x bytes of a token / ranks that hold different parts / b, on the outermost level

    Source: Mooncake and vllm-ascend send layer by layer; what overlaps with the prompt is not subtracted.
    """
    level = prices.topology.levels[-1]
    row = _row_of_all_stages(prices.config, prices.kv_format, layout)
    ranks = layout.tensor * layout.context * layout.pipeline
    return level.latency + prices.work.input_tokens * row / ranks / level.rate(2, "send")


@lru_cache(maxsize=4096)
def _row_of_all_stages(config: Glm5Config, kv_format: str, layout: Layout) -> int:
    """Bytes of a token in the caches of all stages."""
    return sum(rank_cache_bytes_per_token(config, kv_format, layout, stage) for stage in range(layout.pipeline))


def serve_split(prices: Prices, layouts: tuple[Layout, Layout], replicas: tuple[int, int], concurrency: int) -> Served:
    """Separate roles: (prefill, decode) layouts and replicas."""
    first, second = layouts
    prefill = prices.prefill(first, first.data)
    latency, occupied = prompt_times(prices, first, prefill)
    per_replica = math.ceil(concurrency / replicas[1])
    decode = prices.decode(second, math.ceil(per_replica / second.data), min(second.data, per_replica))
    token = decode.seconds / accepted_tokens(prices.config, second.drafts)
    ttft = latency + cache_transfer(prices, first) + decode.seconds
    prompts = replicas[0] * first.data / occupied
    output = prices.work.output_tokens
    return Served(
        ttft=ttft,
        tpot=token,
        output_rate=min(prompts * output, concurrency * output / (ttft + output * token)),
        concurrency=concurrency,
        prefill=prefill,
        decode=decode,
    )
