"""What the planner chooses, by backend; why not; and that the link at which it says the choice flips really flips it."""

from __future__ import annotations

import dataclasses

import pytest

from glm5_port.config import released
from glm5_port.errors import PlanError
from glm5_port.parallel import search
from glm5_port.parallel.cost.service import Workload
from glm5_port.parallel.engines import ENGINES, serving_engines
from glm5_port.parallel.plan import ALL_GATHER, ALL_REDUCE, HIERARCHICAL, Layout
from glm5_port.parallel.planner import ask, rank, request_terms
from glm5_port.parallel.search import Dropped, Mesh, Pins, forms, mesh_traps, meshes
from glm5_port.parallel.topology import find_hardware, topology_names
from glm5_port.registry import BACKENDS
from tests.parallel.questions import best, decoding, question

GLM_5 = released("GLM-5")


# -- per backend -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["atlas-800-a2", "mi300x-8", "mtt-s5000-8", "metax-c550-8"])
def test_a_mesh_node_is_used_whole_or_not_at_all(hardware: str) -> None:
    """A2's pairs have one of seven links: no groups of 2 or 4, on any full mesh."""
    asked = question(hardware, 2, weights="w4a8", kv_format="plain", engine="torchrun")
    dropped = Dropped()
    for mesh in meshes(asked, asked.devices, "mixed", dropped):
        for size in (mesh.layout.tensor, mesh.layout.context * mesh.layout.tensor, mesh.layout.stage_ranks):
            assert size == 1 or size >= 8
    assert any("on a mesh of 8 have 1 of 7 links; nearest: 1 or 8" in reason for reason in dropped.impossible)
    assert mesh_traps(find_hardware("hgx-h200"), Layout(tensor=2, expert=2)) == []


def test_a_user_may_fix_a_small_group_on_a_mesh() -> None:
    asked = question("atlas-800-a2", 2, pins=Pins(tensor=2))
    assert decoding(best(asked)).tensor == 2


@pytest.mark.parametrize("engine", ["vllm-ascend", "sglang", "torchrun"])
@pytest.mark.parametrize("concurrency", [1, 32, 256])
def test_a2_over_roce_gathers_or_goes_by_node(engine: str, concurrency: int) -> None:
    asked = question("atlas-800-a2", 2, engine=engine, concurrency=concurrency)
    for candidate in rank(asked, asked.topology, Dropped()):
        for role in candidate.roles:
            if role.layout.stage_ranks > 8:
                used = {role.layout.exchange, role.layout.prefill_exchange or role.layout.exchange}
                assert used <= {ALL_GATHER, HIERARCHICAL, ALL_REDUCE}


def test_vllm_ascend_gathers_in_prefill_and_on_one_a2_node() -> None:
    """select_moe_comm_method: MC2 only from EP16 on, with at most 24 experts a device and 512 tokens a rank."""
    asked = question("atlas-800-a2", 2, engine="vllm-ascend")
    both_nodes = Layout(data=16, expert=16, exchange=ALL_GATHER)
    found = {(form.exchange, form.prefill_exchange) for form in forms(asked, both_nodes, "mixed", Dropped())}
    assert found == {(HIERARCHICAL, ALL_GATHER)}
    split_experts = Layout(data=16, expert_tensor=16, exchange=ALL_GATHER)
    assert {form.exchange for form in forms(asked, split_experts, "mixed", Dropped())} == {ALL_GATHER}
    one_node = Layout(data=8, expert=8, exchange=ALL_GATHER)
    assert {form.exchange for form in forms(asked, one_node, "decode", Dropped())} == {ALL_GATHER}


def test_pcie_takes_pipeline_or_gathers_in_8_bits() -> None:
    """No all-to-all kernels without NVLink; L40S links are so slow that stages, not tensor groups, fill the node."""
    slow = question("pcie-l40s", 2, weights="int4", kv_format="plain", concurrency=16)
    layout = decoding(best(slow))
    assert layout.pipeline >= 4 and layout.tensor * layout.data <= 4
    for hardware in ("pcie-l40s", "pcie-rtx-pro-6000"):
        own = question(hardware, 2, weights="int4", kv_format="plain", concurrency=16, engine="torchrun")
        for candidate in rank(own, own.topology, Dropped()):
            for role in candidate.roles:
                if role.layout.stage_ranks > 1 and role.layout.exchange != ALL_REDUCE:
                    assert (role.layout.exchange, role.layout.exchange_bits) == (ALL_GATHER, 8)


def test_h20_takes_smaller_expert_groups_than_h800() -> None:
    """An H20 has 15 % of the compute and more memory bandwidth: spreading experts buys it nothing that its links do not cost."""
    h20, h800 = (decoding(best(question(hardware, 4, concurrency=512))) for hardware in ("hgx-h20-141", "hgx-h800"))
    assert h20.expert <= 8 < h800.expert


