"""Block-FP8 weights: e4m3 values with one float32 multiplier for each block of the matrix.

    W[i, j] = value[i, j] * scale[i // block_rows, j // block_columns]

The scales are stored under `<name>_scale_inv`. Despite the name they are multiplied. Blocks at the lower and right edge are
partial: 576 rows have five blocks of 128, the last one 64 rows high.

Shape legend: O output rows of a matrix; I input columns; bo, bi blocks along them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"


def scale_name(name: str) -> str:
    """The name under which the multipliers of a quantised tensor are stored."""
    return name + SCALE_SUFFIX


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Blocks along each edge of a matrix, partial ones included."""
    return tuple(-(-edge // size) for edge, size in zip(shape, block, strict=True))


def dequantize_rows(values_OI: Tensor, scales_bobi: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that e4m3 values and their multipliers stand for.

    Args:
        values_OI: [O, I] float8_e4m3fn, beginning at the upper edge of a block.
        scales_bobi: [ceil(O / block[0]), ceil(I / block[1])] float32.
        block: rows and columns of a block.
        dtype: of the result. The product is formed in float32 and rounded once.

    Returns:
        [O, I] in `dtype`.
    """
    rows, columns = values_OI.shape
    block_rows = torch.arange(rows, device=values_OI.device) // block[0]
    block_columns = torch.arange(columns, device=values_OI.device) // block[1]
    return (values_OI.to(torch.float32) * scales_bobi[block_rows[:, None], block_columns]).to(dtype)
