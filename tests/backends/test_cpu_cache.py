"""Native write_cache on every instruction set of this machine: the very bytes of the layouts' own definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.errors import InputError
from glm5_port.operators.cache import cache_layout, gather_rows, kind_of_rows, write_cache

ISAS = [isa for isa in extension.VECTOR if not extension.isa_missing(isa)]
FORMATS = ("plain", "fp8", "int8")

pytestmark = pytest.mark.skipif(not ISAS, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")
every_format = pytest.mark.parametrize("cache_format", FORMATS)
every_kind = pytest.mark.parametrize("widths", [(512, 64), (128,)], ids=["latent", "index"])
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(flags.CPU_ISA.name, request.param)
    flags.reset()
    yield str(request.param)
    monkeypatch.undo()
    flags.reset()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(isa: str, rows: Sequence[Tensor], cache: list[Tensor], slots: Tensor, cache_format: str) -> None:
    facts = write_cache.facts_of({"rows": list(rows), "cache": cache, "slots": slots, "cache_format": cache_format})
    bound = write_cache.bind(**facts | {"device_type": "cpu", "dtype": rows[0].dtype})
    assert bound.implementation.id == f"cpu/{isa}"
    bound(list(rows), cache, slots, cache_format=cache_format)


def assert_exact(isa: str, rows: Sequence[Tensor], cache_format: str, *, page_size: int = 5) -> None:
    """Writes rows to scattered slots; every byte of the cache is what `CacheLayout.encode` gives, or what it was before."""
    layout = cache_layout(kind_of_rows(rows), cache_format)
    tokens, pages = rows[0].shape[0], -(-rows[0].shape[0] // page_size) + 2
    slots = torch.randperm(pages * page_size, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[::7] = -1
    cache = layout.allocate(pages, page_size, [row.shape[1] for row in rows], rows[0].dtype)
    for field in cache:
        field.view(torch.uint8).fill_(0xA5)
    expected = [field.clone() for field in cache]
    kept = slots >= 0
    for field, values in zip(expected, layout.encode([row[kept] for row in rows]), strict=True):
        field.flatten(0, 1)[slots[kept]] = values.to(field.dtype)
    write(isa, rows, cache, slots, cache_format)
    for mine, right in zip(cache, expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), right.view(torch.uint8))


@every_format
@every_kind
@every_dtype
def test_bytes_of_ordinary_rows(isa: str, widths: Sequence[int], cache_format: str, dtype: torch.dtype) -> None:
    spread = torch.logspace(-12, 8, 211).unsqueeze(1)  # groups of every size, near zero and large
    assert_exact(isa, [(normal(211, width, seed=width) * spread).to(dtype) for width in widths], cache_format)


@pytest.mark.parametrize("cache_format", ["fp8", "int8"])
@every_kind
def test_bytes_on_ties_and_in_every_binade(isa: str, widths: Sequence[int], cache_format: str) -> None:
    """Groups with a scale of exactly 1 whose members are codes, ties between codes, and their neighbours; zeros of both signs."""
    largest = 448.0 if cache_format == "fp8" else 127.0
    codes = (
        torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() if cache_format == "fp8" else torch.arange(128.0)
    )
    ties = (codes[1:] + codes[:-1]) / 2
    around = [codes, ties, torch.nextafter(ties, torch.tensor(torch.inf)), torch.nextafter(ties, torch.tensor(0.0))]
    numbers = torch.cat([torch.cat(around), -torch.cat(around)])
    filled = torch.cat([numbers, torch.zeros(-len(numbers) % 127)]).view(-1, 127)
    groups = torch.cat([torch.full((len(filled), 1), largest), filled], -1)
    rows = [groups] if len(widths) == 1 else [groups.repeat(1, 4).contiguous(), normal(len(groups), 64)]
    assert_exact(isa, rows, cache_format)


@every_format
def test_odd_widths(isa: str, cache_format: str) -> None:
    for width in (1, 7, 24, 33):
        assert_exact(isa, [normal(9, width)], cache_format, page_size=1)


@every_format
@every_kind
def test_groups_that_are_not_finite_read_as_nan(isa: str, widths: Sequence[int], cache_format: str) -> None:
    layout = cache_layout("latent" if len(widths) == 2 else "index", cache_format)
    rows = [normal(2, width) for width in widths]
    rows[0][0, 3], rows[0][1, 5] = torch.nan, -torch.inf
    cache = layout.allocate(1, 4, widths, torch.float32)
    write(isa, rows, cache, torch.tensor([2, 0]), cache_format)
    read = gather_rows(layout, cache, torch.tensor([2, 0]))
    expected = layout.decode(layout.encode(rows))
    for mine, right in zip(read, expected, strict=True):
        assert torch.equal(mine.isnan(), right.isnan())
        assert torch.equal(mine.nan_to_num(), right.nan_to_num())


@every_format
@every_kind
def test_strided_rows_and_caches_that_are_views(isa: str, widths: Sequence[int], cache_format: str) -> None:
    layout = cache_layout("latent" if len(widths) == 2 else "index", cache_format)
    rows = [normal(6, width, seed=width) for width in widths]
    slots = torch.tensor([5, -1, 0, 7, 2, 3])
    plain = layout.allocate(2, 4, widths, torch.float32)
    write(isa, rows, plain, slots, cache_format)
    pool = layout.allocate(5, 4, widths, torch.float32)
    views = [field[1::2] for field in pool]
    write(isa, [torch.stack([row, row], -1).flatten(-2)[:, ::2] for row in rows], views, slots, cache_format)
    for mine, right in zip(views, plain, strict=True):
        assert torch.equal(mine, right)
    for field in pool:
        assert not field[::2].any()
    apart = [field.repeat_interleave(2, -1)[..., ::2] for field in layout.allocate(2, 4, widths, torch.float32)]
    write(isa, rows, apart, slots, cache_format)
    for mine, right in zip(apart, plain, strict=True):
        assert torch.equal(mine, right)


def test_a_slot_beyond_the_cache_is_an_error_and_writes_nothing(isa: str) -> None:
    layout = cache_layout("index", "plain")
    cache = layout.allocate(2, 4, [16], torch.float32)
    with pytest.raises(InputError, match="slot 8 of a cache of 8 rows"):
        write(isa, [normal(2, 16)], cache, torch.tensor([0, 8]), "plain")
    assert not cache[0].any()


def test_a_cache_of_another_dtype_is_rounded_to(isa: str) -> None:
    rows = [normal(3, 16), normal(3, 8)]
    cache = cache_layout("latent", "plain").allocate(1, 4, [16, 8], torch.bfloat16)
    write(isa, rows, cache, torch.arange(3), "plain")
    for field, row in zip(cache, rows, strict=True):
        assert torch.equal(field[0, :3], row.to(torch.bfloat16))
