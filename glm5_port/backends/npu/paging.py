"""Where the tokens of a call lie, in the words of the vendor's attention operators.

Their layout "TND" takes cumulative lengths of queries that end at the number of rows, so padding becomes one more sequence. Its
cached tokens lie in page 0 as far as the operator knows, and what it computes for them is dropped.

Shape legend: T tokens; B sequences; N pages of a sequence at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.backends.npu.rules import Rule

PAGES = Rule(
    "page size",
    "wants pages of 16 to 1024 rows in whole 16s, not {page_size}",
    lambda *, page_size, **_: page_size % 16 == 0 and 16 <= page_size <= 1024,
)


@dataclass(frozen=True, slots=True)
class Packed:
    """Attributes:
    query_ends: [B + 1] int32, cumulative tokens; the last is T.
    key_lengths: [B + 1] int32, cached tokens of each sequence.
    block_table: [B + 1, N] int32, every entry a page.
    """

    query_ends: Tensor
    key_lengths: Tensor
    block_table: Tensor


def pack(block_table: Tensor, query_starts: Tensor, lengths: Tensor, tokens: int, cache: Tensor) -> Packed:
    """The arguments of a paged attention operator, without a host sync.

    Args:
        block_table: [B, N].
        query_starts: [B + 1].
        lengths: [B].
        tokens: T, padding included.
        cache: a field of the cache, [pages, page_size, W].
    """
    pages, page_size = cache.shape[:2]
    end = torch.full_like(query_starts[:1], tokens)
    padding = (end - query_starts[-1:]).clamp_max(block_table.shape[1] * page_size)
    table = torch.cat((block_table, torch.zeros_like(block_table[:1])))
    return Packed(
        query_ends=torch.cat((query_starts[1:], end)).to(torch.int32),
        key_lengths=torch.cat((lengths, padding.to(lengths.dtype))).to(torch.int32),
        block_table=table.clamp(0, pages - 1).to(torch.int32).contiguous(),
    )
