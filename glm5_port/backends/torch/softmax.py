"""A softmax that sees its keys chunk by chunk, so that heads x queries x keys never exists at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def running_attention(steps: Iterable[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]) -> Tensor:
    """softmax(scores over all chunks, visible ones only) applied to the values of all chunks.

    Args:
        steps: for each chunk of keys: scores [..., keys] in the dtype to compute in; visible, bool, broadcasts to scores;
            and a function that takes weights [..., keys] to the weighted sum of the chunk's values [..., V].

    Returns:
        [..., V]; zeros where no key of any chunk is visible.
    """
    state: tuple[Tensor, Tensor, Tensor] | None = None  # largest score so far, sum of weights, weighted sum of values
    for scores, visible, combine in steps:
        scores = scores.masked_fill(~visible, -torch.inf)
        peak = scores.detach().amax(-1, keepdim=True)  # the softmax does not depend on it, so it needs no gradient
        if state is not None:
            peak = torch.maximum(peak, state[0])
        finite_peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = torch.exp(scores - finite_peak)
        total, result = weights.sum(-1, keepdim=True), combine(weights)
        if state is not None:
            fade = torch.exp(state[0] - finite_peak)
            total, result = state[1] * fade + total, state[2] * fade + result
        state = (peak, total, result)
    if state is None:
        raise ValueError("running_attention needs at least one chunk of keys")
    _, total, result = state
    return result / total.masked_fill(total == 0, 1.0)
