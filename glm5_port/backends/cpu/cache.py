"""Native write_cache.

Shape legend: T tokens; W width of a row or field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import DTYPES, kernels, native, rows_of, threads
from glm5_port.errors import InputError
from glm5_port.operators.cache import cache_layout, check_write, kind_of_rows, write_cache

FORMATS = ("plain", "fp8", "int8")


def _not_supported(*, cache_format: str, **_: Any) -> list[str]:
    return [] if cache_format in FORMATS else [f"writes caches of format {', '.join(FORMATS)}, not {cache_format}"]


def _check_slots(slots: Tensor, cache: Sequence[Tensor]) -> None:
    """Raises InputError when a token would be written beyond the cache."""
    held = cache[0].shape[0] * cache[0].shape[1]
    if slots.shape[0] and int(slots.max()) >= held:
        raise InputError(
            f"write_cache: slot {int(slots.max())} of a cache of {held} rows\n"
            "  supported: page * page_size + row of a page that exists, or -1 for a token that is not written"
        )


def _rows(row_TW: Tensor) -> tuple[int, int, int, bool]:
    return row_TW.data_ptr(), row_TW.stride(0), row_TW.shape[1], row_TW.dtype == torch.bfloat16


def _field(field: Tensor) -> tuple[int, int, int]:
    size = field.element_size()
    return field.data_ptr(), field.stride(0) * size, field.stride(1) * size


def _readable(row_TW: Tensor) -> Tensor:
    return rows_of(row_TW.detach() if row_TW.dtype in DTYPES else row_TW.detach().to(torch.float32))


def _copy_plain(isa: int, rows: Sequence[Tensor], fields: Sequence[Tensor], slots: tuple[int, int, int]) -> None:
    for row_TW, field in zip(rows, fields, strict=True):
        stored = rows_of(row_TW.detach().to(field.dtype))
        size = stored.element_size()
        kernels().cache_copy(
            isa, stored.data_ptr(), stored.stride(0) * size, stored.shape[1] * size, _field(field), slots, threads()
        )


def _quantise(isa: int, rows: Sequence[Tensor], fields: Sequence[Tensor], is_fp8: bool, slots: tuple[int, int, int]) -> None:
    kept = [_readable(row_TW) for row_TW in rows]
    write = kernels().cache_write_latent if len(rows) == 2 else kernels().cache_write_index
    write(isa, *(_rows(row_TW) for row_TW in kept), *(_field(field) for field in fields), is_fp8, slots, threads())


@native(write_cache, not_supported=_not_supported)
def write_cache_native(isa: int) -> Callable[..., None]:
    def run(rows: list[Tensor], cache: list[Tensor], slots: Tensor, *, cache_format: str) -> None:
        kind = kind_of_rows(rows)
        check_write(cache_layout(kind, cache_format), rows, cache, slots)
        _check_slots(slots, cache)
        places = slots.to(torch.int64).contiguous()
        numbers = (places.data_ptr(), places.shape[0], cache[0].shape[1])
        fields = [field if field.stride(-1) == 1 or field.shape[-1] == 1 else field.contiguous() for field in cache]
        if cache_format == "plain":
            _copy_plain(isa, rows, fields, numbers)
        else:
            _quantise(isa, rows, fields, cache_format == "fp8", numbers)
        for field, written in zip(cache, fields, strict=True):
            if written is not field:  # strided rows, which no cache of this library has
                field.copy_(written)

    return run