def test_a_super_pod_takes_flat_expert_parallelism() -> None:
    layout = decoding(best(question("cloudmatrix384", 4, concurrency=512)))
    assert layout.exchange == "all_to_all"
    assert layout.expert > find_hardware("cloudmatrix384").node_devices
    roce = decoding(best(question("atlas-800-a3", 4, concurrency=512)))
    assert roce.stage_ranks <= 16 or roce.exchange in (ALL_GATHER, HIERARCHICAL)


def test_boxes_are_replicas_where_the_model_fits_one_and_the_links_between_are_weak() -> None:
    asked = question("pcie-rtx-pro-6000", 2, weights="int4", kv_format="plain", concurrency=16)
    winner = best(asked)
    assert [(role.name, role.replicas) for role in winner.roles] == [("mixed", 2)]


def test_a_cpu_holds_whole_experts_on_each_numa_node() -> None:
    asked = question("xeon-6-2s", weights="int4", kv_format="plain", concurrency=4)
    layout = decoding(best(asked))
    assert (layout.expert, layout.expert_tensor) == (2, 1)
    assert all(decoding(each).expert_tensor == 1 for each in rank(asked, asked.topology, Dropped()))


def test_chips_that_share_the_device_string_cuda_do_not_share_a_plan() -> None:
    """Five kinds of hardware, one torch device type; the question is the same but for the chip and its wires."""
    names = ("hgx-h200", "mi300x-8", "metax-c550-8", "iluvatar-bi-v150-8", "kunlunxin-p800-8")
    kinds = {"weights": "int4", "kv_format": "plain", "engine": "torchrun", "concurrency": 64}
    plans = {}
    for name in names:
        asked = question(name, 4, **kinds)
        assert BACKENDS[asked.topology.chip.backend].device_type == "cuda"
        plans[name] = tuple((role.replicas, str(role.layout)) for role in best(asked).roles)
    assert len(set(plans.values())) >= 4, plans
    engines = {name: tuple(engine.name for engine in serving_engines(find_hardware(name))) for name in names}
    assert engines["hgx-h200"] == ("vllm", "sglang")
    assert engines["metax-c550-8"] == ("torchrun",)


def test_two_nodes_of_a100_for_one_user_prefer_stages_to_smaller_tensor_groups() -> None:
    """wtdcode/vllm-backport #38, GLM-5.3 on 2 x 8 A100: PP2 x TP8 is better than 4 x 4."""
    asked = question("hgx-a100", 2, weights="int4", kv_format="plain", concurrency=1, engine="vllm")
    rates = {
        (role.layout.pipeline, role.layout.tensor): each.served.output_rate
        for each in reversed(rank(asked, asked.topology, Dropped()))
        for role in each.roles
        if role.name == "mixed" and role.layout.data == 1 and role.replicas == 1
    }
    assert rates[2, 8] > rates[4, 4]


# -- ranking -----------------------------------------------------------------------------------------------------------


def test_the_ranking_is_ordered_and_its_meshes_differ() -> None:
    asked = question("hgx-h200", 2)
    found = rank(asked, asked.topology, Dropped())
    rates = [candidate.served.output_rate for candidate in found]
    assert rates == sorted(rates, reverse=True)
    assert len({candidate.mesh for candidate in found}) == len(found)


def test_a_request_is_the_sum_of_its_terms() -> None:
    asked = question("hgx-h200", 2)
    for candidate in rank(asked, asked.topology, Dropped())[:5]:
        total = candidate.served.concurrency * 1024 / candidate.served.output_rate
        assert sum(request_terms(asked, candidate).values()) == pytest.approx(total, rel=0.02)


def test_targets_are_met_or_named() -> None:
    met = question("hgx-h200", 2, concurrency=None, tpot=0.030, ttft=2.0)
    for candidate in rank(met, met.topology, Dropped()):
        assert candidate.served.tpot <= 0.030
        assert candidate.served.ttft <= 2.0
    assert best(met).served.concurrency > 32
    with pytest.raises(PlanError, match=r"the lowest TPOT is .* by ") as caught:
        ask(question("hgx-h200", 1, concurrency=None, tpot=1e-5), model="GLM-5")
    assert "more machines, or looser targets" in str(caught.value)


def test_links_change_only_prices_so_meshes_are_laid_out_once() -> None:
    """Speed by structure: the search prices each step once, and 64 devices are a bounded number of them."""
    asked = question("hgx-h200", 8, concurrency=512)
    dropped = Dropped()
    assert len(list(meshes(asked, 64, "mixed", dropped))) < 200
    priced = []
    original = search.prefill_option

    def counted(*arguments):
        priced.append(arguments)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "prefill_option", counted)
        rank(asked, asked.topology, Dropped())
    assert len(priced) < 3000


