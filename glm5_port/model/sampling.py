"""Choosing the next token from logits: greedy, or sampled with temperature, top-k and top-p.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy (ties go to the lowest id); otherwise logits are divided by it.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches p; None keeps all.
        seed: sampled tokens depend on (seed, sequence, position) only: not on the batch, and not on speculation.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p}; leave it out to keep every token")

    def choose(self, logits_BV: Tensor, sequences: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The token of each row; `sequences` and `positions` say whose and where it will stand."""
        if not len(sequences):
            return []
        if self.temperature == 0:
            return [int(token) for token in logits_BV.argmax(-1).tolist()]
        probabilities_BV = self._filtered(logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)))
        draws = [self._uniform(sequence, position) for sequence, position in zip(sequences, positions, strict=True)]
        cumulative_BV = probabilities_BV.cumsum(-1)
        targets_B1 = torch.tensor(draws, dtype=cumulative_BV.dtype, device=cumulative_BV.device).unsqueeze(-1)
        # right=True: a token of probability zero is never hit, not even by a draw of exactly 0.
        tokens_B1 = torch.searchsorted(cumulative_BV, targets_B1 * cumulative_BV[:, -1:], right=True)
        return [int(token) for token in tokens_B1.squeeze(-1).clamp(max=logits_BV.shape[-1] - 1).tolist()]

    def _filtered(self, logits_BV: Tensor) -> Tensor:
        probabilities_BV = torch.softmax(logits_BV / self.temperature, dim=-1)
        if self.top_k is None and self.top_p is None:
            return probabilities_BV
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        keep_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
        if self.top_k is not None:
            keep_BV[:, self.top_k :] = False
        if self.top_p is not None:
            keep_BV &= sorted_BV.cumsum(-1) - sorted_BV < self.top_p
        return torch.zeros_like(probabilities_BV).scatter(-1, order_BV, sorted_BV * keep_BV)

    def _uniform(self, sequence: int, position: int) -> float:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + sequence) * 4_000_037 + position)
        return float(torch.rand((), generator=generator, dtype=torch.float64))
