"""Choosing the next token from logits: greedy, or sampled with temperature, top-k and top-p.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
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
        top_p: of what top_k kept (renormalised), keep the smallest set of most probable tokens whose probability reaches p;
            None keeps all.
        seed: any integer. A draw depends on (seed, place of the prompt in the call, position) only: not on the other prompts,
            and not on speculation.
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
        # In float64 and one after the other, as the CPU sums: a token of probability zero then adds exactly nothing and is
        # never hit (right=True: not even by a draw of 0), and target < total always holds.
        cumulative_BV = probabilities_BV.cpu().double().cumsum(-1)
        draws = [self._uniform(sequence, position) for sequence, position in zip(sequences, positions, strict=True)]
        targets_B1 = torch.tensor(draws, dtype=torch.float64).unsqueeze(-1) * cumulative_BV[:, -1:]
        return [int(token) for token in torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1).tolist()]

    def _filtered(self, logits_BV: Tensor) -> Tensor:
        """[B, V] probabilities, zero for what top_k and top_p leave out; rows need not sum to one."""
        largest_B1 = logits_BV.amax(-1, keepdim=True)  # taken off first: a tiny temperature must not make inf - inf
        probabilities_BV = torch.softmax((logits_BV - largest_B1) / self.temperature, dim=-1)
        if self.top_k is None and self.top_p is None:
            return probabilities_BV
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            sorted_BV[:, self.top_k :] = 0.0
        if self.top_p is not None and self.top_p < 1:  # 1 keeps everything, whatever the sum rounds to
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            sorted_BV[before_BV >= self.top_p * sorted_BV.sum(-1, keepdim=True)] = 0.0
        return torch.zeros_like(probabilities_BV).scatter(-1, order_BV, sorted_BV)

    def _uniform(self, sequence: int, position: int) -> float:
        """A number in [0, 1) of 53 random bits."""
        digest = hashlib.blake2b(f"{self.seed},{sequence},{position}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53
