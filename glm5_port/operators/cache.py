"""The paged cache: where a token lies, how a row is laid out, and `write_cache`.

Tokens are packed: sequence b's tokens are rows query_starts[b] .. query_starts[b + 1] - 1, in position order, always the last
tokens of that sequence. Position p of sequence b lies in page block_table[b, p // page_size], row p % page_size; a slot is
page * page_size + row. How the bytes of a row look is a `CacheLayout`; the built-in ones are in `cache_layouts`.

Shape legend: T tokens of this call; B sequences; N pages of a sequence at most; C latent; R rope key; X index key; W width of a
row or field; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError, did_you_mean
from glm5_port.memory import zeros
from glm5_port.registry import Budget

LATENT = "latent"
"""Kind of the cache that attention reads: rows [latent, rope_key]."""
INDEX = "index"
"""Kind of the cache that the indexer reads: rows [index_key]."""
ROWS = {LATENT: ("latent", "rope_key"), INDEX: ("index_key",)}


# -- where a token lies ------------------------------------------------------------------------------------------------


def locate_tokens(query_starts: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence and the position of every packed token, without a host sync.

    Args:
        query_starts: [B + 1], first 0, ascending; equal neighbours are a sequence without new tokens.
        lengths: [B], cached tokens of each sequence, this call's included.
        tokens: T, rows of the packed tensors; those at or beyond query_starts[B] are padding.

    Returns:
        (sequences, positions), both [T] int64. Padding has sequence 0 and position -1.
    """
    rows = torch.arange(tokens, device=query_starts.device)
    starts = query_starts.to(torch.int64)
    sequences = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
    padding = sequences >= lengths.shape[0]
    sequences = sequences.masked_fill(padding, 0)
    first_position = lengths.to(torch.int64) - starts.diff()
    positions = first_position[sequences] + rows - starts[sequences]
    return sequences, positions.masked_fill(padding, -1)


