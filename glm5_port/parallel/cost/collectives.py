"""Collectives over levels of links. a and b are latency and bandwidth of a device on a level, S the bytes of the gathered whole.

A group is laid on the levels as factors g1, g2, ... from the inside (`Topology.factors`); a level where nobody meets costs
nothing.

    send              a + S / b
    all-gather        sum over levels of a + (g - 1) / g  S / (g of the levels inside) / b        (reduce-scatter alike)
    all-reduce        reduce-scatter + all-gather
    one ring          a + (P - 1) / P  S / min(b inside, b outside x devices of a node)            through all; all-reduce twice

all_reduce takes the faster of level by level and one ring; both take one ring where the topology says that its library knows
nothing else. A reduce-scatter that goes from each rank to each (`Topology.scatters_pairwise`) costs what an all-to-all does: more
between nodes. Source: NCCL's and Megatron's accounting (the ring's volume); bytes of each link counted with gloo on emulated
links (tests/parallel/test_emulated_links.py).
"""

from __future__ import annotations

import math

from glm5_port.parallel.cost.step import Step
from glm5_port.parallel.cost.terms import COMMUNICATION, NOTHING, Cost, term
from glm5_port.parallel.plan import ALL_REDUCE, PREFILL
from glm5_port.parallel.topology import ONE_RING, Topology

HIDDEN_BYTES = 2.0
"""Of an element of a hidden state between ranks."""


