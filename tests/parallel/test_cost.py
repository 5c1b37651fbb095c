"""Terms against values worked out by hand, and that nothing gets faster on a slower link."""

from __future__ import annotations

import math
from dataclasses import replace
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5_port.parallel.cost.collectives import all_gather, all_reduce, send
from glm5_port.parallel.cost.compute import imbalance
from glm5_port.parallel.cost.moe_exchange import distinct_targets
from glm5_port.parallel.cost.service import ORDER, Prices, Workload, accepted_tokens, one_pass, serve_mixed
from glm5_port.parallel.cost.step import Step, model_size
from glm5_port.parallel.cost.terms import TERMS, Cost
from glm5_port.parallel.plan import Layout
from glm5_port.parallel.topology import find_hardware
from tests.parallel.questions import GLM_5, GLM_5_2

H200 = find_hardware("hgx-h200")
A2 = find_hardware("atlas-800-a2")


def step(layout: Layout, phase: str = "decode", topology=H200, config=GLM_5, **changes) -> Step:
    values = {"tokens": 16.0, "sequences": 16.0, "context": 8192.0, "groups": layout.data, "calls": 1}
    kinds = {"weights": "fp8", "kv_format": "fp8"}
    return Step(
        config=config, topology=topology, layout=layout, phase=phase, size=model_size(config), **(kinds | values | changes)
    )


def cost(name: str, *arguments, **changes) -> Cost:
    return TERMS[name].of(step(*arguments, **changes))


# -- collectives -------------------------------------------------------------------------------------------------------


def test_collectives_on_one_level() -> None:
    size = 64e6
    rate = 450e9
    assert send(H200, 1, size).seconds == pytest.approx(10e-6 + size / (rate * 0.9))
    assert send(H200, 8, size).seconds == pytest.approx(20e-6 + size / (50e9 * 0.9))
    assert all_gather(H200, (8, 1), size).seconds == pytest.approx(10e-6 + 7 / 8 * size / (rate * 0.63))
    assert all_reduce(H200, (8, 1), size).seconds == pytest.approx(2 * 10e-6 + 2 * 7 / 8 * size / (rate * 0.82))
    assert all_reduce(H200, (1, 1), size).seconds == all_gather(H200, (1, 1), size).seconds == 0


def test_collectives_on_two_levels() -> None:
    size = 64e6
    inside, outside = 10e-6 + 7 / 8 * size / (450e9 * 0.63), 20e-6 + 1 / 2 * (size / 8) / (50e9 * 0.8)
    assert all_gather(H200, (8, 2), size).seconds == pytest.approx(inside + outside)
    level_by_level = 2 * 10e-6 + 2 * 7 / 8 * size / (450e9 * 0.82) + 2 * 20e-6 + (size / 8) / (50e9 * 0.8)
    ring = 2 * 20e-6 + 2 * 15 / 16 * size / min(450e9 * 0.82, 8 * 50e9 * 0.8)
    assert all_reduce(H200, (8, 2), size).seconds == pytest.approx(min(level_by_level, ring))


def test_a_pair_on_a_mesh_has_one_link() -> None:
    assert send(A2, 1, 28e6).seconds == pytest.approx(15e-6 + 1e-3 / 0.9)


def test_stages_hand_off_over_the_links_between_them() -> None:
    """Stages of four ranks on nodes of eight: the second of three hand-offs leaves the node, and half of a NIC's devices send."""
    shared = replace(H200.levels[1], nic_shared_by=8)
    topology = replace(H200, levels=(H200.levels[0], shared))
    size = 16 * 6144 * 2 / 4
    inside, between = 10e-6 + size / (450e9 * 0.9), 20e-6 + size / (50e9 * 0.9 * 2)
    assert cost("pipeline hand-off", Layout(pipeline=4, tensor=4, expert=4), topology=topology).seconds == pytest.approx(
        2 * inside + between
    )
    assert cost("pipeline hand-off", Layout(pipeline=2, tensor=8, expert=8), topology=topology).seconds == pytest.approx(
        20e-6 + size / 2 / (50e9 * 0.9)
    )


