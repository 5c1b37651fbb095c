"""What stands between the products of a layer, the projections of attention and indexer, writes into the cache, and selection
from given scores.

Shape legend: T tokens; D hidden size; H heads; Q query latent; C latent; R rope; N nope; E experts; J index heads; X their width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cpu.calls import HEADS, LATENT, NOPE, QUERY_LATENT, ROPE, WIDTH, normal, operator_contest, plural, weight
from benchmarks.cpu.contest import Contest, copies_for
from glm5_port.operators import (
    add_rms_norm,
    indexer_prologue,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
    rms_norm,
    rotate,
    route_experts,
    select_top_k,
    write_cache,
)
from glm5_port.operators.cache import INDEX, cache_layout
from glm5_port.operators.cache import LATENT as LATENT_CACHE
from glm5_port.operators.rope import rotary_angles

EXPERTS, INDEX_HEADS, INDEX_WIDTH, SELECTED = 256, 32, 128, 2048
PAGES, PAGE = 256, 64


def between() -> Iterator[Contest]:
    """Norms, rotation and routing, one token and many. One token's row lies in the cache: the limit is not the memory's, and what
    is seen is the cost of a call."""
    for tokens in (1, 512):
        x, channels = normal(tokens, WIDTH), normal(WIDTH)
        yield operator_contest(
            rms_norm, f"{tokens} x {WIDTH}", [{"x": x, "weight": channels, "eps": 1e-5}], 4.0 * x.numel(),
            peers={"torch rms_norm": lambda a: torch.nn.functional.rms_norm(a["x"], (WIDTH,), a["weight"], a["eps"])},
        )  # fmt: skip
        call = {"x": x, "residual": normal(tokens, WIDTH), "weight": channels, "eps": 1e-5}
        yield operator_contest(add_rms_norm, f"{tokens} x {WIDTH}", [call], 8.0 * x.numel())
        cos, sin = rotary_angles(torch.arange(tokens), 1e6, ROPE)
        query = normal(tokens, HEADS, NOPE + ROPE)[..., NOPE:]
        call = {"x": query, "cos": cos, "sin": sin, "interleaved": True, "start": 0}
        yield operator_contest(rotate, f"{tokens} x {HEADS} x {ROPE}", [call], 4.0 * query.numel())


def routing() -> Iterator[Contest]:
    """256 experts, top 8; the gates of as many layers as do not fit the cache."""
    for tokens in (1, 512):
        gates = copies_for(EXPERTS * WIDTH * 2)
        calls = [
            {
                "hidden": normal(tokens, WIDTH), "gate": weight(EXPERTS, WIDTH),
                "correction_bias": torch.randn(EXPERTS) * 0.1 + 8,
                "top_k": 8, "groups": 1, "groups_kept": 1, "renormalise": True, "scale": 2.5,
            }
            for _ in range(gates)
        ]  # fmt: skip
        operations = 2.0 * tokens * EXPERTS * WIDTH
        yield operator_contest(route_experts, plural(tokens, "token"), calls, 2.0 * (EXPERTS + tokens) * WIDTH, operations)


def selection() -> Iterator[Contest]:
    """2048 of a row of given scores."""
    for rows, columns in ((1, 32768), (1, 131072), (64, 8192)):
        calls = [{"scores": torch.randn(rows, columns), "top_k": SELECTED} for _ in range(4)]
        yield operator_contest(
            select_top_k, f"{SELECTED} of {columns}, {plural(rows, 'row')}", calls, 4.0 * rows * columns,
            peers={"torch.topk": lambda a: a["scores"].topk(SELECTED, dim=1).indices}, exact=False,
        )  # fmt: skip


def writes() -> Iterator[Contest]:
    """Rows of one layer into pages, as they are and quantised; what is written counts as read."""
    for tokens in (1, 512):
        slots = torch.randperm(PAGES * PAGE)[:tokens]
        latents, keys = [normal(tokens, LATENT), normal(tokens, ROPE)], [normal(tokens, INDEX_WIDTH)]
        for kind, rows, cache_format in ((LATENT_CACHE, latents, "plain"), (LATENT_CACHE, latents, "fp8"), (INDEX, keys, "fp8")):
            widths = [row.shape[1] for row in rows]
            cache = cache_layout(kind, cache_format).allocate(PAGES, PAGE, widths, torch.bfloat16)
            stored = sum(field.shape[2] * field.element_size() for field in cache)
            call = {"rows": rows, "cache": cache, "slots": slots, "cache_format": cache_format}
            yield operator_contest(
                write_cache, f"{kind}, {cache_format}, {plural(tokens, 'token')}", [call],
                float(tokens * (2 * sum(widths) + stored)), exact=False,
            )  # fmt: skip


def prologues() -> Iterator[Contest]:
    """Projections of one layer; copies stand for the layers of a model."""
    heads = HEADS * (NOPE + ROPE)
    projected = QUERY_LATENT * WIDTH + heads * QUERY_LATENT + (LATENT + ROPE) * WIDTH
    absorbed = projected + HEADS * NOPE * LATENT
    layers = [
        {
            "q_a": weight(QUERY_LATENT, WIDTH), "q_a_norm": normal(QUERY_LATENT), "q_b": weight(heads, QUERY_LATENT),
            "kv_a": weight(LATENT + ROPE, WIDTH), "kv_a_norm": normal(LATENT), "latent_norm_eps": 1e-5,
            "w_uk": normal(HEADS, NOPE, LATENT, std=NOPE**-0.5),
        }
        for _ in range(copies_for(2 * absorbed))
    ]  # fmt: skip
    indexed = INDEX_HEADS * INDEX_WIDTH * QUERY_LATENT + INDEX_WIDTH * WIDTH + INDEX_HEADS * WIDTH
    indexers = [
        {
            "wq_b": weight(INDEX_HEADS * INDEX_WIDTH, QUERY_LATENT), "wk": weight(INDEX_WIDTH, WIDTH),
            "weights_proj": weight(INDEX_HEADS, WIDTH), "k_norm_weight": normal(INDEX_WIDTH),
            "k_norm_bias": normal(INDEX_WIDTH), "k_norm_eps": 1e-6,
        }
        for _ in range(copies_for(2 * indexed))
    ]  # fmt: skip
    fields = cache_layout(LATENT_CACHE, "plain").allocate(PAGES, PAGE, [LATENT, ROPE], torch.bfloat16)
    for tokens in (1, 16, 512):
        cos, sin = rotary_angles(torch.arange(tokens), 1e6, ROPE)
        rows = {"hidden": normal(tokens, WIDTH), "cos": cos, "sin": sin, "rope_interleaved": True}
        calls = [rows | layer for layer in layers]
        written = {"latent_cache": fields, "slots": torch.arange(tokens), "cache_format": "plain"}
        plain = [{n: v for n, v in call.items() if n != "w_uk"} | {"nope_dim": NOPE} for call in calls]
        work, exact = plural(tokens, "token"), tokens <= 16
        yield operator_contest(mla_prologue, work, calls, 2.0 * absorbed, 2.0 * tokens * absorbed, exact=exact)
        yield operator_contest(
            mla_prologue_into_cache,
            work,
            [call | written for call in calls],
            2.0 * absorbed,
            2.0 * tokens * absorbed,
            exact=False,
        )
        yield operator_contest(mla_project, work, plain, 2.0 * projected, 2.0 * tokens * projected, exact=exact)
        calls = [rows | {"query_residual": normal(tokens, QUERY_LATENT)} | indexer for indexer in indexers]
        yield operator_contest(indexer_prologue, work, calls, 2.0 * indexed, 2.0 * tokens * indexed, exact=exact)