def slots_at(block_table: Tensor, sequences: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """The slots of logical positions. Positions outside the table give some slot, for the caller to mask.

    Args:
        block_table: [B, N].
        sequences: [...], whose pages to look into.
        positions: [..., U].
        page_size: tokens a page.

    Returns:
        [..., U] int64.
    """
    places = torch.div(positions, page_size, rounding_mode="floor").clamp(0, block_table.shape[1] - 1).to(torch.int64)
    pages = block_table[sequences[..., None], places].to(torch.int64)
    return pages * page_size + torch.remainder(positions, page_size)


# -- how a row is laid out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheField:
    """One tensor of a cache, [pages, page_size, W].

    Attributes:
        name: for people and for checkpoints of a cache.
        dtype: storage dtype; None is the model's dtype.
        width: W, from the widths of the rows ([C, R] or [X]).
    """

    name: str
    dtype: torch.dtype | None
    width: Callable[[Sequence[int]], int]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How rows are stored. Layouts are found by (kind, name); a backend may register its own with `register_layout`.

    Attributes:
        kind: "latent" (rows [latent, rope_key]) or "index" (rows [index_key]).
        name: what `cache_format` says.
        fields: the tensors of a layer's cache, in the order of every `*_cache` argument.
        to_fields: rows [..., width] -> one tensor [..., W] a field, in the field's dtype (any float dtype where that is None).
        to_rows: the fields [..., W] and a dtype -> rows [..., width] in that dtype.
        unfit: (widths) -> why rows of these widths cannot be stored, or None.
        exact: reading gives back what was written; False for a quantised layout.
        rope_pairs: order of the rotated channels; "interleaved" is canonical (pairs in place, as `rotate` writes them).
    """

    kind: str
    name: str
    fields: tuple[CacheField, ...]
    to_fields: Callable[[Sequence[Tensor]], list[Tensor]]
    to_rows: Callable[[Sequence[Tensor], torch.dtype], list[Tensor]]
    unfit: Callable[[Sequence[int]], str | None] = lambda widths: None
    exact: bool = False
    rope_pairs: str = "interleaved"

    def check_widths(self, widths: Sequence[int]) -> None:
        """Raises InputError when rows of these widths cannot be stored."""
        if reason := self.unfit(widths):
            raise InputError(f"cache_format={self.name!r} ({self.kind} cache): {reason}\n  Use cache_format='plain'.")

    def encode(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Rows [..., width] to fields [..., W]. Quantised layouts compute in float32 whatever the dtype of the rows, so that
        the same numbers give the same bytes."""
        self.check_widths([row.shape[-1] for row in rows])
        return self.to_fields(rows)

    def decode(self, fields: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Fields [..., W] to rows [..., width] in `dtype`; None means the stored dtype of an exact layout, else float32."""
        if dtype is None:
            dtype = fields[0].dtype if self.exact else torch.float32
        return self.to_rows(fields, dtype)

    def allocate(
        self, pages: int, page_size: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> list[Tensor]:
        """A zeroed cache: one [pages, page_size, W] tensor a field."""
        self.check_widths(widths)
        return [zeros(pages, page_size, field.width(widths), dtype=field.dtype or dtype, device=device) for field in self.fields]

    def bytes_per_token(self, widths: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that one token takes in one layer."""
        self.check_widths(widths)
        return sum(field.width(widths) * (field.dtype or dtype).itemsize for field in self.fields)


LAYOUTS: dict[tuple[str, str], CacheLayout] = {}


def register_layout(layout: CacheLayout) -> CacheLayout:
    """Adds a layout. Raises InputError when the kind is unknown or the name is taken."""
    if layout.kind not in ROWS or (layout.kind, layout.name) in LAYOUTS:
        raise InputError(
            f"cache layout {layout.kind}/{layout.name} cannot be registered: the kind must be one of {', '.join(ROWS)}, "
            f"and the name must be free (taken: {', '.join(name for kind, name in LAYOUTS if kind == layout.kind) or 'none'})"
        )
    LAYOUTS[(layout.kind, layout.name)] = layout
    return layout


def cache_layout(kind: str, name: str) -> CacheLayout:
    """The layout that `cache_format=name` means for a cache of this kind.

    Raises:
        InputError: no such layout; lists the known ones.
    """
    if (kind, name) in LAYOUTS:
        return LAYOUTS[(kind, name)]
    known = [known_name for known_kind, known_name in LAYOUTS if known_kind == kind]
    raise InputError(
        f"cache_format={name!r}: no such layout for the {kind} cache{did_you_mean(name, known)}\n  supported: {', '.join(known)}"
    )


def gather_rows(layout: CacheLayout, cache: Sequence[Tensor], slots: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Reads rows by slot. Slots outside the cache read some row, for the caller to mask.

    Args:
        layout: of the cache.
        cache: its fields, each [pages, page_size, W].
        slots: [...] int64.
        dtype: of the result, as in `CacheLayout.decode`.

    Returns:
        The rows, each [..., width].
    """
    page_size = cache[0].shape[1]
    slots = slots.clamp(0, cache[0].shape[0] * page_size - 1)
    pages, rows = torch.div(slots, page_size, rounding_mode="floor"), torch.remainder(slots, page_size)
    return layout.decode([field[pages, rows] for field in cache], dtype)


# -- writing -----------------------------------------------------------------------------------------------------------


def kind_of_rows(rows: Sequence[Tensor]) -> str:
    """The kind of cache that a list of rows belongs to."""
    for kind, names in ROWS.items():
        if len(names) == len(rows):
            return kind
    raise InputError(f"write_cache: {len(rows)} tensors in rows; supported: [latent, rope_key] or [index_key]")


def check_write(layout: CacheLayout, rows: Sequence[Tensor], cache: Sequence[Tensor], slots: Tensor) -> None:
    """Raises InputError unless rows, cache and slots fit each other and the layout."""
    widths = [row.shape[-1] for row in rows]
    layout.check_widths(widths)
    expected = [(field.name, field.width(widths), field.dtype) for field in layout.fields]
    fits = (
        len(cache) == len(expected)
        and all(row.dim() == 2 and row.shape[0] == slots.shape[0] for row in rows)
        and all(f.dim() == 3 and f.shape[-1] == width for f, (_, width, _) in zip(cache, expected, strict=True))
    )
    if not fits:
        wanted = ", ".join(f"{name} [pages, page_size, {width}] {dtype or 'model dtype'}" for name, width, dtype in expected)
        raise InputError(
            f"write_cache: rows {[tuple(r.shape) for r in rows]}, slots {tuple(slots.shape)} and cache "
            f"{[(tuple(f.shape), f.dtype) for f in cache]} do not fit\n"
            f"  supported: rows [T, width], slots [T], {layout.kind}/{layout.name} fields {wanted}"
        )


@operator(
    facts={
        "kind": lambda rows, **_: kind_of_rows(rows),
        "widths": lambda rows, **_: tuple(row.shape[-1] for row in rows),
        "page_size": lambda cache, **_: cache[0].shape[1],
        "cache_format": lambda cache_format, **_: cache_format,
    },
    fake=lambda rows, cache, slots, *, cache_format: None,
    mutates=("cache",),
    budget=Budget(why="quantised layouts: decoded rows against the rows before quantisation"),
)
def write_cache(rows: list[Tensor], cache: list[Tensor], slots: Tensor, *, cache_format: str) -> None:
    """Writes rows into a paged cache, in place, each at its slot.

    cache[slots[t] // page_size, slots[t] % page_size] = encode(rows[t]) for every t with slots[t] >= 0.

    Args:
        rows: [latent [T, C], rope_key [T, R]] for the latent cache, [index_key [T, X]] for the index cache; any float dtype.
        cache: the fields of the layout, each [pages, page_size, W]; may be views. Written.
        slots: [T] int64, page * page_size + row; -1 is not written (padding).
        cache_format: name of a `CacheLayout`: "plain", "fp8", "int8", or one that a backend registered.

    Returns:
        Nothing.

    Contract:
        Rows that no slot names keep their bytes. Two tokens with one slot, and slots beyond the cache, are the caller's error.
        The plain layout rounds to the dtype of the cache and passes gradients: reading the cache afterwards reaches `rows`,
        which is how training runs through a fresh cache. Quantised layouts have no gradient. NaN or infinity: the layouts say
        what they store. No tokens: nothing is written. Deterministic.

    Raises:
        InputError: unknown layout, widths that the layout cannot store, or shapes that do not fit.

    Source: paged caches of vLLM and SGLang (`slot_mapping`); row formats in `cache_layouts`.
    """
    layout = cache_layout(kind_of_rows(rows), cache_format)
    check_write(layout, rows, cache, slots)
    page_size = cache[0].shape[1]
    for field, values in zip(cache, layout.encode(rows), strict=True):
        total = field.shape[0] * page_size
        spare_row = field.new_zeros(1, field.shape[-1])  # takes what is not to be written
        flat = torch.cat((field.reshape(total, field.shape[-1]), spare_row))
        targets = torch.where(slots < 0, total, slots)
        written = flat.index_copy(0, targets, values.to(field.dtype))
        field.copy_(written[:total].view(field.shape))
