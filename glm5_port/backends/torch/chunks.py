"""How the portable implementations stay within a stated amount of memory: chunk sizes from shapes alone, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WORKSPACE_BYTES = 256 * 2**20
"""Memory for temporaries that a portable implementation may hold at once, beside its inputs and outputs."""


def workspace(parts: int = 1) -> int:
    """A share of the workspace, in bytes."""
    return WORKSPACE_BYTES // parts


def chunk_size(bytes_per_item: int, total: int, *, budget: int | None = None) -> int:
    """How many items of `bytes_per_item` fit `budget` bytes (default: `WORKSPACE_BYTES`); at least 1, at most `total`."""
    return max(1, min(total, (WORKSPACE_BYTES if budget is None else budget) // max(bytes_per_item, 1)))


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive chunks of `size` that cover 0 .. total - 1."""
    for first in range(0, total, size):
        yield first, min(first + size, total)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd would record what is computed from these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def recomputed(function: Callable[..., Tensor], *arguments: Any, gradient: bool) -> Tensor:
    """`function(*arguments)`; with `gradient`, its temporaries are dropped and computed again in the backward pass, so that
    training keeps to the budget too. What it reads must not change in between."""
    if not gradient:
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
