"""Parity cases of `glm5_port.operators.mla`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glm5_port.operators.cache import cache_layout
from glm5_port.operators.cases.cache import compare_written_rows
from glm5_port.operators.cases.paging import filled_latent_cache, page_batch, random_batch, without_last_page
from glm5_port.operators.mla import (
    attention_output,
    mla_attention_absorbed,
    mla_attention_expanded,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
)
from glm5_port.operators.rope import rotary_angles
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite
from glm5_port.testing.comparison import Outcome, compare_outputs

# -- projections -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widths:
    """The sizes of one attention layer, named as in the shape legend of `glm5_port.operators.mla`."""

    hidden: int = 40
    heads: int = 3
    query: int = 24
    latent: int = 16
    nope: int = 10
    rope: int = 8
    value: int = 12


SMALL = Widths()
ONE_HEAD = Widths(heads=1, nope=1, rope=2, latent=3, query=5, hidden=7, value=1)
QUANTISABLE = Widths(latent=512, rope=64)
GLM5_RANK = Widths(hidden=6144, heads=8, query=2048, latent=512, nope=192, rope=64, value=256)
"""GLM-5 as one of 8 tensor-parallel ranks holds it: true widths, 8 of 64 heads."""

ROWS = ("hidden", "cos", "sin")


def projection(
    make: Make, tokens: int, widths: Widths = SMALL, *, eps: float = 1e-5, interleaved: bool = True, std: float = 1.0
) -> dict[str, Any]:
    """Arguments that all three operators share."""
    w = widths
    cos, sin = rotary_angles(torch.arange(5, 5 + tokens), 1e6, w.rope)
    return {
        "hidden": make.normal(tokens, w.hidden, std=std),
        "q_a": make.normal(w.query, w.hidden, std=w.hidden**-0.5),
        "q_a_norm": make.normal(w.query, mean=1.0, std=0.1),
        "q_b": make.normal(w.heads * (w.nope + w.rope), w.query, std=w.query**-0.5),
        "kv_a": make.normal(w.latent + w.rope, w.hidden, std=w.hidden**-0.5),
        "kv_a_norm": make.normal(w.latent, mean=1.0, std=0.1),
        "cos": cos,
        "sin": sin,
        "latent_norm_eps": eps,
        "rope_interleaved": interleaved,
    }


def random_widths(make: Make) -> Widths:
    """Of every size, odd ones too."""
    return Widths(
        hidden=make.size(1, 150),
        heads=make.size(1, 9),
        query=make.size(1, 100),
        latent=make.size(1, 100),
        nope=make.size(1, 40),
        rope=2 * make.size(1, 20),
        value=make.size(1, 40),
    )


def projection_cases(arguments: Callable[..., dict[str, Any]]) -> Iterator[Case | Sweep]:
    """The cases of mla_project and mla_prologue. `arguments` as `projection`."""
    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("smallest_widths", lambda make: arguments(make, 3, ONE_HEAD))
    yield Case("several_tokens", lambda make: arguments(make, 7))
    yield Case("half_split_rope", lambda make: arguments(make, 7, interleaved=False))
    yield Case("small_latents_eps_1e-5", lambda make: arguments(make, 5, std=1e-3))
    yield Case("small_latents_eps_1e-6", lambda make: arguments(make, 5, std=1e-3, eps=1e-6))
    yield Case("not_finite", lambda make: {**arguments(make, 3), "hidden": make.with_non_finite(3, SMALL.hidden)})
    yield Case("glm5_rank", lambda make: arguments(make, 2, GLM5_RANK), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), random_widths(make), interleaved=make.one_of(False, True)))


@suite(mla_project, rows=ROWS)
def mla_project_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, tokens: int, widths: Widths = SMALL, **options: Any) -> dict[str, Any]:
        return {**projection(make, tokens, widths, **options), "nope_dim": widths.nope}

    yield from projection_cases(arguments)


def prologue(make: Make, tokens: int, widths: Widths = SMALL, **options: Any) -> dict[str, Any]:
    """Arguments of mla_prologue."""
    w_uk = make.normal(widths.heads, widths.nope, widths.latent, std=widths.nope**-0.5)
    return {**projection(make, tokens, widths, **options), "w_uk": w_uk}


@suite(mla_prologue, rows=ROWS)
def mla_prologue_cases() -> Iterator[Case | Sweep]:
    yield from projection_cases(prologue)


def compare_into_cache(outcome: Outcome) -> list[str]:
    """The returned tensors as usual; the cache by what it reads back as, against the latent rows before they were stored."""
    returned = 3
    visible = Outcome(
        outcome.case, outcome.dtype, outcome.budget, outcome.arguments, outcome.gold_arguments,
        outcome.outputs[:returned], outcome.reference[:returned], outcome.gold[:returned], outcome.errors,
    )  # fmt: skip
    cache_only = ("latent_cache", "slots", "cache_format")
    gold_call = {name: value for name, value in outcome.gold_arguments.items() if name not in cache_only}
    _, _, latent, rope_key, _ = mla_prologue.reference(**gold_call)
    layout = cache_layout("latent", outcome.arguments["cache_format"])
    fields, reference = outcome.outputs[returned:], outcome.reference[returned:]
    return compare_outputs(visible) + compare_written_rows(outcome, layout, fields, reference, [latent, rope_key])


@suite(mla_prologue_into_cache, compare=compare_into_cache, rows=ROWS)
def mla_prologue_into_cache_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make,
        new: Sequence[int],
        lengths: Sequence[int],
        widths: Widths = SMALL,
        cache_format: str = "plain",
        *,
        padding: int = 0,
        page_size: int = 4,
    ) -> dict[str, Any]:
        paging = page_batch(make, new, lengths, page_size=page_size, padding=padding)
        layout = cache_layout("latent", cache_format)
        return {
            **prologue(make, paging.tokens, widths),
            "latent_cache": layout.allocate(paging.pages, page_size, [widths.latent, widths.rope], make.dtype),
            "slots": paging.token_slots(),
            "cache_format": cache_format,
        }

    unequal = ([3, 1, 5, 0], [9, 1, 5, 4])
    yield Case("no_tokens", lambda make: arguments(make, [0], [3]))
    yield Case("one_token", lambda make: arguments(make, [1], [1]))
    yield Case("unequal_and_padding", lambda make: arguments(make, *unequal, padding=2, page_size=5))
    yield Case("only_padding", lambda make: arguments(make, [0], [3], padding=2))
    yield Case("fp8_rows", lambda make: arguments(make, *unequal, QUANTISABLE, "fp8", padding=2))
    yield Case("int8_rows", lambda make: arguments(make, *unequal, QUANTISABLE, "int8", padding=2))

    def glm5_rank(form: str) -> Case:
        return Case(f"glm5_rank_{form}", lambda make: arguments(make, [2], [70], GLM5_RANK, form, page_size=64), tags=WIDTH)

    yield from map(glm5_rank, ("plain", "fp8", "int8"))

    def random(make: Make) -> dict[str, Any]:
        form = make.one_of("plain", "plain", "fp8", "int8")
        widths = random_widths(make) if form == "plain" else QUANTISABLE
        return arguments(make, widths=widths, cache_format=form, **random_batch(make))

    yield Sweep(random)


# -- dense attention ---------------------------------------------------------------------------------------------------


def attention_cases(arguments: Callable[..., dict[str, Any]], glm5: Widths) -> Iterator[Case | Sweep]:
    """The cases of both dense forms. `arguments(make, new, lengths, widths, **options)`."""
    unequal = ([3, 1, 5, 0], [9, 1, 5, 4])
    yield Case("no_tokens", lambda make: arguments(make, [0], [3]))
    yield Case("context_of_one", lambda make: arguments(make, [1], [1]))
    yield Case("decode", lambda make: arguments(make, [1, 1, 1], [9, 2, 30]))
    yield Case("prefill", lambda make: arguments(make, [13], [13]))
    yield Case("chunked_prefill_and_padding", lambda make: arguments(make, *unequal, padding=2))
    yield Case("only_padding", lambda make: arguments(make, [0, 0], [3, 1], padding=3))
    yield Case("odd_page_size", lambda make: arguments(make, *unequal, page_size=5))
    yield Case("page_of_one", lambda make: arguments(make, *unequal, page_size=1))
    yield Case("wide_block_table", lambda make: arguments(make, *unequal, extra_columns=9))
    yield Case("table_ends_before_the_context", lambda make: without_last_page(arguments(make, *unequal, extra_columns=0)))
    yield Case("sharp_scores", lambda make: arguments(make, [6], [40], std=16.0))
    yield Case("fp8_rows", lambda make: arguments(make, *unequal, QUANTISABLE, cache_format="fp8", padding=1))
    yield Case("int8_rows", lambda make: arguments(make, *unequal, QUANTISABLE, cache_format="int8", padding=1))
    yield Case("glm5", lambda make: arguments(make, [3], [200], glm5, page_size=64), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        form = make.one_of("plain", "plain", "fp8", "int8")
        widths = random_widths(make) if form == "plain" else QUANTISABLE
        return arguments(make, widths=widths, cache_format=form, **random_batch(make))

    yield Sweep(random)


def attention(
    make: Make,
    new: Sequence[int],
    lengths: Sequence[int],
    widths: Widths,
    query_dim: int,
    *,
    cache_format: str = "plain",
    page_size: int = 4,
    padding: int = 0,
    extra_columns: int = 1,
    std: float = 1.0,
) -> dict[str, Any]:
    """Arguments that both dense forms share; the first query under the name "query"."""
    paging = page_batch(make, new, lengths, page_size=page_size, padding=padding, extra_columns=extra_columns)
    return {
        "query": make.normal(paging.tokens, widths.heads, query_dim, std=std),
        "query_rope": make.normal(paging.tokens, widths.heads, widths.rope, std=std),
        **filled_latent_cache(make, paging, cache_format, widths.latent, widths.rope),
        **paging.arguments(),
        "scale": (query_dim + widths.rope) ** -0.5,
    }


@suite(mla_attention_absorbed, rows=("query_latent", "query_rope"))
def mla_attention_absorbed_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, new: Sequence[int], lengths: Sequence[int], widths: Widths = SMALL, **options: Any
    ) -> dict[str, Any]:
        given = attention(make, new, lengths, widths, widths.latent, **options)
        return {"query_latent": given.pop("query"), **given}

    yield from attention_cases(arguments, Widths(heads=64, latent=512, rope=64))


@suite(mla_attention_expanded, rows=("query_nope", "query_rope"))
def mla_attention_expanded_cases() -> Iterator[Case | Sweep]:
    def arguments(
        make: Make, new: Sequence[int], lengths: Sequence[int], widths: Widths = SMALL, **options: Any
    ) -> dict[str, Any]:
        given = attention(make, new, lengths, widths, widths.nope, **options)
        w_uk = make.normal(widths.heads, widths.nope, widths.latent, std=widths.latent**-0.5)
        w_uv = make.normal(widths.heads, widths.value, widths.latent, std=widths.latent**-0.5)
        return {"query_nope": given.pop("query"), **given, "w_uk": w_uk, "w_uv": w_uv}

    yield from attention_cases(arguments, GLM5_RANK)


# -- output ------------------------------------------------------------------------------------------------------------


@suite(attention_output, rows=("latent_out",))
def attention_output_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, tokens: int, widths: Widths = SMALL) -> dict[str, Any]:
        w = widths
        return {
            "latent_out": make.normal(tokens, w.heads, w.latent),
            "w_uv": make.normal(w.heads, w.value, w.latent, std=w.latent**-0.5),
            "o": make.normal(w.hidden, w.heads * w.value, std=(w.heads * w.value) ** -0.5),
        }

    def not_finite(make: Make) -> dict[str, Any]:
        rows = make.with_non_finite(3, SMALL.heads * SMALL.latent).view(3, SMALL.heads, SMALL.latent)
        return {**arguments(make, 3), "latent_out": rows}

    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("smallest_widths", lambda make: arguments(make, 3, ONE_HEAD))
    yield Case("several_tokens", lambda make: arguments(make, 7))
    yield Case("not_finite", not_finite)
    yield Case("glm5_rank", lambda make: arguments(make, 3, GLM5_RANK), tags=WIDTH)
    yield Sweep(lambda make: arguments(make, make.size(0, 40), random_widths(make)))
