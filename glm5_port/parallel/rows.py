"""Which tokens of a step are computed where, from the spans of all sequences: every rank knows all of them, so nothing is asked.

Sequences go to attention groups in turns. Inside a group, `context` ranks share the tokens of each sequence in 2 context pieces,
the first and the last to rank 0 and so on: later tokens attend to more, so that every rank gets as much. Ranks of a tensor group
compute the same tokens; between blocks each carries one part of their rows, padded to the same number on all ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_port.model.cache import DECODE, PREFILL, Batch, PagedCache, Span
from glm5_port.parallel.plan import ALL_REDUCE, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch(Batch):
    """A step as one rank sees it. The fields of `Batch` describe the tokens whose attention this rank computes, but for
    last_rows_B, which are rows of the whole step.

    Attributes:
        tokens: of the whole step.
        rows_T: which of them this rank's attention computes.
        carried: rows that each rank of the stage carries between blocks.
        own: how many of this rank's carried rows are tokens; the others are padding.
        places_T: for each token of the step, its row among those carried by all ranks of a stage, in the order of ranks.
        exchange_phase: which of a plan's two exchanges this step uses.
        slots_of: for each rank of the context group, the cache slots that it writes.
    """

    tokens: int
    rows_T: Tensor
    carried: int
    own: int
    places_T: Tensor
    exchange_phase: str
    slots_of: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The tokens of one (data, context) coordinate.

    Attributes:
        spans: runs of sequences.
        first: row of each run's first token in the whole step.
    """

    spans: tuple[Span, ...]
    first: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(span.count for span in self.spans)

    def rows(self) -> list[int]:
        """Rows of the whole step."""
        return [row for span, first in zip(self.spans, self.first, strict=True) for row in range(first, first + span.count)]


def split(spans: Sequence[Span], layout: Layout) -> list[list[Pieces]]:
    """The work of each attention group and each context rank of it: pieces[data][context]."""
    found: list[list[list[tuple[Span, int]]]] = [[[] for _ in range(layout.context)] for _ in range(layout.data)]
    first = 0
    for span in spans:
        pieces = 2 * layout.context if layout.context > 1 else 1
        cuts = [span.count * piece // pieces for piece in range(pieces + 1)]
        for piece, (begin, end) in enumerate(pairwise(cuts)):
            context = min(piece, pieces - 1 - piece)
            if end > begin:
                part = Span(span.sequence, span.start + begin, end - begin)
                found[span.sequence % layout.data][context].append((part, first + begin))
        first += span.count
    return [[Pieces(tuple(span for span, _ in each), tuple(row for _, row in each)) for each in group] for group in found]


class SharedCache(PagedCache):
    """The pages of one rank: of the sequences of its attention group, and of the layers of its stage.

    Args:
        layout: of the replica.
        coordinates: of this rank in it.
        lengths: final length of every sequence of the whole step, in the order in which they are opened.
        options: as `PagedCache`.
    """

    def __init__(
        self, layout: Layout, coordinates: dict[str, int], lengths: Sequence[int], page_size: int, **options: Any
    ) -> None:
        mine = lengths[coordinates["data"] :: layout.data]
        super().__init__(pages=max(1, sum(-(-n // page_size) for n in mine)), page_size=page_size, **options)
        self.layout = layout
        self.coordinates = coordinates

    def batch(self, spans: Sequence[Span]) -> RankBatch:
        layout, at = self.layout, self.coordinates
        pieces = split(spans, layout)
        mine = pieces[at["data"]]
        batches = [super(SharedCache, self).batch(each.spans) for each in mine]
        local = batches[at["context"]]
        most = max(each.tokens for group in pieces for each in group)
        whole = layout.exchange == ALL_REDUCE
        carried = most if whole else -(-most // layout.tensor)
        own = most if whole else min(max(mine[at["context"]].tokens - at["tensor"] * carried, 0), carried)
        ends = torch.tensor([span.count for span in spans], dtype=torch.int64).cumsum(0)
        known = {item.name: getattr(local, item.name) for item in fields(Batch)}
        return RankBatch(
            **known | {"last_rows_B": (ends - 1).to(self.device)},
            tokens=sum(span.count for span in spans),
            rows_T=torch.tensor(mine[at["context"]].rows(), dtype=torch.int64).to(self.device),
            carried=carried,
            own=own,
            places_T=_places(pieces, carried * (1 if whole else layout.tensor)).to(self.device),
            exchange_phase=DECODE if all(span.count <= 1 + layout.drafts for span in spans) else PREFILL,
            slots_of=tuple(batch.slots_T for batch in batches),
        )


def _places(pieces: Sequence[Sequence[Pieces]], stride: int) -> Tensor:
    """Row of each token where each (data, context) coordinate has `stride` rows, one coordinate after the other."""
    each = [member for group in pieces for member in group]
    rows = [row for member in each for row in member.rows()]
    places = [place * stride + row for place, member in enumerate(each) for row in range(member.tokens)]
    found = torch.empty(len(rows), dtype=torch.int64)
    found[torch.tensor(rows, dtype=torch.int64)] = torch.tensor(places, dtype=torch.int64)
    return found