# -- what would change the choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hardware", "machines"), [("atlas-800-a2", 2), ("hgx-h200", 2)])
def test_the_flip_point_really_flips(hardware: str, machines: int) -> None:
    asked = question(hardware, machines)
    answer = ask(asked, model="GLM-5")
    flips = [flip for flip in answer.flips if flip.at is not None]
    assert flips, "no link changes the choice here: the test looks at nothing"
    names = [level.name for level in asked.topology.levels]
    for flip in flips:
        assert (flip.at > flip.bandwidth) == flip.faster
        for beyond in (1.0, 0.97 if flip.faster else 1.03):
            factor = flip.at / flip.bandwidth * beyond
            topology = asked.topology.scaled(names.index(flip.level), factor)
            winner = rank(dataclasses.replace(asked, topology=topology, known={}), topology, Dropped())[0]
            assert (winner.mesh == answer.best.mesh) == (beyond != 1.0)


def test_answers_say_why_the_second_lost_and_who_can_run_the_first() -> None:
    answer = ask(question("atlas-800-a2", 2, engine="vllm-ascend"), model="GLM-5")
    assert answer.engines["vllm-ascend"] == []
    assert "does not run on npu" in answer.engines["vllm"][0]
    assert answer.why and answer.why == tuple(sorted(answer.why, key=lambda each: -abs(each[1])))
    assert answer.plan.ranks == 16
    answer.plan.check(GLM_5)
    assert sum(answer.plan.roles[-1].layout.stages) == 78


# -- bad input -----------------------------------------------------------------------------------------------------------


def failure(asked) -> str:
    with pytest.raises(PlanError) as caught:
        ask(asked, model="GLM-5")
    return str(caught.value)


def test_seven_ways_of_64_heads() -> None:
    text = failure(question("hgx-h200", 7, pins=Pins(tensor=7)))
    assert "tensor = 7 does not divide 64 attention heads; nearest: 4 or 8" in text
    assert "leave the fixed sizes out" in text


def test_expert_groups_that_do_not_divide_need_copies() -> None:
    asked = question("hgx-h200", 3, concurrency=96, pins=Pins(expert=24))
    layout = decoding(best(asked))
    assert (layout.expert, layout.redundant_experts % 24) == (24, 8)
    assert "expert = 512 does not divide 256 experts" in failure(
        question("hgx-h200", 64, pins=Pins(expert=512, replicas=1, pipeline=1))
    )


def test_nothing_fits_says_by_how_much_and_what_would() -> None:
    text = failure(question("pcie-rtx4090", 1, weights="int4", kv_format="plain"))
    assert "layouts do not fit; the nearest, " in text and "GiB a device" in text
    assert "nearest change: 4 times as many machines (32 devices)" in text


def test_unpublished_figures_are_refused() -> None:
    assert "memory_bandwidth of hygon-bw1000 is unknown" in failure(question("hygon-bw1000-8", weights="w4a8", kv_format="plain"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": None}, "either a concurrency, or targets"),
        ({"concurrency": 1, "tpot": 0.05}, "either a concurrency, or targets"),
        ({"weights": "int8"}, "weights = 'int8'"),
        ({"kv_format": "fp4"}, "kv = 'fp4'"),
        ({"work": Workload(202_000, 1_000, 8192)}, "input \\+ output = 203,000 tokens, but this model was made for 202,752"),
    ],
)
def test_questions_that_contradict_themselves(changes, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ask(question("hgx-h200", 1, **changes), model="GLM-5")


def test_an_engine_that_cannot_is_refused_with_its_reasons() -> None:
    text = failure(question("hgx-h200", 1, weights="w4a8", engine="vllm"))
    assert "the engine: vllm loads bf16, fp8, int4 on cuda, not w4a8" in text
    assert "vllm 0.33.0 does not run on npu" in failure(question("atlas-800-a2", 2, engine="vllm"))


@pytest.mark.parametrize("hardware", topology_names())
def test_every_topology_gets_a_plan_or_a_reason(hardware: str) -> None:
    topology = find_hardware(hardware)
    machines = -(-32 // topology.node_devices) if topology.chip.backend != "cpu" else 1
    asked = question(hardware, machines, weights="int4", kv_format="plain", engine="torchrun", concurrency=16)
    if topology.chip.missing():
        assert "figures are missing" in failure(asked)
        return
    answer = ask(asked, model="GLM-5", with_flips=False)
    assert answer.plan.ranks == asked.devices
    assert all(memory.pool >= 0 for memory in answer.best.memory)


def test_engines_answer_for_themselves() -> None:
    assert list(ENGINES) == ["vllm", "sglang", "vllm-ascend", "torchrun"]
    mesh = Mesh(Layout(data=8, expert=8, exchange=ALL_GATHER, overlap=True, drafts=3), 1)
    reasons = ENGINES["vllm"].reasons(find_hardware("hgx-h200"), mesh.layout, "mixed", "fp8", GLM_5)
    assert any("excludes MTP" in reason for reason in reasons)
