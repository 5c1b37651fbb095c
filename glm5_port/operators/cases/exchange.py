"""Parity cases of `glm5_port.operators.exchange` where one rank has every expert; tests/distributed has those of more ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from glm5_port.operators.exchange import FORMS, combine_tokens, dispatch_tokens
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite

ALONE = {"ranks": 1, "node_ranks": 1, "expert_tensor": 1, "groups": ""}


@suite(dispatch_tokens)
def dispatch_tokens_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, tokens: int, form: str = "all_gather", bits: int = 16, width: int = 64, extra: int = 0
    ) -> dict[str, Any]:
        experts = 8
        copies = [[expert, experts + expert if expert < extra else expert] for expert in range(experts)]
        return {
            "hidden": make.normal(tokens, width),
            "route_weights": make.uniform(tokens, 3, low=0.1, dtype=torch.float32),
            "ids": make.integers(tokens, 3, low=0, high=experts, dtype=torch.int32),
            "placement": torch.tensor(copies, dtype=torch.int32),
            "form": form,
            "bits": bits,
            "slots": experts + extra,
            **ALONE,
        }

    def outside(make: Make) -> dict[str, Any]:
        made = arguments(make, 20)
        return {**made, "ids": make.integers(20, 3, low=-4, high=12, dtype=torch.int32)}

    def uneven_rows(make: Make) -> dict[str, Any]:
        """Rows of zeros, and rows whose groups differ by orders of magnitude."""
        made = arguments(make, 6, bits=8, width=300)
        made["hidden"][1] = 0.0
        made["hidden"][2, 128:256] *= 1000
        made["hidden"][3, 256:] = 0.0
        return made

    def non_finite(make: Make) -> dict[str, Any]:
        return {**arguments(make, 4, bits=8, width=300), "hidden": make.with_non_finite(4, 300)}

    for form in FORMS:
        yield Case(form, partial(arguments, tokens=9, form=form), exact=True)
        yield Case(f"{form}_in_8_bits", partial(arguments, tokens=9, form=form, bits=8, width=200))
    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("no_tokens_in_8_bits", lambda make: arguments(make, 0, bits=8))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("copies_of_experts", lambda make: arguments(make, 13, extra=3), exact=True)
    yield Case("ids_out_of_range", outside, exact=True)
    yield Case("uneven_rows_in_8_bits", uneven_rows)
    yield Case("not_finite_in_8_bits", non_finite)
    yield Case("glm5_width_in_8_bits", lambda make: arguments(make, 3, bits=8, width=6144), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        form, bits = make.one_of(*FORMS), make.one_of(8, 16)
        return arguments(make, make.size(0, 40), form, bits, width=make.size(1, 400), extra=make.size(0, 8))

    yield Sweep(random)


@suite(combine_tokens)
def combine_tokens_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, tokens: int, form: str, bits: int = 16, width: int = 64) -> dict[str, Any]:
        return {"results": make.normal(tokens, width), "trace": [], "tokens": tokens, "form": form, "bits": bits, **ALONE}

    for form in FORMS:
        yield Case(form, partial(arguments, tokens=9, form=form), exact=True)
    yield Case("all_gather_in_8_bits", lambda make: arguments(make, 9, "all_gather", bits=8, width=200))
    yield Case("other_forms_return_16_bits", lambda make: arguments(make, 9, "deduplicated", bits=8), exact=True)
    yield Case("no_tokens", lambda make: arguments(make, 0, "all_gather", bits=8))
    yield Case("glm5_width", lambda make: arguments(make, 3, "hierarchical", width=6144), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        return arguments(make, make.size(0, 40), make.one_of(*FORMS), make.one_of(8, 16), width=make.size(1, 400))

    yield Sweep(random)
