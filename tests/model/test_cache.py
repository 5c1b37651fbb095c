"""The paged cache: who holds which pages, and the description of a step, against positions counted one by one."""

from __future__ import annotations

import pytest
import torch

from glm5_port.errors import InputError
from glm5_port.model.cache import DECODE, PREFILL, PagedCache, Span
from tests.model.models import quick_config


def cache(pages: int = 12, page_size: int = 4, index_layers: tuple[bool, ...] = (True, False)) -> PagedCache:
    return PagedCache(
        quick_config(),
        index_layers=index_layers,
        cache_format="plain",
        pages=pages,
        page_size=page_size,
        dtype=torch.float32,
        device="cpu",
    )


def test_index_keys_only_where_an_indexer_is() -> None:
    made = cache()
    assert [layer.index is None for layer in made.layers] == [False, True]
    assert [tuple(field.shape) for field in made.layers[0].latent] == [(12, 4, 32), (12, 4, 8)]
    assert [tuple(field.shape) for field in made.layers[0].index or []] == [(12, 4, 16)]


@pytest.mark.parametrize("page_size", [1, 3, 4, 64])
def test_a_step_is_described_token_by_token(page_size: int) -> None:
    made = cache(pages=60, page_size=page_size)
    ids = [made.open() for _ in range(3)]
    taken: dict[int, tuple[int, int]] = {}
    for spans in (
        [Span(ids[0], 0, 5), Span(ids[1], 0, 1), Span(ids[2], 0, 7)],
        [Span(ids[2], 7, 1), Span(ids[0], 5, 6)],
        [Span(ids[1], 1, 1), Span(ids[0], 11, 1), Span(ids[2], 8, 1)],
        [Span(ids[0], 10, 3)],  # overwrites positions 10 and 11, as speculation does
    ):
        batch = made.batch(spans)
        rows = [(row, span.sequence, span.start + i) for row, span in enumerate(spans) for i in range(span.count)]
        assert batch.positions_T.tolist() == [position for _, _, position in rows]
        assert batch.lengths_B.tolist() == [span.start + span.count for span in spans]
        starts = [sum(span.count for span in spans[:row]) for row in range(len(spans) + 1)]
        assert batch.query_starts_B1.tolist() == starts
        assert batch.last_rows_B.tolist() == [end - 1 for end in starts[1:]]
        assert batch.phase == (DECODE if all(span.count == 1 for span in spans) else PREFILL)
        for (row, sequence, position), slot in zip(rows, batch.slots_T.tolist(), strict=True):
            assert slot == int(batch.block_table_BN[row, position // page_size]) * page_size + position % page_size
            assert taken.setdefault(slot, (sequence, position)) == (sequence, position), "a row belongs to one position"
        for tensor in (batch.query_starts_B1, batch.lengths_B, batch.block_table_BN):
            assert tensor.dtype == torch.int32
        for tensor in (batch.positions_T, batch.slots_T, batch.last_rows_B):
            assert tensor.dtype == torch.int64
    slots = {owner: slot for slot, owner in taken.items()}
    assert len(slots) == len(taken), "a position keeps its row"


def test_pages_are_given_back_and_used_again() -> None:
    made = cache(pages=3)
    first, second = made.open(), made.open()
    made.batch([Span(first, 0, 8)])
    with pytest.raises(InputError, match=r"the cache is full: 5 tokens of one sequence need 2 more pages of 4, 1 of 3 are free"):
        made.batch([Span(second, 0, 5)])
    made.close(first)
    made.batch([Span(second, 0, 12)])
    with pytest.raises(InputError, match="the cache is full"):
        made.batch([Span(second, 12, 1)])


@pytest.mark.parametrize(("pages", "page_size"), [(0, 4), (4, 0)])
def test_a_cache_without_room(pages: int, page_size: int) -> None:
    with pytest.raises(InputError, match="at least one page of at least one row"):
        cache(pages=pages, page_size=page_size)


def test_an_unknown_format() -> None:
    with pytest.raises(InputError, match=r"no such layout for the latent cache; did you mean plain\?"):
        PagedCache(
            quick_config(), index_layers=[True], cache_format="plane", pages=1, page_size=1, dtype=torch.float32, device="cpu"
        )
