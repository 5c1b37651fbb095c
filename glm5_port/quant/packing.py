"""The canonical bit layout of 4-bit codes. Those of other formats are in `layouts`.

As compressed-tensors stores it (`pack-quantized`): one int32 word holds eight codes of one output row. Bits
4j .. 4j+3 of word m hold element 8m + j as q + 8 (offset binary). The words lie little-endian, so the same memory seen as
bytes holds element 2n in the low half of byte n and element 2n + 1 in the high half.

Words are built by moving pairs of elements between one and two bytes, several times faster than shifting int32. torch runs on
little-endian hosts only.

Shape legend: ... any leading dimensions; I elements of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.errors import InputError

CODES_PER_WORD = 8


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes into the canonical layout.

    Args:
        codes: [..., I] int8, each in -8..7. Of a code outside that range only the low four bits of q + 8 are kept: it cannot
            touch its neighbours. Nothing is checked, so that nothing waits for the device.

    Returns:
        [..., I / 8] int32.

    Raises:
        InputError: not int8, or I is not a multiple of 8.
    """
    if codes.dtype != torch.int8 or codes.dim() == 0 or codes.shape[-1] % CODES_PER_WORD:
        raise InputError(
            f"pack_int4: {tuple(codes.shape)} {codes.dtype}; takes int8 codes whose last dimension is a multiple of 8 "
            "(eight codes make one int32 word)"
        )
    pairs = _dense((codes + 8).bitwise_and_(15)).view(torch.int16)  # an even element and the odd one after it, 8 bits each
    return (pairs | (pairs >> 4)).to(torch.uint8).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes of canonical words: the inverse of `pack_int4`.

    Args:
        packed: [..., I / 8] int32.

    Returns:
        [..., I] int8 in -8..7.

    Raises:
        InputError: not int32.
    """
    pairs = as_bytes(packed).to(torch.int16)
    return (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.int8) - 8


def as_bytes(packed: Tensor) -> Tensor:
    """The same memory as [..., I / 2] uint8 (a copy when rows are strided): the layout of ONNX MatMulNBits and of CPU kernels."""
    if packed.dtype != torch.int32:
        raise InputError(f"packed codes are int32 words, eight codes each; got {packed.dtype}")
    return _dense(packed).view(torch.uint8)


def from_bytes(halves: Tensor) -> Tensor:
    """[..., I / 2] uint8 -> the canonical [..., I / 8] int32: the inverse of `as_bytes`."""
    if halves.dtype != torch.uint8 or halves.dim() == 0 or halves.shape[-1] % 4:
        raise InputError(f"from_bytes: {tuple(halves.shape)} {halves.dtype}; takes uint8 whose last dimension is a multiple of 4")
    return _dense(halves).view(torch.int32)


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless its rows lie end to end; `contiguous` would leave the strides of an empty one alone."""
    whole = tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
