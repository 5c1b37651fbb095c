"""The softmax that every attention reference shares: over visible keys only, zeros where nothing is visible."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension, of the visible entries alone.

    Args:
        scores: [..., keys], in the dtype to compute in.
        visible: bool, broadcasts to scores.

    Returns:
        [..., keys]: weights that sum to 1, exactly 0 where not visible; all 0 in a row where nothing is visible, with a
        gradient of 0 there. Scores of invisible keys may be anything, NaN included.
    """
    if scores.shape[-1] == 0:
        return scores
    masked = scores.masked_fill(~visible, -torch.inf)
    largest = masked.detach().amax(-1, keepdim=True)
    weights = torch.exp(masked - largest.masked_fill(largest == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)
