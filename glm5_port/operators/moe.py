"""The mixture of experts: which experts a token goes to, and what they compute.

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; G groups; k choices per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.linear import gated_mlp
from glm5_port.operators.norm import accumulation_dtype
from glm5_port.registry import LONG_SUMS


def routing_scores(hidden: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(hidden gate^T), [T, E], in float32 (float64 for float64 inputs)."""
    wide = accumulation_dtype(hidden)
    return torch.sigmoid(F.linear(hidden.to(wide), gate.to(wide)))


def group_scores(biased_TE: Tensor, groups: int) -> Tensor:
    """The sum of the two best biased scores of each group, [T, G]."""
    return biased_TE.unflatten(1, (groups, -1)).sort(dim=-1, descending=True).values[..., :2].sum(-1)


def keep_best_groups(biased_TE: Tensor, groups: int, groups_kept: int) -> Tensor:
    """`biased_TE` with -inf for the experts outside the `groups_kept` best groups; ties go to the lower group."""
    order_TG = group_scores(biased_TE, groups).sort(dim=-1, descending=True, stable=True).indices
    dropped_TG = torch.ones_like(order_TG, dtype=torch.bool).scatter(1, order_TG[:, :groups_kept], False)
    dropped_TE = dropped_TG.repeat_interleave(biased_TE.shape[1] // groups, dim=1)
    return biased_TE.masked_fill(dropped_TE, float("-inf"))


def check_routing(experts: int, top_k: int, groups: int, groups_kept: int) -> None:
    """Raises InputError unless `top_k` experts can be chosen out of the groups that are kept."""
    asked = f"route_experts: top_k={top_k}, groups={groups}, groups_kept={groups_kept} with {experts} experts"
    if groups < 1 or experts % groups or experts // groups < 2:
        raise InputError(
            f"{asked}: a group's score is the sum of its two best experts, so experts must divide into groups of at least 2.\n"
            "  Give a number of groups (config: n_group) that divides the number of experts."
        )
    if not 1 <= groups_kept <= groups:
        raise InputError(f"{asked}: groups_kept (config: topk_group) must be between 1 and groups.")
    if not 1 <= top_k <= groups_kept * (experts // groups):
        raise InputError(
            f"{asked}: the kept groups hold {groups_kept * (experts // groups)} experts; top_k must be between 1 and that."
        )


@operator(
    facts={
        "width": lambda hidden, **_: hidden.shape[1],
        "experts": lambda gate, **_: gate.shape[0],
        "top_k": lambda top_k, **_: top_k,
        "groups": lambda groups, **_: groups,
        "groups_kept": lambda groups_kept, **_: groups_kept,
        "renormalise": lambda renormalise, **_: renormalise,
    },
    fake=lambda hidden, gate, correction_bias, *, top_k, groups, groups_kept, renormalise, scale: (
        hidden.new_empty((hidden.shape[0], top_k), dtype=accumulation_dtype(hidden)),
        hidden.new_empty((hidden.shape[0], top_k), dtype=torch.int32),
    ),
    weights=("gate", "correction_bias"),
    budget=LONG_SUMS,
)
def route_experts(
    hidden: Tensor,
    gate: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int,
    groups: int,
    groups_kept: int,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Chooses each token's experts by biased sigmoid scores, and weighs them by the unbiased ones.

    s = sigmoid(hidden gate^T); b = s + correction_bias; a group's score is the sum of its two best b; experts outside the
    groups_kept best groups are out; ids = the top_k of b; weights = scale * s[ids] / (sum of s[ids] + 1e-20 when renormalise,
    else 1). All of it in float32 (float64 for float64 inputs).

    Args:
        hidden: [T, D], any floating dtype.
        gate: [E, D], same dtype.
        correction_bias: [E], float32: its spread is a few bfloat16 steps around an offset, so a narrower one reorders experts.
        top_k: choices per token.
        groups: the experts are split into this many runs of equal length.
        groups_kept: how many groups a token may choose from.
        renormalise: divides by the sum of the chosen scores.
        scale: factor of the weights (config: routed_scaling_factor).

    Returns:
        weights [T, k] float32 (float64 for float64 inputs) and ids [T, k] int32, by descending biased score.

    Contract:
        Equal biased scores go to the lower id, equal groups to the lower group. A NaN score ranks above every number. A row
        with NaN gives NaN weights. No tokens: empty results. Ids are distinct. Deterministic.

    Raises:
        InputError: the experts do not divide into groups of at least two, or top_k does not fit the kept groups.

    Source: GLM-5 `GlmMoeDsaTopkRouter` (`noaux_tc` of DeepSeek-V3); groups are masked with -inf as in DeepSeek's reference.
    """
    check_routing(gate.shape[0], top_k, groups, groups_kept)
    scores_TE = routing_scores(hidden, gate)
    biased_TE = keep_best_groups(scores_TE + correction_bias.to(scores_TE.dtype), groups, groups_kept)
    ids_Tk = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_Tk = scores_TE.gather(1, ids_Tk)
    if renormalise:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return weights_Tk * scale, ids_Tk.to(torch.int32)


def mix_experts(hidden: Tensor, route_weights: Tensor, ids: Tensor, experts: int, result_of: Callable[[int], Tensor]) -> Tensor:
    """The references' sum over a token's choices: every expert's results of all tokens, [T, D], weighed and summed in routing
    order. Ids outside 0 .. experts - 1 contribute nothing."""
    wide = accumulation_dtype(hidden)
    terms_TkD = torch.zeros((*ids.shape, hidden.shape[1]), dtype=wide, device=hidden.device)
    for expert in range(experts):  # every expert sees every token: nothing to group, and no host sync
        result_TD = result_of(expert).to(wide)
        chosen_Tk = ids == expert
        weights_Tk = torch.where(chosen_Tk, route_weights, 0.0).to(wide)  # before the product: what is not read may be NaN
        terms_TkD = torch.where(chosen_Tk.unsqueeze(2), result_TD.unsqueeze(1) * weights_Tk.unsqueeze(2), terms_TkD)
    total_TD = torch.zeros_like(hidden, dtype=wide)
    for term_TD in terms_TkD.unbind(1):  # in routing order: a floating-point sum depends on it
        total_TD = total_TD + term_TD
    return total_TD.to(hidden.dtype)


@operator(
    facts={
        "width": lambda gate_up, **_: gate_up.shape[2],
        "width_between": lambda down, **_: down.shape[2],
        "experts": lambda gate_up, **_: gate_up.shape[0],
        "top_k": lambda ids, **_: ids.shape[1],
    },
    fake=lambda hidden, route_weights, ids, gate_up, down: torch.empty_like(hidden),
    weights=("gate_up", "down"),
    budget=LONG_SUMS,
)
def expert_mlp(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sends each token through its chosen experts and sums their results by the routing weights.

    y_t = sum over j of route_weights[t, j] * gated_mlp(hidden_t; expert ids[t, j]), summed in routing order in float32
    (float64 for float64 inputs) and rounded once.

    Args:
        hidden: [T, D], any floating dtype.
        route_weights: [T, k] float32 (or wider), from `route_experts`.
        ids: [T, k] int32. An id outside 0..E-1 contributes nothing: under expert parallelism the caller subtracts the first
            expert of its rank.
        gate_up: [E, 2F, D], per expert the rows of the gate projection, then those of the up projection.
        down: [E, D, F].

    Returns:
        [T, D] in the dtype of hidden.

    Contract:
        Tokens are independent. An expert's result is rounded to the working dtype before it is weighed, as in `gated_mlp`; an
        implementation may keep it wider. A token without any id in range gives zeros. An id that appears twice counts
        twice. The route weight of an id outside the range is not read. Experts without tokens and no tokens at all are fine.
        Deterministic. Gradients reach hidden, route_weights, gate_up and down.

    Raises:
        Nothing of its own.

    Source: GLM-5 `GlmMoeDsaNaiveMoe`; combined in float32 as in the grouped form of transformers and DeepSeek's reference.
    """
    return mix_experts(hidden, route_weights, ids, gate_up.shape[0], lambda e: gated_mlp.reference(hidden, gate_up[e], down[e]))
