"""Native sparse_mla_attention, mla_attention_absorbed, mla_attention_expanded, attention_output and linear_per_head.

Shape legend: T tokens; H heads; C latent; R rope; K indices a token, or numbers of a row; N nope part of a head, or results of a
row; V value part; W width of a field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import MATRIX, dense_rows, kernels, native, threads
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout
from glm5_port.operators.linear import linear_per_head
from glm5_port.operators.mla import attention_output, check_output, mla_attention_absorbed, mla_attention_expanded
from glm5_port.operators.sparse_attention import check_attention, check_indices, sparse_mla_attention

ROW_FORMATS = {"fp8": 2, "int8": 3}
"""Numbers of `RowFormat` in the extension; plain rows are those of their dtype."""
PLAIN_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
ISAS = tuple(isa for isa in MATRIX if isa != "amx")


def _not_supported(*, cache_format: str, **_: Any) -> list[str]:
    formats = ("plain", *ROW_FORMATS)
    return [] if cache_format in formats else [f"reads caches of format {', '.join(formats)}, not {cache_format}"]


def _queries(x_THW: Tensor) -> tuple[int, int, int]:
    return x_THW.data_ptr(), x_THW.stride(0), x_THW.stride(1)


def _field(field: Tensor) -> tuple[int, int, int]:
    size = field.element_size()
    return field.data_ptr(), field.stride(0) * size, field.stride(1) * size


def _readable(latent_cache: list[Tensor], cache_format: str, widths: tuple[int, int]) -> list[Tensor]:
    """The fields as the kernels read them: in place, but for dtypes and strides that no cache of this library has.

    Raises:
        InputError: unknown format, or fields that do not hold rows of these widths.
    """
    layout = cache_layout(LATENT, cache_format)
    layout.check_widths(widths)
    found, wanted = [field.shape[-1] for field in latent_cache], [field.width(widths) for field in layout.fields]
    if found != wanted or any(field.shape[:2] != latent_cache[0].shape[:2] for field in latent_cache):
        raise InputError(
            f"attention: cache fields {[tuple(field.shape) for field in latent_cache]} do not hold rows of latent {widths[0]} "
            f"and rope {widths[1]} in format {cache_format!r}\n  supported: fields [pages, page_size, W], W = {wanted}"
        )
    dtype = latent_cache[0].dtype
    if cache_format not in ROW_FORMATS:
        dtype = torch.bfloat16 if {field.dtype for field in latent_cache} == {torch.bfloat16} else torch.float32
    return [dense_rows(field, dtype) for field in latent_cache]


class _Paged:
    """Cache and batch of a call: `LatentCache` and `Batch` of the extension, and the tensors that these point into."""

    def __init__(
        self,
        latent_cache: list[Tensor],
        cache_format: str,
        widths: tuple[int, int],
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
    ) -> None:
        fields = _readable(latent_cache, cache_format, widths)
        table, starts, ends = (dense_rows(x, torch.int32) for x in (block_table, query_starts, lengths))
        self.kept = (*fields, table, starts, ends)
        number = ROW_FORMATS.get(cache_format, PLAIN_FORMATS.get(fields[0].dtype))
        self.cache = number, _field(fields[0]), _field(fields[-1]), *fields[0].shape[:2], *widths
        self.batch = starts.data_ptr(), ends.data_ptr(), table.data_ptr(), *table.shape, table.stride(0)


def _attend(
    isa: int,
    query: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    indices: Tensor | None,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float,
    cache_format: str,
) -> Tensor:
    check_attention(query, query_rope, latent_cache, block_table, query_starts, lengths)
    widths = query.shape[2], query_rope.shape[2]
    query_THC, rope_THR = (dense_rows(x, query.dtype) for x in (query, query_rope))
    paged = _Paged(latent_cache, cache_format, widths, block_table, query_starts, lengths)
    chosen = None if indices is None else dense_rows(indices, torch.int32)
    selection = (0, -1, 0) if chosen is None else (chosen.data_ptr(), chosen.shape[1], chosen.stride(0))
    out = torch.empty(query.shape, dtype=query.dtype)
    kernels().attend(
        isa,
        query.dtype == torch.bfloat16,
        *query.shape[:2],
        _queries(query_THC),
        _queries(rope_THR),
        paged.cache,
        paged.batch,
        *selection,
        scale,
        out.data_ptr(),
        threads(),
    )
    return out


@native(sparse_mla_attention, isas=ISAS, not_supported=_not_supported)
def sparse_mla_attention_native(isa: int) -> Callable[..., Tensor]:
    def run(
        query_latent: Tensor,
        query_rope: Tensor,
        latent_cache: list[Tensor],
        indices: Tensor,
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
        *,
        scale: float,
        cache_format: str,
    ) -> Tensor:
        check_indices(query_latent, indices)
        return _attend(
            isa, query_latent, query_rope, latent_cache, indices, block_table, query_starts, lengths, scale, cache_format
        )

    return run


@native(mla_attention_absorbed, isas=ISAS, not_supported=_not_supported)
def mla_attention_absorbed_native(isa: int) -> Callable[..., Tensor]:
    def run(
        query_latent: Tensor,
        query_rope: Tensor,
        latent_cache: list[Tensor],
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
        *,
        scale: float,
        cache_format: str,
    ) -> Tensor:
        return _attend(isa, query_latent, query_rope, latent_cache, None, block_table, query_starts, lengths, scale, cache_format)

    return run


@native(mla_attention_expanded, isas=ISAS, not_supported=_not_supported)
def mla_attention_expanded_native(isa: int) -> Callable[..., Tensor]:
    def run(
        query_nope: Tensor,
        query_rope: Tensor,
        latent_cache: list[Tensor],
        w_uk: Tensor,
        w_uv: Tensor,
        block_table: Tensor,
        query_starts: Tensor,
        lengths: Tensor,
        *,
        scale: float,
        cache_format: str,
    ) -> Tensor:
        check_attention(query_nope, query_rope, latent_cache, block_table, query_starts, lengths)
        widths = w_uk.shape[2], query_rope.shape[2]
        query_THN, rope_THR = (dense_rows(x, query_nope.dtype) for x in (query_nope, query_rope))
        key_HNC, value_HVC = (weight.to(query_nope.dtype).contiguous() for weight in (w_uk, w_uv))
        paged = _Paged(latent_cache, cache_format, widths, block_table, query_starts, lengths)
        out = torch.empty((*query_nope.shape[:2], w_uv.shape[1]), dtype=query_nope.dtype)
        kernels().attend_expanded(
            isa,
            query_nope.dtype == torch.bfloat16,
            *query_nope.shape[:2],
            _queries(query_THN),
            _queries(rope_THR),
            paged.cache,
            paged.batch,
            key_HNC.data_ptr(),
            value_HVC.data_ptr(),
            w_uk.shape[1],
            w_uv.shape[1],
            scale,
            out.data_ptr(),
            threads(),
        )
        return out

    return run


def _multiply_heads(isa: int, x_THK: Tensor, weight_HNK: Tensor) -> Tensor:
    """[T, H, N]: the rows of each head by that head's matrix."""
    rows, weight = dense_rows(x_THK, x_THK.dtype), dense_rows(weight_HNK, x_THK.dtype)
    y_THN = torch.empty((*rows.shape[:2], weight.shape[1]), dtype=rows.dtype)
    kernels().multiply_heads(
        isa,
        rows.dtype == torch.bfloat16,
        _queries(rows),
        *rows.shape,
        weight.shape[1],
        weight.data_ptr(),
        *weight.stride()[:2],
        y_THN.data_ptr(),
        threads(),
    )
    return y_THN


@native(attention_output, isas=ISAS)
def attention_output_native(isa: int) -> Callable[..., Tensor]:
    def run(latent_out: Tensor, w_uv: Tensor, o: Tensor) -> Tensor:
        check_output(latent_out, w_uv, o)
        value_THV = _multiply_heads(isa, latent_out, w_uv)
        return _multiply_heads(isa, value_THV.flatten(1).unsqueeze(1), o.unsqueeze(0)).squeeze(1)

    return run


class DenseHeads:
    """The matrices of all heads with the numbers of each row side by side: the transposed half of kv_b_proj is copied once."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._weight: Tensor | None = None

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weight; `part` is None."""
        self._weight = dense_rows(tensors["weight"], tensors["weight"].dtype)

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword argument of the kernel."""
        if self._weight is None:
            raise InputError("linear_per_head on cpu: the weight never arrived")
        return {"dense_weight": self._weight}


def _fake_per_head(x: Tensor, *, dense_weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], dense_weight.shape[1]))


@native(linear_per_head, isas=ISAS, prepare=DenseHeads, fake=_fake_per_head)
def linear_per_head_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, *, dense_weight: Tensor) -> Tensor:
        return _multiply_heads(isa, x, dense_weight)

    return run
