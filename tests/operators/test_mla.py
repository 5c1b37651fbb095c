"""The MLA operators: projections against formulas, both dense forms against plain loops and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.backends.torch import chunks
from glm5_port.backends.torch.mla import cut_into_blocks
from glm5_port.errors import InputError
from glm5_port.operators.cache import cache_layout, gather_rows, write_cache
from glm5_port.operators.cases.mla import projection, prologue
from glm5_port.operators.mla import (
    attention_output,
    mla_attention_absorbed,
    mla_attention_expanded,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
)
from glm5_port.testing.cases import Make
from tests.operators.doors import BOTH, compiled, function_of, on_absent_device
from tests.operators.scenes import Scene, alone, scene

DENSE = pytest.mark.parametrize("form", ["absorbed", "expanded"])


def run_dense(form: str, variant: str, given: Scene) -> Tensor:
    """Both forms, taken to the value space so that they compare."""
    if form == "expanded":
        return function_of(mla_attention_expanded, variant)(**given.expanded())
    latent = function_of(mla_attention_absorbed, variant)(**given.absorbed())
    return torch.einsum("thc,hvc->thv", latent, given.w_uv)


def expected_values(given: Scene) -> Tensor:
    return torch.einsum("thc,hvc->thv", given.expected(), given.w_uv)


# -- projections -------------------------------------------------------------------------------------------------------


@BOTH
def test_project_is_the_formula(variant: str) -> None:
    call = projection(Make("project", torch.float64), 4, std=0.1)
    call |= {"cos": torch.ones(4, 4), "sin": torch.zeros(4, 4)}  # no rotation; rotate has its own tests
    nope, rope, latent, rope_key, residual = function_of(mla_project, variant)(**call, nope_dim=10)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + call["latent_norm_eps"]).sqrt()

    x = call["hidden"]
    torch.testing.assert_close(residual, norm(x @ call["q_a"].T, call["q_a_norm"]))
    query = (residual @ call["q_b"].T).view(4, 3, 18)
    torch.testing.assert_close(nope, query[..., :10])
    torch.testing.assert_close(rope, query[..., 10:])
    down = x @ call["kv_a"].T
    torch.testing.assert_close(latent, norm(down[:, :16], call["kv_a_norm"]))
    torch.testing.assert_close(rope_key, down[:, 16:])


@BOTH
def test_only_the_rope_parts_are_rotated_and_the_layout_matters(variant: str) -> None:
    call = projection(Make("project", torch.float64), 4) | {"nope_dim": 10}
    turned = function_of(mla_project, variant)(**call)
    half_split = function_of(mla_project, variant)(**call | {"rope_interleaved": False})
    straight = function_of(mla_project, variant)(**call | {"cos": torch.ones(4, 4), "sin": torch.zeros(4, 4)})
    for place, is_rotated in enumerate((False, True, False, True, False)):
        assert torch.equal(turned[place], straight[place]) is not is_rotated
        assert torch.equal(turned[place], half_split[place]) is not is_rotated


@BOTH
def test_eps_reaches_both_latent_norms(variant: str) -> None:
    call = projection(Make("project", torch.float64), 4, std=1e-3) | {"nope_dim": 10}
    wide, narrow = (function_of(mla_project, variant)(**call | {"latent_norm_eps": eps}) for eps in (1e-5, 1e-6))
    for place in (2, 4):  # latent and query_residual
        assert (wide[place].norm() / narrow[place].norm()) < 0.6
    assert torch.equal(wide[3], narrow[3])  # the rope key has no norm


@BOTH
def test_prologue_absorbs_the_nope_part(variant: str) -> None:
    call = prologue(Make("prologue", torch.float64), 4)
    w_uk = call.pop("w_uk")
    nope, *rest = mla_project.reference(**call, nope_dim=w_uk.shape[1])
    latent_query, *same = function_of(mla_prologue, variant)(**call, w_uk=w_uk)
    for head in range(3):
        torch.testing.assert_close(latent_query[:, head], nope[:, head] @ w_uk[head])
    for mine, theirs in zip(same, rest, strict=True):
        torch.testing.assert_close(mine, theirs)


@BOTH
def test_prologue_into_cache_is_prologue_then_write(variant: str) -> None:
    call = prologue(Make("prologue", torch.float64), 4)
    slots = torch.tensor([6, -1, 0, 3])
    caches = [cache_layout("latent", "plain").allocate(3, 3, [16, 8], torch.float64) for _ in range(2)]
    query, rope, residual = function_of(mla_prologue_into_cache, variant)(
        **call, latent_cache=caches[0], slots=slots, cache_format="plain"
    )
    expected = mla_prologue.reference(**call)
    write_cache.reference(list(expected[2:4]), caches[1], slots, cache_format="plain")
    for mine, theirs in zip((query, rope, residual, *caches[0]), (*expected[:2], expected[4], *caches[1]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert caches[0][0].any()


@BOTH
def test_gradients_run_through_a_fresh_cache(variant: str) -> None:
    """Projection, cache, attention and output, as a training step does it: against finite differences."""
    make = Make("training", torch.float64)
    call = prologue(make, 3)
    w_uv, o = make.normal(3, 12, 16), make.normal(40, 36)

    def step(hidden: Tensor, kv_a: Tensor, w_uk: Tensor) -> Tensor:
        cache = cache_layout("latent", "plain").allocate(2, 2, [16, 8], torch.float64)
        query, rope, _ = function_of(mla_prologue_into_cache, variant)(
            **call | {"hidden": hidden, "kv_a": kv_a, "w_uk": w_uk},
            latent_cache=cache, slots=torch.tensor([2, 3, 0]), cache_format="plain",
        )  # fmt: skip
        attended = function_of(mla_attention_absorbed, variant)(
            query, rope, cache, torch.tensor([[1, 0]]), torch.tensor([0, 3]), torch.tensor([3]), scale=0.25, cache_format="plain"
        )
        return function_of(attention_output, variant)(attended, w_uv, o).square().sum()

    leaves = [call[name].clone().requires_grad_() for name in ("hidden", "kv_a", "w_uk")]
    assert torch.autograd.gradcheck(step, leaves, fast_mode=True)


@BOTH
def test_output_is_the_formula(variant: str) -> None:
    make = Make("output", torch.float64)
    latent, w_uv, o = make.normal(4, 3, 16), make.normal(3, 12, 16), make.normal(40, 36)
    values = torch.cat([latent[:, head] @ w_uv[head].T for head in range(3)], dim=-1)
    torch.testing.assert_close(function_of(attention_output, variant)(latent, w_uv, o), values @ o.T)


# -- dense attention ---------------------------------------------------------------------------------------------------


@BOTH
@DENSE
def test_equals_plain_loops(form: str, variant: str) -> None:
    given = scene()
    result = run_dense(form, variant, given)
    torch.testing.assert_close(result, expected_values(given))
    assert (result[-given.paging.padding :] == 0).all()


@BOTH
@DENSE
def test_page_size_and_table_width_do_not_matter(form: str, variant: str) -> None:
    scenes = [scene(page_size=size, extra_columns=extra) for size, extra in ((4, 0), (1, 0), (3, 5), (16, 1))]
    results = [run_dense(form, variant, given) for given in scenes]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@BOTH
@DENSE
def test_a_batch_is_each_sequence_alone(form: str, variant: str) -> None:
    whole = scene()
    result = run_dense(form, variant, whole)
    for sequence in range(len(whole.paging.new)):
        part, rows = alone(whole, sequence)
        torch.testing.assert_close(run_dense(form, variant, part), result[rows])


@BOTH
@DENSE
def test_chunked_prefill_equals_one_prefill(form: str, variant: str) -> None:
    whole = scene([9], [9], padding=0)
    at_once = run_dense(form, variant, whole)
    for first, end in ((0, 4), (4, 5), (5, 9)):
        p = whole.paging
        part = Scene(
            type(p)((end - first,), (end,), 0, p.page_size, p.pages, p.block_table),
            whole.query_nope[first:end], whole.query_rope[first:end], whole.w_uk, whole.w_uv, whole.cache,
        )  # fmt: skip
        torch.testing.assert_close(run_dense(form, variant, part), at_once[first:end])


@BOTH
@DENSE
def test_nan_in_one_sequence_does_not_reach_another(form: str, variant: str) -> None:
    given = scene()
    for field in given.cache["latent_cache"]:
        field.flatten(0, 1)[given.paging.slots_of(0, 2, 3)] = torch.nan
    given.query_nope[-given.paging.padding :] = torch.nan
    result = run_dense(form, variant, given)
    assert result[:3].isnan().all()
    assert result[3:].isfinite().all()  # padding included: it is located in the first sequence, and stays zero


@DENSE
@pytest.mark.parametrize("workspace", [1, 2000, 10_000, 100_000])
def test_a_small_workspace_gives_the_same(form: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene()
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    torch.testing.assert_close(run_dense(form, "torch/eager", given), expected_values(given))


@DENSE
@pytest.mark.parametrize("workspace", [1, 10_000, 2**28])
def test_gradients_equal_the_references(form: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    gradients = []
    for variant in ("reference", "torch/eager"):
        given = scene()
        leaves = [given.query_nope, given.query_rope, given.w_uk, given.w_uv, *given.cache["latent_cache"]]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        given.query_nope, given.query_rope, given.w_uk, given.w_uv, *given.cache["latent_cache"] = leaves
        run_dense(form, variant, given).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, right in zip(*reversed(gradients), strict=True):
        assert right.isfinite().all()
        assert right.abs().max() > 0
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_blocks_cover_every_token_once(size: int) -> None:
    starts, lengths = torch.tensor([0, 3, 3, 4, 9]), torch.tensor([9, 4, 1, 5])
    blocks = cut_into_blocks(starts, lengths, 11, size)
    filled = blocks.positions >= 0
    assert sorted(blocks.tokens[filled].tolist()) == list(range(9))
    assert blocks.is_padding.tolist() == [False] * 9 + [True] * 2
    assert torch.equal(blocks.tokens.flatten()[blocks.homes][:9], torch.arange(9))
    assert blocks.positions.flatten()[blocks.homes][:9].tolist() == [6, 7, 8, 0, 0, 1, 2, 3, 4]
    owners = blocks.sequences[:, None].expand_as(blocks.tokens)[filled]
    assert owners[blocks.tokens[filled].argsort()].tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]


def glm5_call(form: str, new: list[int], context: int) -> dict[str, Any]:
    """GLM-5 widths on the meta device; the expanded form with 8 of 64 heads, as one of 8 ranks."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, batch, pages = sum(new), len(new), context // 64
    common = {
        "latent_cache": [meta(pages, 64, 512), meta(pages, 64, 64)],
        "block_table": meta(batch, pages, dtype=torch.int32),
        "query_starts": meta(batch + 1, dtype=torch.int32),
        "lengths": meta(batch, dtype=torch.int32),
        "scale": 0.0625,
        "cache_format": "plain",
    }
    if form == "absorbed":
        return {"query_latent": meta(tokens, 64, 512), "query_rope": meta(tokens, 64, 64), **common}
    query = {"query_nope": meta(tokens, 8, 192), "query_rope": meta(tokens, 8, 64)}
    return query | {"w_uk": meta(8, 192, 512), "w_uv": meta(8, 256, 512)} | common


