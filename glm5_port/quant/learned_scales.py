"""Learned scales of INT4-aware training (LSQ): every group has a float32 scale t that is trained beside the master.

    s = bf16(t), at least 2^-113        q = half-even(bf16(master) / s), clipped to -7..7       value = bf16(q * s)
    d value / d master = 1 where |bf16(master) / s| <= 7, else 0
    d value / d t      = q - bf16(master) / s there, else q (which is 7 or -7)
    gradient of t      = the sum over its group of g of (gradient of value) * (d value / d t) / sqrt(7 g)

Codes come from the quantiser, given the rounded scale (`quantize_with_scales`). All roundings are straight-through.

Source: Esser et al., Learned Step Size Quantization (arXiv 1902.08153).

Shape legend: ... any leading dimensions; I inputs of a row; N groups; g weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.quant.packing import unpack_int4

LIMIT = 7
SMALLEST_SCALE = 2.0**-113
"""A learned scale below this (or below zero) computes as this; its gradient can bring it back."""
LARGEST_SCALE = 1.5 * 2.0**124
"""Above it 7 s may be infinite."""


def check_scales(scales: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises InputError for learned scales of another dtype or shape."""
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
        raise InputError(
            f"{name}: learned scales of shape {tuple(scales.shape)} {scales.dtype} arrived; this weight takes float32 {shape}"
        )


def round_scales(scales: Tensor, name: str = "weight") -> Tensor:
    """The bfloat16 scales that learned ones compute as.

    Raises:
        InputError: one is NaN or too large, with its index. One wait for the device.
    """
    bad = ~(scales <= LARGEST_SCALE)
    if bad.any():
        index = [int(i) for i in bad.nonzero()[0]]
        raise InputError(
            f"{name}: learned scale {index} is {scales[tuple(index)].item()}; {int(bad.sum())} of {bad.numel()} are not "
            "finite or too large.\n"
            "  The training step that made it is broken. Learned scales want a learning rate well below their own size."
        )
    return scales.detach().clamp(min=SMALLEST_SCALE).to(torch.bfloat16)


def gradients(gradient: Tensor, master: Tensor, scales: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the master [..., I], gradient of the learned scales [..., N]): the formulas of the module's text.

    Args:
        gradient: of the values, [..., I].
        master, scales: float32.
        packed: their codes.
    """
    size = master.shape[-1] // scales.shape[-1]
    codes_Ng = unpack_int4(packed).unflatten(-1, (-1, size)).to(torch.float32)
    rounded_N = round_scales(scales).to(torch.float32)
    quotients_Ng = master.to(torch.bfloat16).to(torch.float32).unflatten(-1, (-1, size)) / rounded_N.unsqueeze(-1)
    inside_Ng = quotients_Ng.abs() <= LIMIT
    gradient_Ng = gradient.to(torch.float32).unflatten(-1, (-1, size))
    slopes_Ng = torch.where(inside_Ng, codes_Ng - quotients_Ng, codes_Ng)
    of_scales_N = (gradient_Ng * slopes_Ng).sum(-1) * (size * LIMIT) ** -0.5
    return (gradient_Ng * inside_Ng).flatten(-2), of_scales_N
