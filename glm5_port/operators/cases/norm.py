"""Parity cases of `glm5_port.operators.norm`."""

from __future__ import annotations

from collections.abc import Iterator

from glm5_port.operators.norm import add_rms_norm, rms_norm
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite


@suite(rms_norm, rows=("x",))
def rms_norm_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, std: float = 1.0, eps: float = 1e-5) -> dict[str, object]:
        return {"x": make.normal(*shape, std=std), "weight": make.normal(shape[-1], mean=1.0, std=0.1), "eps": eps}

    yield Case("no_tokens", lambda make: arguments(make, 0, 64))
    yield Case("one_token", lambda make: arguments(make, 1, 64))
    yield Case("odd_width", lambda make: arguments(make, 5, 77))
    yield Case("three_dims", lambda make: arguments(make, 2, 3, 64))
    yield Case("tiny_values_eps_1e-6", lambda make: arguments(make, 4, 64, std=1e-3, eps=1e-6))
    yield Case("tiny_values_eps_1e-5", lambda make: arguments(make, 4, 64, std=1e-3))
    yield Case("zero_row", lambda make: {**arguments(make, 3, 64), "x": make.zeros(3, 64)})
    yield Case("strided", lambda make: {**arguments(make, 4, 64), "x": make.normal(4, 128)[:, ::2]})
    yield Case("not_finite", lambda make: {**arguments(make, 3, 64), "x": make.with_non_finite(3, 64)})
    yield Case("glm5_hidden", lambda make: arguments(make, 7, 6144), tags=WIDTH)
    yield Case("glm5_latent", lambda make: arguments(make, 33, 512, std=0.03), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), make.size(1, 700), std=make.one_of(1.0, 0.01, 50.0)))


@suite(add_rms_norm, rows=("x", "residual"))
def add_rms_norm_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int) -> dict[str, object]:
        return {
            "x": make.normal(*shape),
            "residual": make.normal(*shape, std=4.0),
            "weight": make.normal(shape[-1], mean=1.0, std=0.1),
            "eps": 1e-5,
        }

    yield Case("no_tokens", lambda make: arguments(make, 0, 64))
    yield Case("one_token", lambda make: arguments(make, 1, 64))
    yield Case("odd_width", lambda make: arguments(make, 5, 77))
    yield Case("strided", lambda make: {**arguments(make, 4, 64), "x": make.normal(4, 128)[:, ::2]})
    yield Case("glm5_hidden", lambda make: arguments(make, 7, 6144), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), make.size(1, 700)))
