"""Paged attention calls for tests, and what they must give, computed token by token in plain loops.

Shape legend as in `glm5_port.operators.mla`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.cache import cache_layout, gather_rows
from glm5_port.operators.cases.paging import Paging, filled_latent_cache, page_batch
from glm5_port.testing.cases import Make

HEADS, NOPE, ROPE, LATENT, VALUE = 3, 5, 4, 7, 6
SCALE = (NOPE + ROPE) ** -0.5


@dataclass
class Scene:
    """One batch: queries in both forms, weights, and a cache whose unwritten rows are NaN."""

    paging: Paging
    query_nope: Tensor
    query_rope: Tensor
    w_uk: Tensor
    w_uv: Tensor
    cache: dict[str, Any]

    @property
    def query_latent(self) -> Tensor:
        return torch.einsum("thn,hnc->thc", self.query_nope, self.w_uk)

    def absorbed(self) -> dict[str, Any]:
        """Arguments of mla_attention_absorbed."""
        query = {"query_latent": self.query_latent, "query_rope": self.query_rope}
        return query | self.cache | self.paging.arguments() | {"scale": SCALE}

    def expanded(self) -> dict[str, Any]:
        """Arguments of mla_attention_expanded."""
        query = {"query_nope": self.query_nope, "query_rope": self.query_rope, "w_uk": self.w_uk, "w_uv": self.w_uv}
        return query | self.cache | self.paging.arguments() | {"scale": SCALE}

    def sparse(self, indices: Tensor) -> dict[str, Any]:
        """Arguments of sparse_mla_attention."""
        return self.absorbed() | {"indices": indices}

    def token(self, row: int) -> tuple[int, int]:
        """The sequence and position of packed row `row`."""
        for sequence, (new, length) in enumerate(zip(self.paging.new, self.paging.lengths, strict=True)):
            if row < new:
                return sequence, length - new + row
            row -= new
        raise IndexError("a padding row")

    def rows(self, sequence: int) -> list[Tensor]:
        """[latent, rope_key] of a sequence in position order."""
        slots = self.paging.slots_of(sequence, 0, self.paging.lengths[sequence])
        return gather_rows(cache_layout("latent", self.cache["cache_format"]), self.cache["latent_cache"], slots, torch.float64)

    def expected(self, indices: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[T, H, C] by loops: every token attends to positions 0 .. its own, or to those of them that `indices` names."""
        query_latent = self.query_latent
        out = torch.zeros_like(query_latent)
        for row in range(sum(self.paging.new)):
            sequence, position = self.token(row)
            latent, rope_key = self.rows(sequence)
            seen = [p for p in (range(position + 1) if indices is None else indices[row]) if 0 <= p <= position]
            if seen:
                scores = query_latent[row] @ latent[seen].T + self.query_rope[row] @ rope_key[seen].T
                out[row] = (scores * SCALE).softmax(-1) @ latent[seen]
        return out


def scene(
    new: Sequence[int] = (3, 1, 5, 0),
    lengths: Sequence[int] = (9, 1, 5, 4),
    *,
    page_size: int = 4,
    padding: int = 2,
    seed: str = "scene",
    extra_columns: int = 1,
) -> Scene:
    """A scene in float64. The same seed and sequences give the same numbers for every page size and padding."""
    dtype = torch.float64
    paging = page_batch(Make("pages", dtype), new, lengths, page_size=page_size, padding=padding, extra_columns=extra_columns)
    make = Make(seed, dtype)
    cache = filled_latent_cache(make, paging, "plain", LATENT, ROPE)
    w_uk, w_uv = make.normal(HEADS, NOPE, LATENT), make.normal(HEADS, VALUE, LATENT)
    queries = make.normal(paging.tokens, HEADS, NOPE + ROPE)
    return Scene(paging, queries[..., :NOPE], queries[..., NOPE:], w_uk, w_uv, cache)


def alone(whole: Scene, sequence: int) -> tuple[Scene, slice]:
    """One sequence of a scene by itself, and which packed rows of the whole are its own."""
    first = sum(whole.paging.new[:sequence])
    mine = slice(first, first + whole.paging.new[sequence])
    p, only = whole.paging, slice(sequence, sequence + 1)
    paging = Paging(p.new[only], p.lengths[only], 0, p.page_size, p.pages, p.block_table[only])
    return Scene(paging, whole.query_nope[mine], whole.query_rope[mine], whole.w_uk, whole.w_uv, whole.cache), mine