def send(topology: Topology, stride: int, size: float, *, first: int = 0, senders: int | None = None) -> Cost:
    """Point to point from rank `first` to the rank `stride` further: a + S / b on the innermost level that holds both.

    Args:
        topology: the links.
        stride, size: S, bytes.
        first: the rank that sends.
        senders: ranks of a machine that send at the same time; fewer than share a NIC have more of it. None: all.
    """
    places = ((level, level.devices) for level in topology.levels)
    level = next(level for level, unit in places if unit == 0 or first // unit == (first + stride) // unit)
    share = 1.0 if senders is None else level.nic_shared_by / min(level.nic_shared_by, senders)
    # A pair: on a mesh it has one link.
    return Cost(level.latency + size / (level.rate(2, "send") * share), link_bytes=size)


def all_gather(topology: Topology, factors: tuple[int, ...], size: float, collective: str = "all_gather") -> Cost:
    """Every rank ends with S bytes, having begun with S / P; or, as reduce_scatter, the other way round.

    level by level: sum over levels of a + (g - 1) / g  S / (g of the levels inside) / b
    """
    if collective == "reduce_scatter" and topology.scatters_pairwise:
        return all_to_all(topology, factors, size, collective)
    return _collective(topology, factors, size, collective, 1)


def all_reduce(topology: Topology, factors: tuple[int, ...], size: float) -> Cost:
    """Every rank ends with the sum of S bytes.

    level by level: reduce-scatter inside, all-reduce outside, all-gather inside: twice the volume and the steps of all_gather
    """
    return _collective(topology, factors, size, "all_reduce", 2)


def all_to_all(topology: Topology, factors: tuple[int, ...], size: float, collective: str = "all_to_all") -> Cost:
    """Every rank sends S bytes, S / P to each of P ranks: the slowest level of a + (part for ranks that meet on it) / b, since a
    flat exchange drives all levels at the same time.

    Source: DeepEP's accounting; bytes counted with gloo on emulated links.
    """
    ranks = math.prod(factors)
    seconds = sent = 0.0
    unit = 1
    for level, group in zip(topology.levels, factors, strict=True):
        outer = unit * group
        if group > 1:
            part = (outer - unit) / ranks * size
            seconds = max(seconds, level.latency + part / level.rate(group, collective))
            sent += part
        unit = outer
    return Cost(seconds, link_bytes=sent)


def _collective(topology: Topology, factors: tuple[int, ...], size: float, collective: str, rounds: int) -> Cost:
    """Level by level, or in one ring through all: as the library does it, and all_reduce in the faster way where it has both."""
    seconds = sent = slowest_latency = 0.0
    inside, narrowest = 1, float("inf")
    for level, group in zip(topology.levels, factors, strict=True):
        if group > 1:
            part = rounds * (group - 1) / group * size / inside
            rate = level.rate(group, collective)
            seconds += rounds * level.latency + part / rate
            sent += part
            narrowest = min(narrowest, rate * inside)  # a ring crosses here once, on as many NICs as devices lie inside
            slowest_latency = max(slowest_latency, level.latency)
        inside *= group
    if inside == 1:
        return NOTHING
    volume = rounds * (inside - 1) / inside * size
    ring = Cost(rounds * slowest_latency + volume / narrowest, link_bytes=volume)
    by_level = Cost(seconds, link_bytes=sent)
    if topology.collectives == ONE_RING:
        return ring
    return ring if collective == "all_reduce" and ring.seconds < seconds else by_level


# --- terms -------------------------------------------------------------------------------------------------------------------


def _hidden(step: Step) -> float:
    """Bytes of the hidden states of a rank's tokens in one call."""
    return step.rank_tokens / step.calls * step.config.hidden_size * HIDDEN_BYTES


@term("tensor all-reduce", COMMUNICATION)
def tensor_all_reduce(step: Step) -> Cost:
    """Two all-reduces of T h 2 bytes a layer, after attention and after the experts, where every rank holds every token.

    Source: Megatron-LM (arXiv 1909.08053).
    """
    layout = step.layout
    if layout.tensor == 1 or layout.exchange != ALL_REDUCE:
        return NOTHING
    one = all_reduce(step.topology, step.topology.factors(1, layout.tensor), _hidden(step))
    return one * (2 * step.size.layers * step.calls)


@term("tensor reduce-scatter, all-gather", COMMUNICATION)
def tensor_reduce_scatter(step: Step) -> Cost:
    """A reduce-scatter after attention and an all-gather before it, T h 2 bytes each, a layer: between them a rank holds T /
    tensor tokens (sequence parallel), which the exchange of experts then takes from there. Twice on layers without experts.

    Source: Megatron-LM sequence parallel (arXiv 2205.05198); FlashComm.
    """
    layout = step.layout
    if layout.tensor == 1 or layout.exchange == ALL_REDUCE:
        return NOTHING
    factors, size = step.topology.factors(1, layout.tensor), _hidden(step)
    one, other = all_gather(step.topology, factors, size), all_gather(step.topology, factors, size, "reduce_scatter")
    pair = Cost(one.seconds + other.seconds, link_bytes=one.link_bytes + other.link_bytes)
    return pair * ((2 * step.size.layers - step.size.moe) * step.calls)


@term("context all-gather", COMMUNICATION)
def context_all_gather(step: Step) -> Cost:
    """Prefill with shared prompts: an all-gather of latents (T (C + R) 2 bytes) on every layer and of index keys (T width 2
    bytes) on layers with an indexer.

    Source: SGLang and vllm-ascend DSA-CP; 1,408 bytes a token a layer in bf16.
    """
    layout, config = step.layout, step.config
    if layout.context == 1:
        return NOTHING
    factors, tokens = step.topology.factors(layout.tensor, layout.context), step.tokens / step.calls
    latents = all_gather(step.topology, factors, tokens * (config.kv_lora_rank + config.qk_rope_head_dim) * 2)
    keys = all_gather(step.topology, factors, tokens * config.index_head_dim * 2)
    seconds = latents.seconds * step.size.layers + keys.seconds * step.size.indexed
    sent = latents.link_bytes * step.size.layers + keys.link_bytes * step.size.indexed
    return Cost(seconds, link_bytes=sent) * step.calls


@term("decode context exchange", COMMUNICATION)
def decode_context_exchange(step: Step) -> Cost:
    """A cache that is shared by ranks: an all-gather of absorbed queries, T heads (C + R) 2 bytes, and a reduce-scatter of
    partial outputs with their log-sum-exp, T heads (C + 1) 4 bytes, a layer.

    Source: vllm-ascend Design_Documents/context_parallel.md; 74 KB of queries a token for 64 heads.
    """
    layout, config = step.layout, step.config
    if layout.decode_context == 1:
        return NOTHING
    factors = step.topology.factors(1, layout.decode_context)
    heads = config.num_attention_heads / layout.tensor * layout.decode_context
    queries = step.tokens * heads * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    outputs = step.tokens * heads * (config.kv_lora_rank + 1) * 4
    one = all_gather(step.topology, factors, queries)
    other = all_gather(step.topology, factors, outputs, "reduce_scatter")
    return Cost(one.seconds + other.seconds, link_bytes=one.link_bytes + other.link_bytes) * step.size.layers


@term("pipeline hand-off", COMMUNICATION)
def pipeline_hand_off(step: Step) -> Cost:
    """pipeline - 1 times T h 2 / tensor bytes over links to the next stage, once a pass and not a layer: 12 KB a token in all.

    Source: vLLM sends slices and gathers them inside the node; spec, detour 16.
    """
    layout = step.layout
    if layout.pipeline == 1 or step.size.layers == 1:
        return NOTHING
    ranks, size = layout.stage_ranks, _hidden(step) / layout.tensor
    found = [send(step.topology, ranks, size, first=stage * ranks, senders=ranks) for stage in range(layout.pipeline - 1)]
    together = Cost(sum(each.seconds for each in found), link_bytes=sum(each.link_bytes for each in found))
    # Chunks of a prompt follow each other, so all but the last hand-off hide behind the next chunk.
    return together * (1 + (min(step.calls - 1, len(found)) / len(found) if step.phase == PREFILL else 0))