@DENSE
@pytest.mark.parametrize(("new", "context"), [([64], 131_072), ([1, 1], 131_072), ([700, 1, 60], 4096)])
def test_no_host_sync_and_within_the_workspace(form: str, new: list[int], context: int) -> None:
    operator = {"absorbed": mla_attention_absorbed, "expanded": mla_attention_expanded}[form]
    result, largest = on_absent_device(operator, glm5_call(form, new, context))
    assert result.shape == (sum(new), *((64, 512) if form == "absorbed" else (8, 256)))
    assert largest <= chunks.WORKSPACE_BYTES


# -- doors and errors --------------------------------------------------------------------------------------------------


def into_cache_call() -> dict[str, Any]:
    cache = cache_layout("latent", "plain").allocate(3, 3, [16, 8], torch.float32)
    slots = torch.tensor([6, -1, 0, 3])
    return prologue(Make("prologue", torch.float32), 4) | {"latent_cache": cache, "slots": slots, "cache_format": "plain"}


def test_projections_make_no_host_sync_and_compile() -> None:
    make = Make("doors", torch.float32)
    calls = [
        (mla_project, projection(make, 4) | {"nope_dim": 10}),
        (mla_prologue, prologue(make, 4)),
        (attention_output, {"latent_out": make.normal(4, 3, 16), "w_uv": make.normal(3, 12, 16), "o": make.normal(40, 36)}),
    ]
    for operator, call in calls:
        on_absent_device(operator, call)
        torch.testing.assert_close(compiled(operator, call), operator.reference(**call))


