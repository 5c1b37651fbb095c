"""The built-in cache layouts, byte by byte.

    latent/plain    latent [C] and rope_key [R] in the model's dtype
    latent/fp8      656 bytes: 512 e4m3, 4 float32 scales, 64 bfloat16 rope (FlashMLA's order)
    latent/int8     656 bytes: 512 int8, 64 bfloat16 rope, 4 float32 scales (Ascend's order)
    index/plain     index_key [X] in the model's dtype
    index/fp8       X e4m3 bytes, and one float32 scale that is a power of two
    index/int8      X int8, and one float16 scale

Numbers are little-endian. All arithmetic is float32, whatever the dtype of the rows; a value is x / scale with the scale as it is
stored, rounded to the nearest (ties to even) and clamped to the largest finite code. e4m3 bytes are kept as uint8, which every
device can store, index and copy. A group (128 latent channels, or one index key) that holds NaN or infinity has a scale that is
not finite and reads back as NaN in all its channels; other groups and the rope part are untouched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5_port.operators.cache import INDEX, LATENT, CacheField, CacheLayout, register_layout

E4M3_MAX = 448.0
INT8_MAX = 127.0
SMALLEST_AMAX = 1e-4
"""Floor of a group's largest magnitude: a group of zeros gets a finite scale and reads back as zeros."""
GROUP = 128
"""Latent channels that share a scale."""
LATENT_WIDTH, ROPE_WIDTH = 512, 64
ROW_BYTES = LATENT_WIDTH + LATENT_WIDTH // GROUP * 4 + ROPE_WIDTH * 2


# -- codes -------------------------------------------------------------------------------------------------------------


def group_amax(x: Tensor) -> Tensor:
    """Largest magnitude along the last dimension (kept), at least `SMALLEST_AMAX`; NaN stays NaN."""
    return x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)


def to_e4m3(x: Tensor) -> Tensor:
    """float32 to e4m3 bytes (uint8), saturating at 448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 bytes (uint8) to `dtype`, exactly."""
    return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32).to(dtype)


def to_int8(x: Tensor) -> Tensor:
    """float32 to int8, saturating at 127; NaN becomes 0 (the scale of its group is NaN, so it reads back as NaN)."""
    return torch.where(x.isnan(), 0.0, x.round()).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def power_of_two_scale(amax: Tensor) -> Tensor:
    """2^ceil(log2(amax / 448)), computed on the bits of the float32 so that every device gives the same ones. NaN and infinity
    stay what they are."""
    bits = (amax / E4M3_MAX).to(torch.float32).contiguous().view(torch.int32)
    rounded_up = (bits + 0x007FFFFF) & 0x7F800000  # carries into the exponent unless the mantissa is zero
    return torch.where(amax.isfinite(), rounded_up.view(torch.float32), amax)


# -- latent rows -------------------------------------------------------------------------------------------------------


def _unfit_656(widths: Sequence[int]) -> str | None:
    if tuple(widths) == (LATENT_WIDTH, ROPE_WIDTH):
        return None
    return f"the 656-byte row holds a latent of {LATENT_WIDTH} and a rope key of {ROPE_WIDTH}, not {tuple(widths)}"


