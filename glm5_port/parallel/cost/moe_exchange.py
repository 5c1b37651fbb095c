"""Tokens to their experts and back, in five forms. P ranks, N nodes of G ranks, t tokens that each rank brings, k experts of a
token.

    all_reduce     every rank has every token, computes its experts, and the sum is the tensor all-reduce: nothing more to send
    all_gather     every rank gets every token, and a reduce-scatter brings sums back:   (P - 1) / P  P t h bytes each way
    all_to_all     a copy for each chosen expert:                                        t k h bytes, by distance
    deduplicated   a copy for each rank that has a chosen expert:                        t D_P h bytes, by distance
    hierarchical   a copy for each node that has one, fanned out inside:                 t D_N (N - 1) / N h outside, then inside

D_X = X (1 - C(E - E / X, k) / C(E, k)) is the expected number of distinct parts of X that k of E experts lie in: GLM-5 has one
routing group, so nothing limits the nodes of a token. Dispatch in 8 bits sends h + 4 bytes a scale of 128; combine is 16 bits.

Source: DeepSeek-V3 (arXiv 2412.19437) and DeepEP; six forms measured on emulated links keep this
order.
"""

from __future__ import annotations

from functools import lru_cache

from glm5_port.operators.exchange import SCALE_GROUP
from glm5_port.parallel.cost.collectives import all_gather, all_to_all
from glm5_port.parallel.cost.compute import imbalance
from glm5_port.parallel.cost.step import Step
from glm5_port.parallel.cost.terms import COMMUNICATION, NOTHING, Cost, term
from glm5_port.parallel.plan import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, HIERARCHICAL


@lru_cache(maxsize=1024)
def distinct_targets(experts: int, k: int, parts: int) -> float:
    """D_X: expected number of parts, of `parts` equal ones, that k different experts out of `experts` lie in.

    Args:
        experts: E.
        k: chosen experts.
        parts: X; ranks, or nodes.
    """
    if parts >= experts:
        return float(k)
    outside = experts - experts / parts
    missed = 1.0
    for taken in range(k):
        missed *= max(outside - taken, 0.0) / (experts - taken)
    return parts * (1 - missed)


def token_bytes(step: Step, bits: int) -> float:
    """Bytes of one token's hidden state on the way."""
    h = step.config.hidden_size
    return 2.0 * h if bits == 16 else h + 4.0 * -(-h // SCALE_GROUP)


def _one_way(step: Step, size: float, collective: str) -> Cost:
    """Seconds and bytes of one way for one call of one layer, when each rank brings t = T / tensor tokens of `size` bytes."""
    layout, topology, config = step.layout, step.topology, step.config
    ranks = layout.stage_ranks
    factors = topology.factors(1, ranks)
    tokens = step.rank_tokens / step.calls / layout.tensor
    if layout.exchange == ALL_GATHER:
        active = tokens * ranks * min(1.0, step.groups / layout.data)
        return all_gather(topology, factors, active * size, collective)
    k, experts = config.num_experts_per_tok, config.n_routed_experts
    copies = float(k) if layout.exchange == ALL_TO_ALL else distinct_targets(experts, k, ranks)
    if layout.exchange != HIERARCHICAL:
        return all_to_all(topology, factors, tokens * copies * size) * imbalance(step)
    seconds = sent = 0.0
    unit = 1
    for level, group in zip(topology.levels, factors, strict=True):
        outer = unit * group
        if group > 1:
            if outer < ranks:  # fan out inside, after the copy for the node arrived
                part = tokens * copies * (outer - unit) / outer * size
            else:
                away = distinct_targets(experts, k, group) if unit > 1 else copies
                part = tokens * away * (group - 1) / group * size
            seconds += level.latency + part / level.rate(group, "all_to_all")  # a step on each level
            sent += part
        unit = outer
    return Cost(seconds, link_bytes=sent) * imbalance(step)


@term("expert dispatch", COMMUNICATION)
def dispatch(step: Step) -> Cost:
    """Tokens to the ranks of their experts, by the plan's form of exchange, in 16 or 8 bits; times the imbalance for
    all-to-all forms.

    Source: the head of cost/moe_exchange.py.
    """
    if step.layout.exchange == ALL_REDUCE or step.layout.stage_ranks == 1:
        return NOTHING
    return _one_way(step, token_bytes(step, step.layout.exchange_bits), "all_gather") * (step.size.moe * step.calls)


@term("expert combine", COMMUNICATION)
def combine(step: Step) -> Cost:
    """Sums of experts back to the tokens' ranks, by the plan's form of exchange, 2 h bytes a copy (8 bits for a reduce-scatter
    in 8 bits).

    Source: the head of cost/moe_exchange.py; engines combine in bf16, but quantise a reduce-scatter (Flash Communication).
    """
    if step.layout.exchange == ALL_REDUCE or step.layout.stage_ranks == 1:
        return NOTHING
    bits = step.layout.exchange_bits if step.layout.exchange == ALL_GATHER else 16
    return _one_way(step, token_bytes(step, bits), "reduce_scatter") * (step.size.moe * step.calls)
