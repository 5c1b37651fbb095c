"""Parity cases of `glm5_port.operators.moe`, and how routing is compared: weights by value, ids by the tie rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.moe import expert_mlp, group_scores, keep_best_groups, route_experts, routing_scores
from glm5_port.testing.cases import TIES, WIDTH, Case, Make, Sweep, suite
from glm5_port.testing.comparison import Outcome, allowed_error, check_equal, check_form, check_within_budget


def _biased(arguments: dict[str, Any]) -> Tensor:
    """The biased scores of every expert, before groups are masked."""
    scores = routing_scores(arguments["hidden"], arguments["gate"])
    return scores + arguments["correction_bias"].to(scores.dtype)


def compare_routing(outcome: Outcome) -> list[str]:
    """Ids may differ from the gold's only where scores are as near as the reference's own error; exact cases not even there.
    Weights are held to the budget in the rows whose ids agree."""
    weights, ids = outcome.outputs
    for output, reference in zip(outcome.outputs, outcome.reference, strict=True):
        if problem := check_form(output, reference):
            return [problem]
    if outcome.case.exact:
        problems = [f"ids: {p}" for p in check_equal(ids, outcome.gold[1])]
    else:
        problems = _explain_other_ids(outcome, ids)
    agree = (ids == outcome.gold[1]).all(1)
    reference_agrees = agree & (outcome.reference[1] == outcome.gold[1]).all(1)
    rows = [tensor[reference_agrees] for tensor in (weights, outcome.reference[0], outcome.gold[0])]
    return problems + [f"weights: {p}" for p in check_within_budget(outcome, *rows)]


def _explain_other_ids(outcome: Outcome, ids: Tensor) -> list[str]:
    arguments, gold = dict(outcome.gold_arguments), _biased(dict(outcome.gold_arguments))
    error = (_biased(dict(outcome.arguments)).double() - gold).abs().nan_to_num(0.0).max().item() if gold.numel() else 0.0
    near = 2 * allowed_error(outcome.budget, error, outcome.outputs[0].dtype)
    groups, kept = arguments["groups"], arguments["groups_kept"]
    problems = []
    for row in (ids != outcome.gold[1]).any(1).nonzero().flatten().tolist():
        mine, theirs = ids[row].long(), outcome.gold[1][row].long()
        if mine.unique().numel() != mine.numel() or mine.min() < 0 or mine.max() >= gold.shape[1]:
            problems.append(f"row {row}: ids {mine.tolist()} are not distinct experts")
            continue
        of_groups = group_scores(gold[row : row + 1], groups)[0].sort(descending=True).values
        if kept < groups and of_groups[kept - 1] - of_groups[kept] <= 2 * near:
            continue  # the choice of groups itself is within the error
        masked = keep_best_groups(gold[row : row + 1], groups, kept)[0]
        if not ((masked[mine] - masked[theirs]).abs() <= near).all():  # rank by rank: the order is part of the contract
            problems.append(f"row {row}: ids {mine.tolist()} instead of {theirs.tolist()}, further apart than {near:.2g}")
    return problems


@suite(route_experts, compare=compare_routing, rows=("hidden",))
def route_experts_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, tokens: int, experts: int = 16, width: int = 64, top_k: int = 4, groups: int = 1, groups_kept: int = 1,
        renormalise: bool = True, scale: float = 2.5,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "hidden": make.normal(tokens, width),
            "gate": make.normal(experts, width, std=width**-0.5),
            "correction_bias": make.normal(experts, mean=8.0, std=0.1, dtype=torch.float32),
            "top_k": top_k,
            "groups": groups,
            "groups_kept": groups_kept,
            "renormalise": renormalise,
            "scale": scale,
        }

    def tied(make: Make, groups: int = 1, groups_kept: int = 1) -> dict[str, Any]:
        made = arguments(make, 6, groups=groups, groups_kept=groups_kept)
        return {**made, "gate": make.zeros(16, 64), "correction_bias": make.zeros(16, dtype=torch.float32)}

    def few_values(make: Make, groups: int = 1, groups_kept: int = 1) -> dict[str, Any]:
        """Logits are small integers, so that experts share scores exactly."""
        made = arguments(make, 40, groups=groups, groups_kept=groups_kept)
        made["hidden"] = make.integers(40, 64, low=-1, high=2) * (torch.arange(64) < 5)
        made["gate"] = make.integers(16, 64, low=-1, high=2)
        return {**made, "correction_bias": make.integers(16, low=0, high=2, dtype=torch.float32)}

    def negative_bias(make: Make) -> dict[str, Any]:
        made = arguments(make, 9, groups=4, groups_kept=1)
        return {**made, "correction_bias": make.normal(16, mean=-3.0, std=0.2, dtype=torch.float32)}

    def one_nan(make: Make) -> dict[str, Any]:
        made = arguments(make, 4)
        made["hidden"][2, 7] = float("nan")
        return made

    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("odd_sizes", lambda make: arguments(make, 13, experts=21, width=77, top_k=3))
    yield Case("groups", lambda make: arguments(make, 33, groups=4, groups_kept=2))
    yield Case("top_k_fills_the_groups", lambda make: arguments(make, 5, top_k=8, groups=4, groups_kept=2))
    yield Case("negative_biased_scores", negative_bias)
    yield Case("not_renormalised", lambda make: arguments(make, 7, renormalise=False, scale=1.0))
    yield Case("top_1", lambda make: arguments(make, 7, top_k=1))
    yield Case("all_experts", lambda make: arguments(make, 7, top_k=16))
    yield Case("not_a_number", one_nan)
    yield Case("all_equal", lambda make: tied(make), exact=True, tags=TIES)
    yield Case("equal_groups", lambda make: tied(make, groups=8, groups_kept=3), exact=True, tags=TIES)
    yield Case("few_values", lambda make: few_values(make), exact=True, tags=TIES)
    yield Case("few_values_in_groups", lambda make: few_values(make, groups=4, groups_kept=2), exact=True, tags=TIES)
    yield Case("glm5_router", lambda make: arguments(make, 5, experts=256, width=6144, top_k=8), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        groups, of_group = make.one_of(1, make.size(1, 8)), make.size(2, 40)
        kept = make.size(1, groups)
        sizes = {
            "width": make.size(1, 200),
            "top_k": make.size(1, min(kept * of_group, 16)),
            "groups": groups,
            "groups_kept": kept,
        }
        return arguments(make, make.size(0, 60), groups * of_group, **sizes, renormalise=make.one_of(False, True))

    yield Sweep(random)


@suite(expert_mlp, rows=("hidden", "route_weights", "ids"))
def expert_mlp_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make,
        tokens: int,
        experts: int = 8,
        width: int = 64,
        between: int = 48,
        choices: int = 3,
        low: int = 0,
        high: int = -1,
    ) -> dict[str, Any]:
        return {
            "hidden": make.normal(tokens, width),
            "route_weights": make.uniform(tokens, choices, low=0.1, dtype=torch.float32),
            "ids": make.integers(tokens, choices, low=low, high=experts if high < 0 else high, dtype=torch.int32),
            "gate_up": make.normal(experts, 2 * between, width, std=width**-0.5),
            "down": make.normal(experts, width, between, std=between**-0.5),
        }

    def with_ids(make: Make, ids: list[list[int]]) -> dict[str, Any]:
        return {**arguments(make, len(ids), choices=len(ids[0])), "ids": torch.tensor(ids, dtype=torch.int32)}

    def unread_weights(make: Make) -> dict[str, Any]:
        made = arguments(make, 9, low=-3, high=12)
        outside = (made["ids"] < 0) | (made["ids"] >= 8)
        return {**made, "route_weights": made["route_weights"].masked_fill(outside, float("nan"))}

    def one_nan(make: Make) -> dict[str, Any]:
        made = arguments(make, 5)
        made["hidden"][2, 7] = float("nan")
        return made

    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("odd_sizes", lambda make: arguments(make, 13, experts=5, width=77, between=33, choices=2))
    yield Case("more_experts_than_rows", lambda make: arguments(make, 3, experts=64))
    yield Case("many_rows_per_expert", lambda make: arguments(make, 150, experts=4))
    yield Case("one_choice", lambda make: arguments(make, 7, choices=1))
    yield Case("one_expert", lambda make: arguments(make, 7, experts=1, choices=1))
    yield Case("one_expert_gets_everything", lambda make: arguments(make, 40, experts=16, choices=1, low=11, high=12))
    yield Case("some_experts_get_nothing", lambda make: arguments(make, 30, experts=16, low=5, high=9))
    yield Case("ids_out_of_range", lambda make: arguments(make, 30, low=-9, high=20))
    yield Case("all_ids_out_of_range", lambda make: with_ids(make, [[-1, 8], [8, 2**31 - 1], [-(2**31), -1]]))
    yield Case("an_id_twice", lambda make: with_ids(make, [[3, 3, 1], [0, 7, 0]]))
    yield Case("unread_weights", unread_weights)
    yield Case("not_a_number", one_nan)
    yield Case(
        "large_weights", lambda make: {**arguments(make, 5), "route_weights": make.normal(5, 3, std=50.0, dtype=torch.float32)}
    )
    yield Case(
        "glm5_experts",
        lambda make: arguments(make, 3, experts=2, width=6144, between=2048, choices=2),
        tags=WIDTH,
        dtypes=(torch.float32, torch.bfloat16),  # 300 MB in float32, and the gold needs twice that
    )

    def random(make: Make) -> dict[str, Any]:
        experts, tokens = make.size(1, 20), make.one_of(1, make.size(0, 12), make.size(0, 150))
        sizes = {"width": make.size(1, 150), "between": make.size(1, 100), "choices": make.size(1, 4)}
        return arguments(make, tokens, experts, **sizes, low=make.one_of(0, -2), high=experts + make.one_of(0, 3))

    yield Sweep(random)
