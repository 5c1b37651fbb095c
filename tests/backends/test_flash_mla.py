"""sparse_mla_attention by FlashMLA: its reasons, and that the library is called as its source says, by a stand-in; no GPU."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import assume
from glm5_port.operators.sparse_attention import sparse_mla_attention
from glm5_port.registry import OPERATORS
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites

IMPLEMENTATION = OPERATORS["sparse_mla_attention"].implementations["cuda/flash_mla"]
FACTS: dict[str, Any] = {
    "dtype": torch.bfloat16, "cache_format": "fp8", "heads": 64, "latent_dim": 512, "rope_dim": 64, "top_k": 2048,
}  # fmt: skip
NO_KEY_SUM = float("inf")
"""What the library's second result holds where a row has no key."""


class Metadata:
    """The schedule of one call."""


def with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Metadata,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the library's checks ask for in sparse decoding, and what it computes, from the bytes of a row."""
    assert isinstance(tile_scheduler_metadata, Metadata) and num_splits is None and not causal and is_fp8_kvcache
    assert q.dim() == k_cache.dim() == 4 and indices is not None and indices.dim() == 3
    batch, tokens, heads, width = q.shape
    assert batch > 0 and tokens > 0 and heads in (64, 128) and (width, head_dim_v) == (576, 512)
    assert q.dtype == torch.bfloat16 and k_cache.dtype in (torch.uint8, torch.int8) and indices.dtype == torch.int32
    assert k_cache.shape[2:] == (1, 656) and k_cache.stride(1) == 656 and k_cache.stride(-1) == q.stride(-1) == 1
    assert indices.shape[:2] == (batch, tokens) and indices.shape[2] % 64 == 0 and indices.stride(-1) == 1
    assert block_table is None and cache_seqlens is None
    rows = k_cache.reshape(-1, 656)
    numbers = rows[:, :512].contiguous().view(torch.float8_e4m3fn).double().unflatten(1, (4, 128))
    scales = rows[:, 512:528].contiguous().view(torch.float32).double()
    latent = (numbers * scales[..., None]).flatten(1)
    key = torch.cat((latent, rows[:, 528:].contiguous().view(torch.bfloat16).double()), dim=1)
    seen = (indices >= 0) & (indices < len(rows))
    chosen = indices.clamp(0, len(rows) - 1).long()
    scores = torch.einsum("bthw,btkw->bthk", q.double(), key[chosen]) * (softmax_scale or width**-0.5)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1), nan=0.0)
    values = torch.where(seen[..., None], latent[chosen], 0.0)
    total = scores.logsumexp(-1).masked_fill(~seen.any(-1)[:, :, None], NO_KEY_SUM)
    return torch.einsum("bthk,btkc->bthc", weights, values).to(q.dtype), total.float()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("flash_mla")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_mla", None)
    module.get_mla_metadata = lambda *_, **__: (Metadata(), None)  # type: ignore[attr-defined]
    module.flash_mla_with_kvcache = with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    with assume((9, 0)):
        yield


@pytest.mark.usefixtures("library")
def test_it_passes_its_cases_at_glm5_widths_and_declines_the_others() -> None:
    suite = load_suites()["sparse_mla_attention"]
    results = [parity.run_case(suite, IMPLEMENTATION, case, torch.bfloat16) for case in suite.cases]
    assert {result.case for result in results if result.status == "passed"} == {"glm5_fp8"}
    assert {result.status for result in results} == {"passed", "declined"}, [str(r) for r in results if r.status == "failed"]
    assert all("fp8" in case.name for case in suite.cases if case.tags & WIDTH and case.name == "glm5_fp8")


@pytest.mark.usefixtures("library")
def test_tokens_of_several_sequences_padding_and_keys_out_of_reach() -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    cache = [torch.empty(7, 16, 656, dtype=torch.uint8)]
    slots = torch.arange(7 * 16)
    OPERATORS["write_cache"].reference([normal(112, 512), normal(112, 64)], cache, slots, cache_format="fp8")
    indices = torch.randint(-1, 60, (6, 64), generator=generator, dtype=torch.int32).sort(-1).values
    indices[1] = -1
    indices[2, 3:] = torch.tensor(2**31 - 1)
    arguments: dict[str, Any] = {
        "query_latent": normal(6, 64, 512), "query_rope": normal(6, 64, 64), "latent_cache": cache, "indices": indices,
        "block_table": torch.tensor([[4, 1, 6], [2, 99, -3]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 3, 5], dtype=torch.int32), "lengths": torch.tensor([40, 9], dtype=torch.int32),
        "scale": 0.06, "cache_format": "fp8",
    }  # fmt: skip
    mine = IMPLEMENTATION.function(**arguments)
    torch.testing.assert_close(mine, sparse_mla_attention.reference(**arguments), rtol=2e-2, atol=2e-2)
    assert not mine[1].any() and not mine[5].any(), "no key, or padding"
    none = {**arguments, "query_latent": normal(0, 64, 512), "query_rope": normal(0, 64, 64), "indices": indices[:0]}
    assert IMPLEMENTATION.function(**none).shape == (0, 64, 512)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "takes bfloat16, not float16"),
        ({"cache_format": "plain"}, "reads caches of format fp8, not plain"),
        ({"heads": 16}, "takes 64 or 128 heads"),
        ({"latent_dim": 256}, "not 64, 256 and 64"),
        ({"top_k": 100}, "a multiple of 64 indices a token, not 100"),
    ],
)
@pytest.mark.usefixtures("library")
def test_reasons(change: dict[str, Any], reason: str) -> None:
    assert IMPLEMENTATION.not_supported(**FACTS) == []
    (said,) = IMPLEMENTATION.not_supported(**{**FACTS, **change})
    assert reason in said


def test_without_the_library_or_on_another_card_it_says_so() -> None:
    with assume((8, 0)):
        reasons = IMPLEMENTATION.not_supported(**FACTS)
    assert ["flash_mla is not installed" in reasons[0], "this card has 8.0" in reasons[1]] == [True, True]


@pytest.mark.usefixtures("library")
def test_it_goes_after_the_kernels_of_this_library() -> None:
    """Its bits depend on the number of multiprocessors, so that nobody gets it without having asked for it."""
    others = [i for i in OPERATORS["sparse_mla_attention"].implementations.values() if i.backend == "cuda"]
    assert max(others, key=lambda i: i.rank) is IMPLEMENTATION
    assert not IMPLEMENTATION.promises
