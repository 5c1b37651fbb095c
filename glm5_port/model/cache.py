"""The paged cache: latent and rope key of every layer, index keys of the layers that own an indexer.

Positions of a sequence live in pages of `page_size` rows; one block table a sequence serves all layers, so that a page id means
the same rows everywhere. A contiguous cache is one page a sequence (page_size = the longest context).

Shape legend: T packed tokens of a step, B sequences of a step, N pages in the widest block table, P pages of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.operators.cache import cache_layout

MAX_STEP_TOKENS = 2048
"""Most tokens of one forward step; longer prompts are prefilled in chunks of this size. Operators are told it as `max_tokens`."""

PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Span:
    """`count` new tokens of one sequence, at positions start .. start + count - 1."""

    sequence: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the tokens of one step stand. See the call conventions in docs/architecture.md.

    Attributes:
        positions_T: int64, absolute position of each token.
        query_starts_B1: int32, first row of each sequence, then T.
        lengths_B: int32, tokens of each sequence that are cached after this step.
        block_table_BN: int32 page ids.
        slots_T: int64, page * page_size + row of each token.
        last_rows_B: int64, the row of each sequence's last token.
        phase: "decode" when every sequence has one new token, else "prefill".
    """

    positions_T: Tensor
    query_starts_B1: Tensor
    lengths_B: Tensor
    block_table_BN: Tensor
    slots_T: Tensor
    last_rows_B: Tensor
    phase: str


@dataclass(slots=True)
class LayerCache:
    """The pages of one layer: fields of the latent layout, and of the index layout where the layer owns an indexer."""

    latent: list[Tensor]
    index: list[Tensor] | None


class PagedCache:
    """Pages for every layer, and who holds them.

    Args:
        config: sizes.
        index_layers: for each cached layer (the trunk's, then the MTP layer if any) whether it stores index keys.
        cache_format: "plain" (the model's dtype), "fp8" or "int8"; see `glm5_port.operators.cache`.
        pages: pages of each layer.
        page_size: rows of a page.
        dtype: the model's dtype.
        device: where the pages live.
    """

    def __init__(
        self,
        config: Glm5Config,
        *,
        index_layers: Sequence[bool],
        cache_format: str,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if pages < 1 or page_size < 1:
            raise InputError(f"a cache needs at least one page of at least one row, got pages={pages}, page_size={page_size}")
        latent = cache_layout("latent", cache_format)
        index = cache_layout("index", cache_format)
        self.page_size = page_size
        self.pages = pages
        self.device = torch.device(device)
        self.layers = [
            LayerCache(
                latent=latent.allocate(pages, page_size, (config.kv_lora_rank, config.qk_rope_head_dim), dtype, device),
                index=index.allocate(pages, page_size, (config.index_head_dim,), dtype, device) if owns_indexer else None,
            )
            for owns_indexer in index_layers
        ]
        self._free = list(range(pages - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}
        self._next_sequence = 0

    def open(self) -> int:
        """A new, empty sequence."""
        sequence = self._next_sequence
        self._next_sequence += 1
        self._tables[sequence] = []
        return sequence

    def close(self, sequence: int) -> None:
        """Gives a sequence's pages back."""
        self._free.extend(reversed(self._tables.pop(sequence)))

    def _reserve(self, sequence: int, length: int) -> list[int]:
        table = self._tables[sequence]
        wanted = -(-length // self.page_size) - len(table)
        if wanted > len(self._free):
            raise InputError(
                f"the cache is full: {length} tokens of one sequence need {wanted} more pages of {self.page_size}, "
                f"{len(self._free)} of {self.pages} are free\n  Make the cache larger, or close sequences that have ended."
            )
        table.extend(self._free.pop() for _ in range(wanted))
        return table

    def batch(self, spans: Sequence[Span]) -> Batch:
        """Reserves the pages that the spans need and describes the step. One host-to-device copy for each tensor."""
        tables = [self._reserve(span.sequence, span.start + span.count) for span in spans]
        width = max((len(table) for table in tables), default=1)
        block_table_BN = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
        block_table_BN = block_table_BN.view(len(tables), width)  # also without a sequence
        counts_B = torch.tensor([span.count for span in spans], dtype=torch.int64)
        starts_B = torch.tensor([span.start for span in spans], dtype=torch.int64)
        query_starts_B1 = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
        total = sum(span.count for span in spans)  # told, so that fake tensors know the size too
        row_T = torch.repeat_interleave(torch.arange(len(spans)), counts_B, output_size=total)
        positions_T = torch.arange(len(row_T)) - query_starts_B1[row_T] + starts_B[row_T]
        pages_T = block_table_BN[row_T, positions_T // self.page_size].long()
        device = self.device
        return Batch(
            positions_T=positions_T.to(device),
            query_starts_B1=query_starts_B1.to(device, torch.int32),
            lengths_B=(starts_B + counts_B).to(device, torch.int32),
            block_table_BN=block_table_BN.to(device),
            slots_T=(pages_T * self.page_size + positions_T % self.page_size).to(device),
            last_rows_B=(query_starts_B1[1:] - 1).to(device),
            phase=DECODE if all(span.count == 1 for span in spans) else PREFILL,
        )
