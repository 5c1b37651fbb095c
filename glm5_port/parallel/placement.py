"""Which expert lies in which slot of which expert group, with copies of the much-used ones.

Greedy, as in DeepSeek's EPLB: each copy goes to the expert whose copies carry most, then the heaviest copy to the group that
carries least and has room. Without loads and without copies experts lie in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.errors import PlanError


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts in slots.

    Attributes:
        groups: for each expert group, the expert in each of its slots.
    """

    groups: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> int:
        """Of one group."""
        return len(self.groups[0])

    def table(self) -> Tensor:
        """[E, C] int32: slots of each expert's copies, in turns, as `dispatch_tokens` reads it."""
        held: dict[int, list[int]] = {}
        for slot, expert in enumerate(expert for group in self.groups for expert in group):
            held.setdefault(expert, []).append(slot)
        copies = max(len(slots) for slots in held.values())
        rows = [[held[expert][turn % len(held[expert])] for turn in range(copies)] for expert in range(len(held))]
        return torch.tensor(rows, dtype=torch.int32)

    def imbalance(self, loads: Sequence[float]) -> float:
        """Largest load of a group over the mean, when an expert's copies share its tokens evenly."""
        copies = [sum(group.count(expert) for group in self.groups) for expert in range(len(loads))]
        carried = [sum(loads[expert] / copies[expert] for expert in group) for group in self.groups]
        return max(carried) / (sum(carried) / len(carried))


def place(experts: int, groups: int, redundant: int = 0, loads: Sequence[float] | None = None) -> Placement:
    """A placement.

    Args:
        experts: E.
        groups: expert groups; they hold equally many slots, so they divide experts + redundant.
        redundant: copies beyond one of each.
        loads: tokens of each expert, as counted; None: all alike.

    Raises:
        PlanError: sizes that do not divide, loads of other experts, or more copies than groups to hold them.
    """
    if (experts + redundant) % groups:
        raise PlanError(f"{experts} experts and {redundant} redundant ones do not divide into {groups} groups")
    if loads is not None and (len(loads) != experts or min(loads) < 0):
        raise PlanError(f"{len(loads)} loads for {experts} experts; expected as many numbers, none below zero")
    if redundant > experts * (groups - 1):
        raise PlanError(f"{redundant} redundant experts: {groups} groups hold at most {experts * (groups - 1)} useful copies")
    slots = (experts + redundant) // groups
    if loads is None and not redundant:
        return Placement(tuple(tuple(range(group * slots, (group + 1) * slots)) for group in range(groups)))
    weights = [1.0] * experts if loads is None else [float(load) for load in loads]
    copies = [1] * experts
    for _ in range(redundant):
        free = (expert for expert in range(experts) if copies[expert] < groups)
        copies[max(free, key=lambda expert: (weights[expert] / copies[expert], -expert))] += 1
    return Placement(_pack(copies, weights, groups, slots))


def _pack(copies: Sequence[int], weights: Sequence[float], groups: int, slots: int) -> tuple[tuple[int, ...], ...]:
    """Copies in groups of `slots`: copied experts first, so that no group is left with two of one; then by weight."""
    share = {expert: weights[expert] / count for expert, count in enumerate(copies)}
    held: list[list[int]] = [[] for _ in range(groups)]
    carried = [0.0] * groups
    for expert in sorted(share, key=lambda expert: (-(copies[expert] > 1), -share[expert], expert)):
        for _ in range(copies[expert]):
            open_groups = [group for group in range(groups) if len(held[group]) < slots]
            fresh = [group for group in open_groups if expert not in held[group]]
            group = min(fresh or open_groups, key=lambda group: (carried[group], group))
            held[group].append(expert)
            carried[group] += share[expert]
    return tuple(tuple(sorted(group)) for group in held)
