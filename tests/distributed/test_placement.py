"""Experts in slots: every expert has one, copies go where the load is, and no group has two of one expert."""

from __future__ import annotations

import random

import pytest

from glm5_port.errors import PlanError
from glm5_port.parallel.placement import place


def test_without_copies_experts_lie_in_their_order() -> None:
    assert place(8, 4).groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert place(8, 4).table().tolist() == [[slot] for slot in range(8)]


@pytest.mark.parametrize(("experts", "groups", "redundant"), [(8, 4, 4), (256, 32, 32), (256, 64, 64), (256, 16, 0), (16, 4, 16)])
def test_copies_even_out_a_skewed_load(experts: int, groups: int, redundant: int) -> None:
    chance = random.Random(experts + redundant)
    loads = [chance.paretovariate(1.5) for _ in range(experts)]
    placed = place(experts, groups, redundant, loads)
    held = [expert for group in placed.groups for expert in group]
    assert set(held) == set(range(experts)) and len(held) == experts + redundant
    assert {len(group) for group in placed.groups} == {(experts + redundant) // groups}
    assert all(len(set(group)) == len(group) for group in placed.groups), "two copies in one group"
    assert placed.imbalance(loads) <= place(experts, groups).imbalance(loads)
    if redundant:
        assert placed.imbalance(loads) < place(experts, groups).imbalance(loads)
        copied = {expert for expert in held if held.count(expert) > 1}
        assert max(range(experts), key=loads.__getitem__) in copied
    rows = placed.table()
    slots = (experts + redundant) // groups
    for expert, row in enumerate(rows.tolist()):
        assert {placed.groups[slot // slots][slot % slots] for slot in row} == {expert}
    assert {slot for row in rows.tolist() for slot in row} == set(range(experts + redundant)), "a slot that no token reaches"


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="8 experts and 1 redundant ones do not divide into 4 groups"):
        place(8, 4, 1)
    with pytest.raises(PlanError, match="2 loads for 8 experts"):
        place(8, 4, 0, [1.0, 2.0])
    with pytest.raises(PlanError, match="16 redundant experts: 2 groups hold at most 8 useful copies"):
        place(8, 2, 16)
