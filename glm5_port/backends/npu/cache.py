"""write_cache by npu_scatter_nd_update_, one scatter a field. Shape legend: T tokens; W width of a field."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import FLOATING
from glm5_port.backends.npu.contracts.small import SCATTER_ND_UPDATE
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.operators.cache import cache_layout, check_write, kind_of_rows, write_cache

WRITABLE = Rule(
    "cache format",
    "npu_scatter_nd_update_ writes no uint8: cache formats plain and int8, not {cache_format}",
    lambda *, cache_format, **_: cache_format in ("plain", "int8"),
)


@aclnn(write_cache, Needs((SCATTER_ND_UPDATE,), (dtype_among(*FLOATING), WRITABLE)))
def write_cache_aclnn(rows: list[Tensor], cache: list[Tensor], slots: Tensor, *, cache_format: str) -> None:
    """The vendor leaves no row out. A token without a slot repeats the first one that has one: same slot, same bytes. Where no
    token has a slot, the first writes back what slot 0 holds."""
    layout = cache_layout(kind_of_rows(rows), cache_format)
    check_write(layout, rows, cache, slots)
    tokens = slots.shape[0]
    if tokens == 0:
        return
    is_kept = slots >= 0
    first_kept = is_kept.to(torch.int8).argmax(0, keepdim=True)
    source_T = torch.where(is_kept, torch.arange(tokens, device=slots.device), first_kept)
    targets_T = slots[source_T].clamp_min(0)
    page_size = cache[0].shape[1]
    indices_T2 = torch.stack(
        (torch.div(targets_T, page_size, rounding_mode="floor"), torch.remainder(targets_T, page_size)), dim=1
    )
    nothing_kept = ~is_kept[first_kept]
    for field, values in zip(cache, layout.encode(rows), strict=True):
        held = field[indices_T2[:1, 0], indices_T2[:1, 1]]
        updates_TW = torch.where(nothing_kept[:, None], held, values.to(field.dtype)[source_T])
        call(SCATTER_ND_UPDATE, field, indices_T2, updates_TW)
