"""Triton route_experts. Shape legend: T tokens; D hidden size; E experts; k choices per token; S pieces of the hidden size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import WORKSPACE_BYTES, check_shapes, kernels, launch, power_of_two, rows_of, triton
from glm5_port.operators.moe import check_routing, route_experts

BLOCK_T, BLOCK_E, BLOCK_K = 16, 32, 128
PIECE = 512
"""Inputs that one program sums."""
CHOOSING = 8
"""Tokens whose experts one program chooses: two for each of its warps."""
MOST_EXPERTS = 1024


def _not_supported(*, experts: int, **_: Any) -> list[str]:
    return [f"takes at most {MOST_EXPERTS} experts, not {experts}"] if experts > MOST_EXPERTS else []


@triton(route_experts, not_supported=_not_supported)
def route_experts_triton(
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
    experts = gate.shape[0]
    check_routing(experts, top_k, groups, groups_kept)
    hidden_TD, gate_ED = rows_of(hidden), rows_of(gate.to(hidden.dtype))
    tokens, width = hidden_TD.shape
    check_shapes("route_experts", gate=(gate_ED, (experts, width)), correction_bias=(correction_bias, (experts,)))
    pieces, device = -(-width // PIECE), hidden.device
    together = max(CHOOSING, WORKSPACE_BYTES // (4 * pieces * experts) // CHOOSING * CHOOSING)
    partial_STE = torch.empty((pieces, min(tokens, together), experts), dtype=torch.float32, device=device)
    bias_E = correction_bias.detach().to(torch.float32).contiguous()
    weights_Tk = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    ids_Tk = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    module = kernels("routing")
    for first in range(0, tokens, together):
        count = min(together, tokens - first)
        launch(
            module.partial_logits,
            (-(-experts // BLOCK_E), pieces, -(-count // BLOCK_T)),
            hidden_TD[first:], gate_ED, partial_STE, count, hidden_TD.stride(0), gate_ED.stride(0),
            EXPERTS=experts, WIDTH=width, PIECE=PIECE, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E,
            BLOCK_K=BLOCK_K // (2 if hidden.dtype == torch.float32 else 1), num_warps=4, num_stages=3,
        )  # fmt: skip
        launch(
            module.choose_experts,
            (-(-count // CHOOSING),),
            partial_STE, bias_E, weights_Tk[first:], ids_Tk[first:], count, scale,
            EXPERTS=experts, PIECES=pieces, TOP_K=top_k, GROUPS=groups, GROUPS_KEPT=groups_kept, RENORMALISE=renormalise,
            TOKENS=CHOOSING, BLOCK=power_of_two(experts, least=32), BLOCK_G=power_of_two(groups),
            BLOCK_CHOICES=power_of_two(top_k), num_warps=4,
        )  # fmt: skip
    return weights_Tk, ids_Tk
