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
    largest = total = result = None
    for scores, visible, combine in steps:
        scores = scores.masked_fill(~visible, -torch.inf)
        peak = scores.detach().amax(-1, keepdim=True)  # the softmax does not depend on it, so it needs no gradient
        if largest is not None:
            peak = torch.maximum(peak, largest)
        finite_peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = torch.exp(scores - finite_peak)
        chunk_total, chunk_result = weights.sum(-1, keepdim=True), combine(weights)
        if largest is None:
            total, result = chunk_total, chunk_result
        else:
            fade = torch.exp(largest - finite_peak)
            total, result = total * fade + chunk_total, result * fade + chunk_result
        largest = peak
    if total is None or result is None:
        raise ValueError("running_attention needs at least one chunk of keys")
    return result / total.masked_fill(total == 0, 1.0)
