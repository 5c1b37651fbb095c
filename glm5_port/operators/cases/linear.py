"""Parity cases of `glm5_port.operators.linear`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from glm5_port.operators.linear import gated_mlp, linear, linear_per_head
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite


@suite(linear, rows=("x",))
def linear_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, out: int) -> dict[str, object]:
        return {"x": make.normal(*shape), "weight": make.normal(out, shape[-1], std=shape[-1] ** -0.5)}

    def integers(make: Make) -> dict[str, object]:
        return {"x": make.integers(5, 32, low=-2, high=3), "weight": make.integers(7, 32, low=-2, high=3)}

    yield Case("no_tokens", lambda make: arguments(make, 0, 64, out=48))
    yield Case("one_token", lambda make: arguments(make, 1, 64, out=48))
    yield Case("odd_widths", lambda make: arguments(make, 5, 77, out=33))
    yield Case("one_output", lambda make: arguments(make, 5, 64, out=1))
    yield Case("three_dims", lambda make: arguments(make, 2, 3, 64, out=48))
    yield Case("strided", lambda make: {**arguments(make, 4, 64, out=48), "x": make.normal(4, 128)[:, ::2]})
    yield Case("weight_is_a_view", lambda make: {**arguments(make, 4, 64, out=48), "weight": make.normal(96, 64, std=0.1)[::2]})
    yield Case("not_finite", lambda make: {**arguments(make, 3, 64, out=48), "x": make.with_non_finite(3, 64)})
    yield Case("integers", integers, exact=True)
    yield Case("glm5_query_down", lambda make: arguments(make, 3, 6144, out=2048), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.one_of(1, make.size(0, 80)), make.size(1, 300), out=make.size(1, 200)))
    yield Case("glm5_output", lambda make: arguments(make, 2, 16384, out=512), tags=WIDTH)


@suite(linear_per_head, rows=("x",))
def linear_per_head_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, tokens: int, heads: int, width_in: int, width_out: int) -> dict[str, object]:
        weight = make.normal(heads, width_out, width_in, std=width_in**-0.5)
        return {"x": make.normal(tokens, heads, width_in), "weight": weight}

    def transposed(make: Make) -> dict[str, object]:
        """As the key half of kv_b lies: [H, in, out]."""
        made = arguments(make, 4, 3, 12, 32)
        return {**made, "weight": make.normal(3, 12, 32, std=0.3).transpose(1, 2)}

    def integers(make: Make) -> dict[str, object]:
        return {"x": make.integers(5, 3, 32, low=-2, high=3), "weight": make.integers(3, 7, 32, low=-2, high=3)}

    yield Case("no_tokens", lambda make: arguments(make, 0, 3, 12, 32))
    yield Case("one_token", lambda make: arguments(make, 1, 3, 12, 32))
    yield Case("one_head", lambda make: arguments(make, 5, 1, 12, 32))
    yield Case("odd_widths", lambda make: arguments(make, 5, 3, 77, 33))
    yield Case("strided", lambda make: {**arguments(make, 4, 3, 12, 32), "x": make.normal(4, 3, 24)[..., ::2]})
    yield Case("part_of_a_head", lambda make: {**arguments(make, 4, 3, 12, 32), "x": make.normal(4, 3, 20)[..., :12]})
    yield Case("weight_is_a_view", transposed)
    yield Case("not_finite", lambda make: {**arguments(make, 3, 2, 64, 48), "x": make.with_non_finite(6, 64).view(3, 2, 64)})
    yield Case("integers", integers, exact=True)
    yield Case("glm5_absorb", lambda make: arguments(make, 2, 64, 192, 512), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), make.size(1, 9), make.size(1, 150), make.size(1, 150)))
    yield Case("glm5_values", lambda make: arguments(make, 2, 64, 512, 256), tags=WIDTH)


@suite(gated_mlp, rows=("x",))
def gated_mlp_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, between: int) -> dict[str, object]:
        width = shape[-1]
        return {
            "x": make.normal(*shape),
            "gate_up": make.normal(2 * between, width, std=width**-0.5),
            "down": make.normal(width, between, std=between**-0.5),
        }

    def one_nan(make: Make) -> dict[str, object]:
        made = arguments(make, 3, 64, between=48)
        made["x"][1, 5] = float("nan")  # type: ignore[index]
        return made

    yield Case("no_tokens", lambda make: arguments(make, 0, 64, between=48))
    yield Case("one_token", lambda make: arguments(make, 1, 64, between=48))
    yield Case("odd_widths", lambda make: arguments(make, 5, 77, between=33))
    yield Case("three_dims", lambda make: arguments(make, 2, 3, 64, between=48))
    yield Case("large_gates", lambda make: {**arguments(make, 4, 64, between=48), "x": make.normal(4, 64, std=30.0)})
    yield Case("strided", lambda make: {**arguments(make, 4, 64, between=48), "x": make.normal(4, 128)[:, ::2]})
    yield Case("not_a_number", one_nan)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), make.size(1, 200), between=make.size(1, 150)))
    yield Case(
        "glm5_shared_expert",
        lambda make: arguments(make, 2, 6144, between=2048),
        tags=WIDTH,
        dtypes=(torch.float32, torch.bfloat16),  # 150 MB in float32, and the gold needs twice that
    )
