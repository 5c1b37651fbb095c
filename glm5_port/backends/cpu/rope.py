"""Native rotate. Shape legend: T tokens; H heads; D channels of a head; P rotated pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import kernels, native, threads
from glm5_port.operators.rope import check_rotation, rotate


def rotated(isa: int, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
    """`rotate` by the kernel of an instruction set; x is float32 or bfloat16."""
    check_rotation(x, cos, sin, start)
    x = x.detach()
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    cos, sin = (angles.detach().to(torch.float32).contiguous() for angles in (cos, sin))
    y_THD = torch.empty(x.shape, dtype=x.dtype)
    kernels().rotate(
        isa,
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        *x.shape,
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        start,
        interleaved,
        y_THD.data_ptr(),
        threads(),
    )
    return y_THD


@native(rotate)
def rotate_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
        return rotated(isa, x, cos, sin, interleaved=interleaved, start=start)

    return run
