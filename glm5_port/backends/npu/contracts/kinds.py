"""Kinds of rules that many operators share, and the words of the vendor's documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.npu.rules import Rule, plain

A2_A3 = ("A2", "A3")
EVERY_CHIP = ("A2", "A3", "950PR", "950DT")
HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
HEAD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
NO_LIMIT = 2**63 - 1
"""pre_tokens and next_tokens of the sparse operators; nothing else is supported."""
FRACTAL_NZ = 29
"""The vendor's number of its blocked matrix format."""
WIDEST = 65535
"""Longest inner dimension of most matrix products."""


def of_dtype(argument: str, *dtypes: torch.dtype) -> Rule:
    words = ", ".join(plain(dtype) for dtype in dtypes)
    return Rule(f"{argument} dtype", f"{argument} of {words}", lambda **a: _all(a[argument], lambda t: t.dtype in dtypes))


def same_dtype(argument: str, other: str) -> Rule:
    return Rule(
        f"{argument} dtype",
        f"{argument} in the dtype of {other}",
        lambda **a: _first(a[argument]).dtype == _first(a[other]).dtype,
    )


def of_dims(argument: str, *dims: int) -> Rule:
    words = " or ".join(str(count) for count in dims)
    return Rule(f"{argument} dims", f"{argument} of {words} dimensions", lambda **a: _all(a[argument], lambda t: t.dim() in dims))


def dense(*arguments: str) -> Rule:
    return Rule(
        f"{', '.join(arguments)} contiguous",
        f"{', '.join(arguments)} without gaps",
        lambda **a: all(_all(a[name], Tensor.is_contiguous) for name in arguments),
    )


def filled(*arguments: str) -> Rule:
    return Rule(
        f"{', '.join(arguments)} filled",
        f"{', '.join(arguments)} with at least one element",
        lambda **a: all(_all(a[name], lambda t: t.numel() > 0) for name in arguments),
    )


def width_at_most(argument: str, limit: int) -> Rule:
    return Rule(
        f"{argument} width",
        f"{argument} with a last dimension up to {limit}",
        lambda **a: _all(a[argument], lambda t: t.shape[-1] <= limit),
    )


def width_multiple(argument: str, unit: int) -> Rule:
    return Rule(
        f"{argument} unit",
        f"{argument} with a last dimension in whole {unit}s",
        lambda **a: _all(a[argument], lambda t: t.shape[-1] % unit == 0),
    )


def value(argument: str, *allowed: Any) -> Rule:
    words = " or ".join(repr(one) for one in allowed)
    return Rule(argument, f"{argument}={words}", lambda **a: a[argument] in allowed)


def page_rows(argument: str, dim: int) -> Rule:
    return Rule(
        "page size",
        f"{argument} in pages of 16 to 1024 rows, whole 16s",
        lambda **a: a[argument].shape[dim] % 16 == 0 and 16 <= a[argument].shape[dim] <= 1024,
    )


def _tensors(value: Any) -> list[Tensor]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _all(value: Any, holds: Any) -> bool:
    return all(holds(tensor) for tensor in _tensors(value))


def _first(value: Any) -> Tensor:
    return _tensors(value)[0]