def test_prologue_into_cache_makes_no_host_sync_and_compiles() -> None:
    on_absent_device(mla_prologue_into_cache, into_cache_call())
    mine, theirs = into_cache_call(), into_cache_call()
    torch.testing.assert_close(compiled(mla_prologue_into_cache, mine), mla_prologue_into_cache.reference(**theirs))
    written = gather_rows(cache_layout("latent", "plain"), mine["latent_cache"], torch.arange(9))
    torch.testing.assert_close(written, gather_rows(cache_layout("latent", "plain"), theirs["latent_cache"], torch.arange(9)))
    assert written[0][[6, 0, 3]].any(-1).all()


@DENSE
def test_dense_attention_compiles_as_one_graph_with_and_without_gradients(form: str) -> None:
    given = scene()
    operator, call = {
        "absorbed": (mla_attention_absorbed, given.absorbed()),
        "expanded": (mla_attention_expanded, given.expanded()),
    }[form]
    expected = operator.reference(**call)
    torch.testing.assert_close(compiled(operator, call), expected)
    trained = call | {"query_rope": call["query_rope"].clone().requires_grad_()}
    result = compiled(operator, trained)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert trained["query_rope"].grad.abs().max() > 0


@BOTH
def test_what_does_not_fit_is_refused(variant: str) -> None:
    call = prologue(Make("prologue", torch.float32), 4)
    cut = {"hidden": call["hidden"][0], "q_b": call["q_b"][1:], "kv_a": call["kv_a"][1:], "cos": call["cos"][:, 1:]}
    for wrong in ({name: value} for name, value in cut.items()):
        with pytest.raises(InputError, match=r"kv_a \[C \+ R, D\]"):
            function_of(mla_prologue, variant)(**call | wrong)
    with pytest.raises(InputError, match=r"o \[D, H \* V\]"):
        function_of(attention_output, variant)(torch.ones(2, 3, 4), torch.ones(3, 5, 4), torch.ones(7, 14))
    with pytest.raises(InputError, match="656-byte row"):
        function_of(mla_prologue_into_cache, variant)(**into_cache_call() | {"cache_format": "fp8"})
    with pytest.raises(InputError, match=r"block_table \[B, N\]"):
        function_of(mla_attention_absorbed, variant)(**scene().absorbed() | {"lengths": torch.tensor([3])})
