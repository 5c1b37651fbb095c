"""Plans as data: validation with every reason, JSON there and back, ranks on both meshes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from glm5_port.errors import PlanError
from glm5_port.parallel.plan import Layout, ParallelPlan, Role, even, problems
from tests.parallel.questions import GLM_5

LAYOUT = Layout(
    tensor=2, data=4, pipeline=2, expert=8, exchange="hierarchical", prefill_exchange="all_gather", exchange_bits=8, drafts=3
)
PLAN = ParallelPlan(
    model="GLM-5",
    hardware="hgx-h200",
    node_devices=8,
    weights="fp8",
    kv_format="fp8",
    roles=(
        Role(name="prefill", layout=Layout(context=8, expert=8, exchange="all_gather"), replicas=2),
        Role(name="decode", layout=even(LAYOUT, 78)),
    ),
    max_context=5120,
    max_sequences=8,
    chunk=8192,
)


def test_json_there_and_back(tmp_path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert ParallelPlan.load(tmp_path / "plan.json") == PLAN
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["format"] == 1
    assert data["roles"][1]["layout"]["stages"] == [39, 39]
    assert ParallelPlan.from_dict(PLAN.as_dict()) == PLAN
    PLAN.check(GLM_5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "no plan of format 1"),
        (lambda d: d.pop("format"), "no plan of format 1"),
        (lambda d: d.update(modell="x"), "no key 'modell'; did you mean model"),
        (lambda d: d.pop("weights"), "a plan is not whole"),
        (lambda d: d.update(roles={}), "list of roles"),
        (lambda d: d["roles"][0].pop("layout"), "a layout is a mapping"),
        (lambda d: d["roles"][0]["layout"].update(tensr=2), "no key 'tensr'; did you mean tensor"),
        (lambda d: d["roles"][0]["layout"].update(tensor="2"), "tensor of a layout is '2'; expected int"),
        (lambda d: d["roles"][0]["layout"].update(overlap=1), "overlap of a layout is 1; expected bool"),
        (lambda d: d["roles"][0].update(replicas=True), "replicas of a role is True"),
    ],
)
def test_json_that_is_no_plan(change, message: str) -> None:
    data = json.loads(json.dumps(PLAN.as_dict()))
    change(data)
    with pytest.raises(PlanError, match=message):
        ParallelPlan.from_dict(data)


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(PlanError, match="cannot be read as a plan"):
        ParallelPlan.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="cannot be read as a plan"):
        ParallelPlan.load(tmp_path / "broken.json")


def test_another_number_of_ranks_is_refused_before_anything_is_read() -> None:
    assert PLAN.ranks == 2 * 8 + 16
    PLAN.check_world(32)
    with pytest.raises(PlanError, match=r"for 32 ranks, and 16 were started"):
        PLAN.check_world(16)


@pytest.mark.parametrize(
    ("layout", "role", "reasons"),
    [
        (Layout(tensor=7, expert=7), "mixed", ["tensor = 7 does not divide 64 attention heads; nearest: 4 or 8"]),
        (
            Layout(data=12, expert=12, exchange="all_gather"),
            "mixed",
            ["expert = 12 does not divide 256 experts; nearest: 8 or 16, or 8 redundant experts"],
        ),
        (Layout(data=8, expert=4), "mixed", ["expert x expert_tensor = 4 x 1", "all_reduce needs every rank"]),
        (Layout(data=2, expert=2), "mixed", ["exchange = all_reduce needs every rank to hold every token"]),
        (Layout(tensor=2, expert_tensor=2, exchange="all_to_all"), "mixed", ["sends whole tokens to whole experts"]),
        (Layout(tensor=4, decode_context=3, expert=4), "mixed", ["decode_context = 3 does not divide 4 ranks"]),
        (Layout(tensor=2, decode_context=2, expert=2), "prefill", ["a prefill role has `context` instead"]),
        (Layout(context=2, expert=2, exchange="all_gather"), "decode", ["a prefill role has it, not a decode one"]),
        (Layout(pipeline=100), "mixed", ["pipeline = 100: there are 78 layers"]),
        (Layout(pipeline=2, stages=(40, 40)), "mixed", ["expected 2 numbers that add up to 78"]),
        (Layout(exchange="allgather"), "mixed", ["did you mean all_gather"]),
        (Layout(exchange_bits=4), "mixed", ["exchange_bits = 4: 8 or 16"]),
        (Layout(tensor=0), "mixed", ["tensor = 0: it must be at least 1"]),
    ],
)
def test_impossible_layouts_say_every_reason_and_the_nearest(layout: Layout, role: str, reasons: list[str]) -> None:
    found = problems(layout, GLM_5, role)
    for reason in reasons:
        assert any(reason in each for each in found), found


def test_a_plan_says_all_reasons_of_all_roles() -> None:
    wrong = dataclasses.replace(
        PLAN, weights="fp7", roles=(Role(name="mixed", layout=Layout(tensor=7, expert=7, drafts=1), replicas=0),)
    )
    without_mtp = dataclasses.replace(GLM_5, num_nextn_predict_layers=0)
    with pytest.raises(PlanError) as caught:
        wrong.check(without_mtp)
    for reason in ("did you mean fp8", "7 does not divide 64", "no MTP layer", "replicas = 0", "expert = 7 does not divide 256"):
        assert reason in str(caught.value)
    with pytest.raises(PlanError, match="one mixed role, or prefill and decode"):
        dataclasses.replace(PLAN, roles=PLAN.roles[:1]).check(GLM_5)


def test_every_rank_has_one_place_on_both_meshes() -> None:
    seen = set()
    for rank in range(LAYOUT.ranks):
        place = LAYOUT.coordinates(rank)
        assert rank == ((place["pipeline"] * 4 + place["data"]) * 1 + place["context"]) * 2 + place["tensor"]
        seen.add((place["pipeline"], place["expert"], place["expert_tensor"]))
    assert len(seen) == LAYOUT.ranks == 16


def test_a_phase_has_one_exchange() -> None:
    assert LAYOUT.in_phase("prefill").exchange == "all_gather"
    assert LAYOUT.in_phase("decode").exchange == "hierarchical"
    assert LAYOUT.in_phase("prefill").prefill_exchange == LAYOUT.in_phase("decode").prefill_exchange == ""


@pytest.mark.parametrize("stages", [1, 2, 4, 5, 16])
def test_stages_are_even_and_cover_every_layer(stages: int) -> None:
    ranges = Layout(pipeline=stages).stage_layers(78)
    assert [layer for each in ranges for layer in each] == list(range(78))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
