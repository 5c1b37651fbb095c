"""Kernels of rms_norm and add_rms_norm: one program a row, which stays in registers between the two passes over it.

Floor: rows * width * bytes of a number * (2 without residual, 4 with) / memory bandwidth; 6144 bfloat16 of one token are 24 KB or
48 KB, so that a call of a decode step costs its launch.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import narrow


@triton.jit
def rms_norm_rows(
    x, residual, weight, y, total, x_stride, residual_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = weight * s / rms(s) with s = x, or x + residual rounded to the working dtype, which `total` then gets."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(values, x.dtype.element_ty)
        tl.store(total + row * WIDTH + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(values * values, axis=0), WIDTH * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    channels = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + columns, narrow(values * scale * channels, y.dtype.element_ty), mask=inside)