def _quantise_latent(latent: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(x / scale in groups flattened back [..., 512], scales [..., 4]), float32, with scale = max(amax, 1e-4) / largest."""
    groups = latent.to(torch.float32).unflatten(-1, (-1, GROUP))
    scales = group_amax(groups) / largest
    return (groups / scales).flatten(-2), scales.squeeze(-1)


def _dequantise_latent(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.to(dtype).unflatten(-1, (-1, GROUP)) * scales.to(dtype)[..., None]).flatten(-2)


def _bytes(x: Tensor, dtype: torch.dtype, storage: torch.dtype) -> Tensor:
    # clone, since contiguous() leaves the strides of an empty tensor as they are, and view looks at them
    return x.to(dtype).clone(memory_format=torch.contiguous_format).view(storage)


def _numbers(row: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers of `dtype` that begin at byte `first` of every row."""
    return row[..., first : first + count * dtype.itemsize].contiguous().view(dtype)


def _encode_latent_fp8(rows: Sequence[Tensor]) -> list[Tensor]:
    """bytes 0-511 e4m3 | 512-527 four float32 scales, max(amax, 1e-4) / 448 | 528-655 rope key, bfloat16."""
    latent, rope_key = rows
    values, scales = _quantise_latent(latent, E4M3_MAX)
    parts = (to_e4m3(values), _bytes(scales, torch.float32, torch.uint8), _bytes(rope_key, torch.bfloat16, torch.uint8))
    return [torch.cat(parts, dim=-1)]


def _decode_latent_fp8(fields: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    (row,) = fields
    values = from_e4m3(row[..., :LATENT_WIDTH], dtype)
    scales = _numbers(row, LATENT_WIDTH, LATENT_WIDTH // GROUP, torch.float32)
    rope_key = _numbers(row, ROW_BYTES - 2 * ROPE_WIDTH, ROPE_WIDTH, torch.bfloat16)
    return [_dequantise_latent(values, scales, dtype), rope_key.to(dtype)]


def _encode_latent_int8(rows: Sequence[Tensor]) -> list[Tensor]:
    """bytes 0-511 int8 | 512-639 rope key, bfloat16 | 640-655 four float32 scales, max(amax, 1e-4) / 127."""
    latent, rope_key = rows
    values, scales = _quantise_latent(latent, INT8_MAX)
    parts = (to_int8(values), _bytes(rope_key, torch.bfloat16, torch.int8), _bytes(scales, torch.float32, torch.int8))
    return [torch.cat(parts, dim=-1)]


def _decode_latent_int8(fields: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    (row,) = fields
    rope_key = _numbers(row, LATENT_WIDTH, ROPE_WIDTH, torch.bfloat16)
    scales = _numbers(row, LATENT_WIDTH + 2 * ROPE_WIDTH, LATENT_WIDTH // GROUP, torch.float32)
    return [_dequantise_latent(row[..., :LATENT_WIDTH], scales, dtype), rope_key.to(dtype)]


# -- index rows --------------------------------------------------------------------------------------------------------


def _encode_index_fp8(rows: Sequence[Tensor]) -> list[Tensor]:
    """scale = 2^ceil(log2(max(amax, 1e-4) / 448)) (ue8m0); e4m3 of x / scale, which is an exact division."""
    key = rows[0].to(torch.float32)
    scale = power_of_two_scale(group_amax(key))
    return [to_e4m3(key / scale), scale]


def _decode_index_fp8(fields: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [from_e4m3(fields[0], dtype) * fields[1].to(dtype)]


def _encode_index_int8(rows: Sequence[Tensor]) -> list[Tensor]:
    """scale = max(amax, 1e-4) / 127 rounded to float16; int8 of x / that rounded scale. A key beyond 65504 * 127 reads as NaN."""
    key = rows[0].to(torch.float32)
    scale = (group_amax(key) / INT8_MAX).to(torch.float16)
    return [to_int8(key / scale.to(torch.float32)), scale]


def _decode_index_int8(fields: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [fields[0].to(dtype) * fields[1].to(dtype)]


# -- the layouts -------------------------------------------------------------------------------------------------------


def _as_they_are(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


def _to_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


LATENT_PLAIN = register_layout(
    CacheLayout(
        LATENT,
        "plain",
        (CacheField("latent", None, lambda widths: widths[0]), CacheField("rope_key", None, lambda widths: widths[1])),
        _as_they_are,
        _to_dtype,
        exact=True,
    )
)
LATENT_FP8 = register_layout(
    CacheLayout(
        LATENT,
        "fp8",
        (CacheField("row", torch.uint8, lambda widths: ROW_BYTES),),
        _encode_latent_fp8,
        _decode_latent_fp8,
        unfit=_unfit_656,
    )
)
LATENT_INT8 = register_layout(
    CacheLayout(
        LATENT,
        "int8",
        (CacheField("row", torch.int8, lambda widths: ROW_BYTES),),
        _encode_latent_int8,
        _decode_latent_int8,
        unfit=_unfit_656,
    )
)
INDEX_PLAIN = register_layout(
    CacheLayout(INDEX, "plain", (CacheField("index_key", None, lambda widths: widths[0]),), _as_they_are, _to_dtype, exact=True)
)
INDEX_FP8 = register_layout(
    CacheLayout(
        INDEX,
        "fp8",
        (CacheField("values", torch.uint8, lambda widths: widths[0]), CacheField("scale", torch.float32, lambda widths: 1)),
        _encode_index_fp8,
        _decode_index_fp8,
    )
)
INDEX_INT8 = register_layout(
    CacheLayout(
        INDEX,
        "int8",
        (CacheField("values", torch.int8, lambda widths: widths[0]), CacheField("scale", torch.float16, lambda widths: 1)),
        _encode_index_int8,
        _decode_index_int8,
    )
)
