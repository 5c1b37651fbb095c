"""dispatch_tokens and combine_tokens between four processes on two machines of two ranks, and the model on them in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.parallel.collectives import topology_of
from benchmarks.parallel.links import Wires
from glm5_port.parallel.cost.compute import imbalance
from glm5_port.parallel.cost.service import TERMS
from glm5_port.parallel.cost.step import Step, model_size
from glm5_port.parallel.plan import PREFILL, Layout
from tests.distributed.launching import on_ranks
from tests.distributed.scenes import EVEN_CHOICES, EVEN_EXPERTS, EVEN_TOKENS, EVEN_WIDTH
from tests.model.models import quick_config

FORMS = ("all_gather", "all_to_all", "deduplicated", "hierarchical")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(4, "tests.distributed.scenes:exchanges", tmp_path_factory.mktemp("exchanges"))


@pytest.mark.parametrize("copies", ["", " with copies"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_one_process(found: list[dict[str, dict[str, Any]]], form: str, copies: str) -> None:
    for rank, each in enumerate(found):
        assert each[form + copies]["error"] < 1, f"rank {rank}"
        assert each[f"{form}{copies} in 8 bits"]["error"] < 1, f"rank {rank}: beyond the stated bound"


def test_eight_bits_round_at_all(found: list[dict[str, dict[str, Any]]]) -> None:
    assert any(each[f"{form} in 8 bits"]["error"] > 0.1 for each in found for form in FORMS)


def test_forms_send_copies_as_they_say(found: list[dict[str, dict[str, Any]]]) -> None:
    """A row for each choice, for each rank, or every token."""
    tokens, choices = 9 + 0 + 4 + 6, 3
    rows = {form: sum(each[form]["rows"] for each in found) for form in FORMS}
    assert rows["all_to_all"] == tokens * choices - 3, "a choice of -1 on each rank that has tokens is none"
    assert rows["all_gather"] == 7 * 4 * 4
    assert tokens <= rows["deduplicated"] < rows["all_to_all"]
    assert rows["hierarchical"] == rows["deduplicated"]
    sent = {form: sum(each[form]["sent"] for each in found) for form in FORMS}
    assert sent["deduplicated"] < sent["all_to_all"]
    for form in FORMS:
        assert sum(each[f"{form} in 8 bits"]["sent"] for each in found) < 0.8 * sent[form]


def test_every_form_sends_the_bytes_that_the_cost_model_charges(tmp_path: Path) -> None:
    """The second hop of "hierarchical" carries what other ranks brought, so that a fake process group cannot count it
    (test_counts.py); four real processes on two machines can. Routes are random: their expectation is charged."""
    found = on_ranks(4, "tests.distributed.scenes:even_exchanges", tmp_path)
    of = quick_config(
        hidden_size=EVEN_WIDTH, n_routed_experts=EVEN_EXPERTS, num_experts_per_tok=EVEN_CHOICES, n_group=1, topk_group=1
    )
    two_of_two = topology_of(Wires(machines=2, ranks=2, between="100 Mb/s", inside="100 Mb/s"))
    for form in FORMS:
        step = Step(
            config=of, topology=two_of_two, layout=Layout(data=4, expert=4, exchange=form), weights="bf16", kv_format="plain",
            phase=PREFILL, tokens=EVEN_TOKENS, sequences=1, context=EVEN_TOKENS, groups=4, calls=1, size=model_size(of),
        )  # fmt: skip
        layers = len(of.moe_layers) * (1.0 if form == "all_gather" else imbalance(step))
        charged = sum(TERMS[name].of(step).link_bytes for name in ("expert dispatch", "expert combine")) / layers
        sent = sum(each[form] for each in found) / 4
        assert sent == pytest.approx(charged, rel=1e-6 if form == "all_gather" else 0.03), form


def test_a_model_in_8_bits_is_one_process_that_rounds(tmp_path: Path) -> None:
    for each in on_ranks(2, "tests.distributed.scenes:quantised", tmp_path):
        assert each["rounding"] > 1e-3, "rounding must show"
        for form in ("all_to_all", "deduplicated"):
            assert each[f"{form} from rounded"] < 1e-5
        assert each["all_gather from 16 bits"] < 4 * each["rounding"]  # rounds sums too


def test_ranks_that_select_differently_stop(tmp_path: Path) -> None:
    for text in on_ranks(2, "tests.distributed.scenes:other_selection", tmp_path):
        assert text.startswith("ranks of one tensor group selected different positions")
        assert "rank 0: selection" in text and "rank 1: selection" in text
