"""Portable write_cache: one scatter a field. Shape legend: T tokens; W width of a field."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.operators.cache import cache_layout, check_write, kind_of_rows, write_cache
from glm5_port.registry import PORTABLE


@write_cache.implement(PORTABLE, variant="eager", differentiable=True, promises=("deterministic",))
def write_cache_eager(rows: list[Tensor], cache: list[Tensor], slots: Tensor, *, cache_format: str) -> None:
    layout = cache_layout(kind_of_rows(rows), cache_format)
    check_write(layout, rows, cache, slots)
    if slots.shape[0] == 0:
        return
    # A token without a slot repeats the first one that has one (same slot, same bytes, no gradient of its own), so that no
    # token has to be dropped. Where no token has a slot, the first writes back what slot 0 holds.
    is_kept = slots >= 0
    first_kept = is_kept.to(torch.int8).argmax(0, keepdim=True)  # [1]: indexing by a tensor without dimensions would read it
    is_writer = is_kept | (torch.arange(slots.shape[0], device=slots.device) == first_kept)
    targets = torch.where(is_kept, slots, slots[first_kept].clamp_min(0))
    page_size = cache[0].shape[1]
    pages, places = torch.div(targets, page_size, rounding_mode="floor"), torch.remainder(targets, page_size)
    for field, values in zip(cache, layout.encode(rows), strict=True):
        held = field[pages[:1], places[:1]]
        values = torch.where(is_kept[:, None], values.to(field.dtype), held)
        field.index_put_((pages, places), torch.where(is_writer[:, None], values, values[first_kept].detach()))
