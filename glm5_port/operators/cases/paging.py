"""Paged batches for the cases of attention and cache: sequences of unequal length in scattered pages, with everything that
a call must not look at made hostile: unwritten rows, spare pages, and block table entries beyond a sequence's pages.

Shape legend: T tokens; B sequences; N pages a sequence; W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.cache import CacheLayout, cache_layout, slots_at
from glm5_port.testing.cases import Make

SPARE_PAGES = 2
"""Pages that belong to no sequence."""
GARBAGE_PAGE_IDS = (2**31 - 1, -1, -(2**31), 10**6)


@dataclass(frozen=True)
class Paging:
    """Which pages hold a batch.

    Attributes:
        new: tokens of this call, a sequence.
        lengths: cached tokens, a sequence, the new ones included.
        padding: packed rows behind the last token.
        page_size: tokens a page.
        pages: how many there are.
        block_table: [B, N] int32.
    """

    new: tuple[int, ...]
    lengths: tuple[int, ...]
    padding: int
    page_size: int
    pages: int
    block_table: Tensor

    @property
    def tokens(self) -> int:
        return sum(self.new) + self.padding

    def arguments(self) -> dict[str, Tensor]:
        """block_table, query_starts and lengths of a call."""
        starts = torch.tensor([0, *self.new]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return {"block_table": self.block_table, "query_starts": starts, "lengths": lengths}

    def token_slots(self) -> Tensor:
        """[T] int64: where this call's tokens are written; -1 for padding."""
        batch = enumerate(zip(self.new, self.lengths, strict=True))
        slots = [self.slots_of(sequence, length - new, length) for sequence, (new, length) in batch]
        return torch.cat((*slots, torch.full((self.padding,), -1)))

    def slots_of(self, sequence: int, first: int, end: int) -> Tensor:
        """The slots of positions first .. end - 1."""
        return slots_at(self.block_table, torch.tensor(sequence), torch.arange(first, end), self.page_size)


def page_batch(
    make: Make, new: Sequence[int], lengths: Sequence[int], *, page_size: int = 4, padding: int = 0, extra_columns: int = 1
) -> Paging:
    """Scatters a batch over pages. The block table is `extra_columns` wider than its longest sequence needs."""
    needed = [-(-length // page_size) for length in lengths]
    pages = sum(needed) + SPARE_PAGES
    order = make.permutation(pages, dtype=torch.int32)
    columns = max(needed) + extra_columns
    garbage = torch.tensor(GARBAGE_PAGE_IDS, dtype=torch.int32)
    table = garbage[torch.arange(len(lengths) * columns) % len(garbage)].reshape(len(lengths), columns)
    for sequence, count in enumerate(needed):
        before = sum(needed[:sequence])
        table[sequence, :count] = order[before : before + count]
    return Paging(tuple(new), tuple(lengths), padding, page_size, pages, table)


def random_batch(make: Make) -> dict[str, Any]:
    """Arguments of a batch of random shape: new, lengths, padding and page_size."""
    new = [make.one_of(0, 1, 1, make.size(0, 9)) for _ in range(make.size(1, 4))]
    lengths = [count + make.one_of(0, make.size(0, 5), make.size(0, 150)) for count in new]
    page_size = make.one_of(1, 4, 16, 64, make.size(1, 20))
    return {"new": new, "lengths": lengths, "padding": make.one_of(0, 0, make.size(0, 3)), "page_size": page_size}


def without_last_page(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call with a block table one column narrower: its width bounds the positions that are considered."""
    return {**arguments, "block_table": arguments["block_table"][:, :-1].contiguous()}


def filled_cache(make: Make, paging: Paging, layout: CacheLayout, widths: Sequence[int], *, std: float = 1.0) -> list[Tensor]:
    """A cache in which every position below its sequence's length holds a normal row, and every other row reads as NaN."""
    cache = layout.allocate(paging.pages, paging.page_size, widths, make.dtype)
    for field in cache:
        if field.dtype.is_floating_point:
            field.fill_(torch.nan)
        else:
            field.view(torch.uint8).fill_(0xFF)  # NaN in e4m3, bfloat16 and float32
    for sequence, length in enumerate(paging.lengths):
        rows = [make.normal(length, width, std=std) for width in widths]
        slots = paging.slots_of(sequence, 0, length)
        for field, values in zip(cache, layout.encode(rows), strict=True):
            field.flatten(0, 1)[slots] = values.to(field.dtype)
    return cache


def filled_latent_cache(make: Make, paging: Paging, cache_format: str, latent_dim: int, rope_dim: int) -> dict[str, Any]:
    """latent_cache and cache_format of a call."""
    layout = cache_layout("latent", cache_format)
    return {"latent_cache": filled_cache(make, paging, layout, [latent_dim, rope_dim]), "cache_format": cache_format}