# -- exchange of experts -----------------------------------------------------------------------------------------------


def test_distinct_targets_are_the_hypergeometric_expectation() -> None:
    """Worked out by hand: ranks 2:1.99, 4:3.61, 8:5.29, 16:6.52, 32:7.27, 64:7.68, 128:7.89."""
    published = {2: 1.99, 4: 3.61, 8: 5.29, 16: 6.52, 32: 7.27, 64: 7.68, 128: 7.89}
    for parts, value in published.items():
        exact = parts * (1 - comb(256 - 256 // parts, 8) / comb(256, 8))
        assert distinct_targets(256, 8, parts) == pytest.approx(exact)
        assert round(exact, 2) == pytest.approx(value, abs=0.011)
    assert distinct_targets(256, 8, 256) == 8
    assert distinct_targets(256, 8, 1) == 1


def exchange(form: str, bits: int = 16) -> tuple[float, float]:
    """Bytes that one device sends in one layer for one token of its own: dispatch, combine. Two nodes of eight."""
    layout = Layout(data=16, expert=16, exchange=form, exchange_bits=bits, redundant_experts=0)
    at = {"tokens": 64.0, "sequences": 64.0}
    per = imbalance(step(layout)) if form != "all_gather" else 1.0
    found = [cost(name, layout, **at).link_bytes / 75 / 64 / per for name in ("expert dispatch", "expert combine")]
    return found[0], found[1]


def test_bytes_of_each_form_of_exchange() -> None:
    hidden, quantised = 12288, 6144 + 4 * 48
    outside = 8 * (1 - 8 / 16)
    assert exchange("all_to_all") == pytest.approx(((outside + 8 * 7 / 16) * hidden,) * 2)
    assert exchange("all_to_all", 8) == pytest.approx(((outside + 3.5) * quantised, (outside + 3.5) * hidden))
    ranks, nodes = distinct_targets(256, 8, 16), distinct_targets(256, 8, 2)
    assert exchange("deduplicated") == pytest.approx((ranks * 15 / 16 * hidden,) * 2)
    assert exchange("hierarchical") == pytest.approx(((nodes / 2 + ranks * 7 / 8) * hidden,) * 2)
    assert exchange("all_gather") == pytest.approx((15 * hidden,) * 2)


def test_deduplication_divides_what_crosses_nodes() -> None:
    """On 2 nodes 4 times less for GLM-5 (8 x 1/2 -> about 1), on 4 nodes 2.2 times, on 8 nodes 1.5 times."""
    for nodes, gain in ((2, 4.0), (4, 2.2), (8, 1.5)):
        flat = 8 * (nodes - 1) / nodes
        assert flat / (distinct_targets(256, 8, nodes) * (nodes - 1) / nodes) == pytest.approx(gain, rel=0.02)


def test_nothing_is_sent_where_every_rank_has_every_token() -> None:
    assert cost("expert dispatch", Layout(tensor=8, expert=8)).seconds == 0
    assert cost("tensor all-reduce", Layout(tensor=8, expert=8)).seconds > 0
    assert cost("tensor reduce-scatter, all-gather", Layout(tensor=8, expert=8)).seconds == 0


# -- compute -----------------------------------------------------------------------------------------------------------


def test_attention_projections_by_hand() -> None:
    """Decode reads weights: (25.5 M - indexer + 148.9 M / 8) bytes a layer over 80 % of 4.8 TB/s."""
    whole, heads = 6144 * (2048 + 576), 2048 * 64 * 256 + 512 * 64 * (192 + 256) + 64 * 256 * 6144
    assert heads == pytest.approx(148.9e6, rel=1e-3)
    found = cost("attention projections", Layout(tensor=8, expert=8))
    assert found.memory_bytes == pytest.approx(78 * (whole + heads / 8))
    assert found.seconds == pytest.approx(78 * (whole + heads / 8) / (4800e9 * 0.8))
    prefill = cost("attention projections", Layout(tensor=8, expert=8), "prefill", tokens=8192.0, sequences=1.0)
    assert prefill.seconds == pytest.approx(78 * 2 * (whole + heads / 8) * 8192 / (1978e12 * 0.65))


def test_routed_experts_read_what_was_chosen() -> None:
    """16 tokens choose 256 (1 - (1 - 8/256)^16) of the experts; a rank of eight reads its share."""
    chosen = 256 * (1 - (1 - 8 / 256) ** 16)
    found = cost("routed experts", Layout(tensor=8, expert=8))
    assert found.memory_bytes == pytest.approx(75 * chosen / 8 * 3 * 6144 * 2048)
    assert cost("routed experts", Layout(tensor=8, expert_tensor=8)).memory_bytes == pytest.approx(found.memory_bytes)


def test_the_indexer_is_not_divided_by_tensor_and_is_shared_between_layers() -> None:
    one, eight = (cost("indexer scores", Layout(tensor=tensor, expert=tensor)) for tensor in (1, 8))
    assert one == eight
    assert one.memory_bytes == pytest.approx(78 * 16 * 8192 * 132)
    assert cost("indexer scores", Layout(), config=GLM_5_2).memory_bytes == pytest.approx(21 * 16 * 8192 * 132)
    assert cost("indexer scores", Layout(), context=2048.0).seconds == 0  # everything is selected


def test_sparse_attention_stops_growing_at_top_k_and_has_a_block_of_heads() -> None:
    short, long, longer = (cost("sparse attention", Layout(), context=float(context)) for context in (1024, 8192, 131072))
    assert short.seconds < long.seconds == longer.seconds
    operations = cost("sparse attention", Layout(tensor=8, expert=8)).operations
    assert operations == pytest.approx(78 * 2 * 64 * 1088 * 2048 * 16)  # 8 heads cost as many as 64 on NVIDIA's kernels
    assert cost("sparse attention", Layout(tensor=8), topology=A2).operations == pytest.approx(operations / 4)


def test_prefill_selects_a_ramp_then_top_k() -> None:
    asked = step(Layout(), "prefill", tokens=4096.0, sequences=1.0, context=4096.0)
    assert asked.mean_selected == pytest.approx(sum(min(p, 2048) for p in range(4096)) / 4096, rel=1e-3)
    assert asked.mean_keys == 2048
    chunk = replace(asked, context=4096.0 + 65536)
    assert (chunk.mean_selected, chunk.mean_keys) == (2048, 65536 + 2048)


def test_imbalance() -> None:
    assert imbalance(step(Layout())) == 1
    assert imbalance(step(Layout(data=32, expert=32))) == pytest.approx(1.25)
    assert imbalance(step(Layout(data=512, expert=256))) == 1.30
    assert imbalance(step(Layout(data=32, expert=32, redundant_experts=32))) == 1.05


def test_drafts_yield_what_was_published() -> None:
    assert accepted_tokens(GLM_5, 0) == 1
    assert accepted_tokens(GLM_5, 4) == pytest.approx(2.76, rel=0.01)  # arXiv 2602.15763
    assert accepted_tokens(GLM_5_2, 3) == pytest.approx(2.99, rel=0.02)  # InferenceX


def test_two_micro_batches_hide_the_smaller_part_and_read_weights_twice() -> None:
    layout = Layout(data=16, expert=16, exchange="all_to_all")
    at = {"tokens": 8192.0, "sequences": 1.0}
    plain, both = one_pass(step(layout, "prefill", **at)), one_pass(step(replace(layout, overlap=True), "prefill", **at))
    sending = plain.of_kind("communication")
    working = plain.seconds - sending
    assert max(sending, working) < both.seconds < plain.seconds
    few = {"tokens": 16.0, "sequences": 16.0}
    assert one_pass(step(replace(layout, overlap=True), **few)).seconds > one_pass(step(layout, **few)).seconds


def test_pipeline_divides_the_prompt_when_chunks_follow_each_other() -> None:
    prices = Prices(GLM_5, H200, ("fp8", "fp8"), Workload(65536, 1, 8192))
    whole = prices.prefill(Layout(pipeline=8), 1).seconds
    served = serve_mixed(prices, Layout(pipeline=8), 1, 1)
    assert served.ttft - served.decode.seconds == pytest.approx(whole * (8 + 7) / 64)


# -- the breakdown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TERMS))
def test_every_term_has_a_formula_and_a_source(name: str) -> None:
    assert TERMS[name].formula
    assert TERMS[name].source
    assert not TERMS[name].formula.startswith("Source")


def test_every_term_is_in_the_order_and_the_sum_is_the_step() -> None:
    assert set(ORDER) | {"drafts of the MTP layer", "hidden by two micro-batches"} == set(TERMS)
    breakdown = one_pass(step(Layout(tensor=2, data=4, expert=8, exchange="all_to_all")))
    assert breakdown.seconds == pytest.approx(sum(part.seconds for _, _, part in breakdown))
    data = breakdown.as_dict()
    assert data["seconds"] == breakdown.seconds
    assert all(each["formula"] and each["source"] for each in data["terms"])


# -- monotonicity ------------------------------------------------------------------------------------------------------

SIXTEEN = [
    Layout(tensor=16, expert=16),
    Layout(tensor=16, expert_tensor=16),
    Layout(tensor=8, expert=8, pipeline=2),
    *(Layout(data=16, expert=16, exchange=form) for form in ("all_gather", "all_to_all", "deduplicated", "hierarchical")),
    Layout(tensor=8, data=2, expert=16, exchange="hierarchical", prefill_exchange="all_gather"),
    Layout(data=16, expert=16, exchange="all_to_all", overlap=True, drafts=3),
]


@settings(max_examples=20, deadline=None)
@given(
    layout=st.sampled_from(SIXTEEN),
    hardware=st.sampled_from(["hgx-h200", "atlas-800-a2", "pcie-l40s", "mi300x-8"]),
    level=st.integers(0, 1),
    factor=st.floats(0.01, 0.99),
    concurrency=st.integers(1, 256),
)
def test_a_slower_link_never_makes_a_plan_faster(layout, hardware: str, level: int, factor: float, concurrency: int) -> None:
    topology, work = find_hardware(hardware), Workload(4096, 512, 8192)
    here = serve_mixed(Prices(GLM_5, topology, ("fp8", "fp8"), work), layout, 1, concurrency)
    slower = serve_mixed(Prices(GLM_5, topology.scaled(level, factor), ("fp8", "fp8"), work), layout, 1, concurrency)
    assert slower.ttft >= here.ttft * (1 - 1e-12)
    assert slower.tpot >= here.tpot * (1 - 1e-12)
    assert slower.output_rate <= here.output_rate * (1 + 1e-12)
    assert math.isfinite(slower.ttft)


def test_a_batch_that_runs_to_its_end_computes_prompts_together_and_stages_in_turn() -> None:
    """This library's way: two steps of four prompts instead of eight prompts one by one, and no stage works beside another."""
    work, layout = Workload(1024, 64, 4096), Layout(pipeline=2, tensor=4, expert=4)
    batch = Prices(GLM_5, H200, ("fp8", "fp8"), work, continuous=False)
    serving = Prices(GLM_5, H200, ("fp8", "fp8"), work)
    prefill, decode = batch.prefill(layout, 1, 4).seconds, batch.decode(layout, 8, 1).seconds
    assert serve_mixed(batch, layout, 1, 8).output_rate == pytest.approx(8 * 64 / (64 * decode + 2 * prefill))
    one, half = serving.prefill(layout, 1).seconds, serving.decode(layout, 8, 1).seconds
    assert serve_mixed(serving, layout, 1, 8).output_rate == pytest.approx(8 * 64 / (64 * half + one + 7 * one / 2))
    assert prefill < 4 * one  # weights are read once, not four times
    assert decode > half  # all eight sequences, not four
