"""sparse_mla_attention: the contract, against plain loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5_port.backends.torch import chunks
from glm5_port.errors import InputError
from glm5_port.operators.mla import mla_attention_absorbed
from glm5_port.operators.sparse_attention import sparse_mla_attention
from tests.operators.doors import BOTH, compiled, function_of, on_absent_device
from tests.operators.scenes import Scene, scene


def some_indices(given: Scene, top_k: int = 4) -> Tensor:
    """Distinct positions in any order, past and future, with -1 in between."""
    generator = torch.Generator().manual_seed(3)
    span = given.paging.block_table.shape[1] * given.paging.page_size
    picked = torch.rand(given.paging.tokens, span, generator=generator).argsort(-1)[:, :top_k]
    return picked.masked_fill(torch.rand(picked.shape, generator=generator) < 0.2, -1).int()


@BOTH
def test_equals_plain_loops(variant: str) -> None:
    given = scene()
    indices = some_indices(given)
    result = function_of(sparse_mla_attention, variant)(**given.sparse(indices))
    torch.testing.assert_close(result, given.expected(indices.tolist()))
    assert (result[-given.paging.padding :] == 0).all()


@BOTH
def test_every_position_equals_dense_attention(variant: str) -> None:
    given = scene()
    span = given.paging.block_table.shape[1] * given.paging.page_size
    indices = torch.arange(span).expand(given.paging.tokens, span).int()
    result = function_of(sparse_mla_attention, variant)(**given.sparse(indices))
    torch.testing.assert_close(result, mla_attention_absorbed.reference(**given.absorbed()))


@BOTH
def test_order_and_padding_carry_no_meaning(variant: str) -> None:
    given = scene()
    indices = some_indices(given)
    attend = function_of(sparse_mla_attention, variant)
    shuffled = torch.cat((torch.full_like(indices[:, :2], -1), indices.flip(-1)), dim=-1)
    torch.testing.assert_close(attend(**given.sparse(shuffled)), attend(**given.sparse(indices)))


@BOTH
def test_the_future_is_cut_whatever_the_indices_say(variant: str) -> None:
    given = scene([1], [9], padding=0)
    attend = function_of(sparse_mla_attention, variant)
    for row in given.cache["latent_cache"]:
        row.flatten(0, 1)[given.paging.slots_of(0, 6, 9)] = 1e6  # positions 6, 7 and 8
    arguments = given.sparse(torch.tensor([[1, 4, 6, 7, 8, 9, 2**31 - 1]], dtype=torch.int32))
    arguments["lengths"] = torch.tensor([6], dtype=torch.int32)  # the token is now at position 5
    near = given.sparse(torch.tensor([[1, 4, -1]], dtype=torch.int32)) | {"lengths": arguments["lengths"]}
    torch.testing.assert_close(attend(**arguments), attend(**near))
    assert attend(**arguments).abs().max() < 100


@BOTH
def test_rows_without_a_visible_key_are_zero(variant: str) -> None:
    given = scene([2], [3], padding=1)
    attend = function_of(sparse_mla_attention, variant)
    assert (attend(**given.sparse(torch.full((3, 5), -1, dtype=torch.int32))) == 0).all()
    assert (attend(**given.sparse(torch.full((3, 0), 0, dtype=torch.int32))) == 0).all()
    beyond = attend(**given.sparse(torch.tensor([[2], [2], [0]], dtype=torch.int32)))
    assert (beyond[[0, 2]] == 0).all()
    assert (beyond[1] != 0).all()


@BOTH
def test_an_unselected_nan_row_does_not_reach_the_result(variant: str) -> None:
    given = scene([3], [9], padding=0)
    for field in given.cache["latent_cache"]:
        field.flatten(0, 1)[given.paging.slots_of(0, 4, 5)] = torch.nan
    indices = torch.tensor([[0, 2, 6], [0, 4, 6], [3, 7, 8]], dtype=torch.int32)
    result = function_of(sparse_mla_attention, variant)(**given.sparse(indices))
    assert result[[0, 2]].isfinite().all()
    assert result[1].isnan().all()


@BOTH
def test_page_size_does_not_matter(variant: str) -> None:
    results = []
    for page_size in (1, 3, 4, 16):
        given = scene(page_size=page_size)
        indices = torch.tensor([[0, 2, 5, 8]], dtype=torch.int32).expand(given.paging.tokens, 4)
        results.append(function_of(sparse_mla_attention, variant)(**given.sparse(indices)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("workspace", [1, 3000, 30_000])
def test_a_small_workspace_gives_the_same(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene()
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    indices = some_indices(given, top_k=9)
    result = function_of(sparse_mla_attention, "torch/eager")(**given.sparse(indices))
    torch.testing.assert_close(result, given.expected(indices.tolist()))


@pytest.mark.parametrize("workspace", [1, 2**28])
def test_gradients_equal_the_references(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    given = scene()
    indices = some_indices(given)
    gradients = []
    for variant in ("reference", "torch/eager"):
        arguments = given.sparse(indices)
        leaves = [arguments["query_latent"], arguments["query_rope"], *arguments["latent_cache"]]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        arguments |= {"query_latent": leaves[0], "query_rope": leaves[1], "latent_cache": leaves[2:]}
        function_of(sparse_mla_attention, variant)(**arguments).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, right in zip(*reversed(gradients), strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(ours, right)


def glm5_call(tokens: int, context: int, cache_format: str) -> dict[str, object]:
    """One sequence at GLM-5 widths, on the meta device."""
    pages = context // 64
    cache = {"plain": [(512, torch.bfloat16), (64, torch.bfloat16)], "fp8": [(656, torch.uint8)]}[cache_format]
    return {
        "query_latent": torch.empty(tokens, 64, 512, dtype=torch.bfloat16, device="meta"),
        "query_rope": torch.empty(tokens, 64, 64, dtype=torch.bfloat16, device="meta"),
        "latent_cache": [torch.empty(pages, 64, width, dtype=dtype, device="meta") for width, dtype in cache],
        "indices": torch.empty(tokens, 2048, dtype=torch.int32, device="meta"),
        "block_table": torch.empty(1, pages, dtype=torch.int32, device="meta"),
        "query_starts": torch.empty(2, dtype=torch.int32, device="meta"),
        "lengths": torch.empty(1, dtype=torch.int32, device="meta"),
        "scale": 0.0625,
        "cache_format": cache_format,
    }


@pytest.mark.parametrize("cache_format", ["plain", "fp8"])
def test_no_host_sync_and_within_the_workspace_at_128k(cache_format: str) -> None:
    call = glm5_call(512, 131_072, cache_format)
    result, largest = on_absent_device(sparse_mla_attention, call)
    assert result.shape == (512, 64, 512)
    assert largest <= chunks.WORKSPACE_BYTES


def test_compiles_as_one_graph_with_and_without_gradients() -> None:
    given = scene()
    call = given.sparse(some_indices(given))
    expected = sparse_mla_attention.reference(**call)
    torch.testing.assert_close(compiled(sparse_mla_attention, call), expected)
    trained = call | {"query_latent": call["query_latent"].clone().requires_grad_()}
    result = compiled(sparse_mla_attention, trained)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert trained["query_latent"].grad.abs().max() > 0


@BOTH
def test_what_does_not_fit_is_refused(variant: str) -> None:
    given = scene()
    call = given.sparse(some_indices(given))
    attend = function_of(sparse_mla_attention, variant)
    with pytest.raises(InputError, match=r"one list of positions a token"):
        attend(**call | {"indices": call["indices"][:2]})
    with pytest.raises(InputError, match="no such layout"):
        attend(**call | {"cache_format": "fp16"})
    cut = {"lengths": call["lengths"][:1], "query_rope": call["query_rope"][:, :1], "block_table": call["block_table"][0]}
    for wrong in ({name: value} for name, value in cut.items()):
        with pytest.raises(InputError, match=r"query_starts \[B \+ 1\]"):
            attend(**call | wrong)
