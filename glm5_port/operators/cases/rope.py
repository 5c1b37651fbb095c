"""Parity cases of `glm5_port.operators.rope`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from glm5_port.operators.rope import rotary_angles, rotate
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite


@suite(rotate, rows=("x", "cos", "sin"))
def rotate_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, tokens: int, heads: int, dims: int, rotated: int, *, start: int = 0, interleaved: bool = True, first: int = 3
    ) -> dict[str, Any]:
        cos, sin = rotary_angles(torch.arange(first, first + tokens), 1e6, rotated)
        return {"x": make.normal(tokens, heads, dims), "cos": cos, "sin": sin, "interleaved": interleaved, "start": start}

    yield Case("no_tokens", lambda make: arguments(make, 0, 2, 8, 8))
    yield Case("one_token", lambda make: arguments(make, 1, 1, 8, 8))
    yield Case("one_pair", lambda make: arguments(make, 5, 3, 2, 2))
    yield Case("interleaved_first_channels", lambda make: arguments(make, 5, 3, 20, 12))
    yield Case("interleaved_last_channels", lambda make: arguments(make, 5, 3, 20, 12, start=8))
    yield Case("interleaved_odd_start", lambda make: arguments(make, 5, 3, 21, 12, start=5))
    yield Case("half_split", lambda make: arguments(make, 5, 3, 12, 12, interleaved=False))
    yield Case("half_split_middle_channels", lambda make: arguments(make, 5, 3, 21, 12, start=5, interleaved=False))
    yield Case("position_zero", lambda make: arguments(make, 1, 3, 8, 8, first=0), exact=True)
    yield Case("positions_at_a_million", lambda make: arguments(make, 7, 2, 64, 64, first=1_048_569))
    yield Case("not_finite", lambda make: {**arguments(make, 3, 1, 8, 8), "x": make.with_non_finite(3, 8)[:, None]})
    yield Case("glm5_query", lambda make: arguments(make, 5, 64, 64, 64, first=200_000), tags=WIDTH)
    yield Case("glm5_index_query", lambda make: arguments(make, 5, 32, 128, 64, first=200_000), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        rotated, before, behind = 2 * make.size(1, 40), make.size(0, 9), make.size(0, 9)
        dims, first = before + rotated + behind, make.size(0, 300_000)
        sizes = (make.size(0, 20), make.size(1, 9), dims, rotated)
        return arguments(make, *sizes, start=before, interleaved=make.one_of(False, True), first=first)

    yield Sweep(random)
