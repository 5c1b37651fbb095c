"""Native prologues: each instruction set against the definition in float64, threads, rows of the cache left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.indexer import indexer_prologue
from glm5_port.operators.mla import mla_project, mla_prologue, mla_prologue_into_cache
from glm5_port.operators.rope import rotary_angles
from glm5_port.testing.cases import Make

HERE = [isa for isa in extension.MATRIX if not extension.isa_missing(isa)]
pytestmark = pytest.mark.skipif(not HERE, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")
isas = pytest.mark.parametrize("isa", HERE)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[..., Any]]]:
    """Binds an operator for a call under GLM5_PORT_CPU_ISA, and holds that the kernels of this set are what runs."""

    def bind(operator: Operator, isa: str, arguments: dict[str, Any]) -> Callable[..., Any]:
        monkeypatch.setenv(flags.CPU_ISA.name, isa)
        monkeypatch.setenv(f"GLM5_PORT_OP_{operator.name.upper()}", f"cpu/{isa}")  # by rank, avx512 may come before avx512_bf16
        flags.reset()
        found = operator.bind(**operator.facts_of(arguments))
        assert found.implementation.id == f"cpu/{isa}"
        return found

    yield bind
    torch.set_num_threads(1)
    monkeypatch.undo()
    flags.reset()


def projecting(tokens: int, **more: Any) -> dict[str, Any]:
    make, (cos, sin) = Make("projecting", torch.float32), rotary_angles(torch.arange(tokens) + 3, 1e4, 6)
    return {
        "hidden": make.normal(tokens, 40), "q_a": make.normal(24, 40), "q_a_norm": make.normal(24),
        "q_b": make.normal(3 * (5 + 6), 24), "kv_a": make.normal(14 + 6, 40), "kv_a_norm": make.normal(14),
        "cos": cos, "sin": sin, "latent_norm_eps": 1e-5, "rope_interleaved": True,
    } | more  # fmt: skip


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}


def check(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@isas
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_prologues_are_the_definition(bound: Callable[..., Any], isa: str, tokens: int) -> None:
    given = projecting(tokens, nope_dim=5)
    check(bound(mla_project, isa, given)(**given), mla_project.reference(**wide(given)))
    given = projecting(tokens, w_uk=Make("absorbed", torch.float32).normal(3, 5, 14))
    check(bound(mla_prologue, isa, given)(**given), mla_prologue.reference(**wide(given)))


@isas
def test_threads_and_neighbours_do_not_matter_to_projections(bound: Callable[..., Any], isa: str) -> None:
    given = projecting(33, nope_dim=5)
    project = bound(mla_project, isa, given)
    expected = project(**given)
    for count in (2, 4):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(project(**given), expected, strict=True))
    one = given | {name: given[name][7:8] for name in ("hidden", "cos", "sin")}
    assert all(torch.equal(a, b[7:8]) for a, b in zip(project(**one), expected, strict=True))


@isas
def test_only_named_rows_of_the_cache_are_written(bound: Callable[..., Any], isa: str) -> None:
    cache = cache_layout(LATENT, "plain").allocate(3, 4, [14, 6], torch.float32)
    for field in cache:
        field.fill_(7.0)
    slots = torch.tensor([9, -1, 2])
    given = projecting(
        3, w_uk=Make("absorbed", torch.float32).normal(3, 5, 14), latent_cache=cache, slots=slots, cache_format="plain"
    )
    results = bound(mla_prologue_into_cache, isa, given)(**given)
    plain = {n: v for n, v in given.items() if n not in ("latent_cache", "slots", "cache_format")}
    query_latent, query_rope, latent, rope_key, query_residual = mla_prologue.reference(**wide(plain))
    check(results, (query_latent, query_rope, query_residual))
    for field, rows in zip(cache, (latent, rope_key), strict=True):
        torch.testing.assert_close(field.flatten(0, 1)[[9, 2]].double(), rows[[0, 2]], rtol=1e-4, atol=1e-4)
        assert (field.flatten(0, 1)[[i for i in range(12) if i not in (9, 2)]] == 7.0).all()


@isas
def test_shapes_that_do_not_fit_are_refused(bound: Callable[..., Any], isa: str) -> None:
    given = projecting(2, nope_dim=5)
    project = bound(mla_project, isa, given)
    with pytest.raises(InputError, match="do not fit"):
        project(**given | {"kv_a": given["kv_a"][:-1]})


@isas
def test_index_keys_are_centred_and_head_weights_stay_float32(bound: Callable[..., Any], isa: str) -> None:
    make, (cos, sin) = Make("indexer", torch.bfloat16), rotary_angles(torch.arange(5), 1e4, 8)
    given = {
        "hidden": make.normal(5, 40), "query_residual": make.normal(5, 24), "wq_b": make.normal(2 * 16, 24, std=0.2),
        "wk": make.normal(16, 40, std=0.2), "k_norm_weight": make.normal(16), "k_norm_bias": make.normal(16),
        "weights_proj": make.normal(2, 40), "cos": cos, "sin": sin, "k_norm_eps": 1e-6, "rope_interleaved": True,
    }  # fmt: skip
    query, key, weights = bound(indexer_prologue, isa, given)(**given)
    exact_query, exact_key, exact_weights = indexer_prologue.reference(**wide(given))
    torch.testing.assert_close(query.double(), exact_query, rtol=0.02, atol=0.02)
    torch.testing.assert_close(key.double(), exact_key, rtol=0.02, atol=0.05)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-5, atol=1e-5)
