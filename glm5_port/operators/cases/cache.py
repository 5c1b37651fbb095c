"""Parity cases of `glm5_port.operators.cache`, and the comparison of what lies in a cache.

A quantised row is judged by what it reads back as, against the row before quantisation: an implementation may be as far from
it as the reference's own rounding, times the budget. Bytes may differ where both roundings are equally good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.cache import CacheLayout, cache_layout, gather_rows, kind_of_rows, write_cache
from glm5_port.operators.cases.paging import page_batch, random_batch
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite
from glm5_port.testing.comparison import Outcome, check_equal, check_form, check_within_budget


def compare_written_rows(
    outcome: Outcome, layout: CacheLayout, fields: Sequence[Tensor], reference: Sequence[Tensor], gold_rows: Sequence[Tensor]
) -> list[str]:
    """Holds the rows that `fields` read back as against `gold_rows` [T, width], the float64 rows before they were stored."""
    problems = [
        f"field {spec.name}: {problem}"
        for spec, mine, theirs in zip(layout.fields, fields, reference, strict=True)
        if (problem := check_form(mine, theirs))
    ]
    if problems:
        return problems
    slots = outcome.arguments["slots"]
    kept = slots >= 0
    mine = gather_rows(layout, fields, slots[kept])
    theirs = gather_rows(layout, reference, slots[kept])
    for place, gold in enumerate(gold_rows):
        found = check_within_budget(outcome, mine[place], theirs[place], gold[kept])
        problems += [f"row part {place}: {problem}" for problem in found]
    return problems


def compare_write(outcome: Outcome) -> list[str]:
    """A plain layout holds the very bits; a quantised one is held to the budget."""
    layout = cache_layout(kind_of_rows(outcome.arguments["rows"]), outcome.arguments["cache_format"])
    if layout.exact:
        pairs = list(zip(outcome.outputs, outcome.reference, strict=True))
        wrong_form = [problem for mine, theirs in pairs if (problem := check_form(mine, theirs))]
        return wrong_form or [problem for mine, theirs in pairs for problem in check_equal(mine, theirs)]
    return compare_written_rows(outcome, layout, outcome.outputs, outcome.reference, outcome.gold_arguments["rows"])


@suite(write_cache, compare=compare_write, rows=("rows",))
def write_cache_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make,
        new: Sequence[int],
        lengths: Sequence[int],
        widths: Sequence[int],
        cache_format: str,
        *,
        padding: int = 0,
        page_size: int = 4,
    ) -> dict[str, Any]:
        paging = page_batch(make, new, lengths, page_size=page_size, padding=padding)
        rows = [make.normal(paging.tokens, width) for width in widths]
        layout = cache_layout(kind_of_rows(rows), cache_format)
        return {
            "rows": rows,
            "cache": layout.allocate(paging.pages, page_size, widths, make.dtype),
            "slots": paging.token_slots(),
            "cache_format": cache_format,
        }

    def special_rows(make: Make, widths: Sequence[int], cache_format: str) -> dict[str, Any]:
        """Zeros, near zero, large, one outlier, not finite."""
        given = arguments(make, [6], [6], widths, cache_format)
        for row in given["rows"]:
            row[0] = 0.0
            row[1] *= 1e-6
            row[2] *= 1e3
            row[3, 0] = 300.0
            row[4, 1] = torch.nan
            row[5, 1] = -torch.inf
        return given

    def all_padding(make: Make, widths: Sequence[int], cache_format: str) -> dict[str, Any]:
        given = arguments(make, [3], [9], widths, cache_format)
        return {**given, "slots": torch.full_like(given["slots"], -1)}

    def cases_of(kind: str, widths: Sequence[int], form: str) -> Iterator[Case]:
        name = f"{kind}_{form}"
        yield Case(f"{name}_no_tokens", lambda make: arguments(make, [0], [3], widths, form))
        yield Case(f"{name}_one_token", lambda make: arguments(make, [1], [1], widths, form))
        yield Case(
            f"{name}_unequal_and_padding",
            lambda make: arguments(make, [3, 0, 5], [9, 4, 5], widths, form, padding=2, page_size=5),
        )
        yield Case(f"{name}_all_padding", lambda make: all_padding(make, widths, form))
        yield Case(f"{name}_special_rows", lambda make: special_rows(make, widths, form))
        yield Case(f"{name}_page_64", lambda make: arguments(make, [70], [150], widths, form, page_size=64), tags=WIDTH)

    for form in ("plain", "fp8", "int8"):
        yield from cases_of("latent", [512, 64], form)
        yield from cases_of("index", [128], form)
    yield Case("latent_plain_odd_widths", lambda make: arguments(make, [3, 2], [3, 6], [7, 6], "plain", padding=1, page_size=3))
    yield Case("index_fp8_odd_width", lambda make: arguments(make, [3], [3], [24], "fp8"))
    yield Case("index_int8_odd_width", lambda make: arguments(make, [3], [3], [24], "int8"))

    def random(make: Make) -> dict[str, Any]:
        form = make.one_of("plain", "plain", "fp8", "int8")
        latent = [make.size(1, 100), make.size(1, 40)] if form == "plain" else [512, 64]
        return arguments(make, widths=make.one_of(latent, [8 * make.size(1, 17)]), cache_format=form, **random_batch(make))

    yield Sweep(random)
