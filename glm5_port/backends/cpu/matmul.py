"""Native int4_matmul, int8_matmul and linear, and the weight layout of the INT4 kernels.

A prepared weight has the bytes of the canonical one in another order (native/matmul/layout.h): panels of sixteen output rows,
each one stream. It takes 0.5625 bytes a weight in groups of 32, as the canonical one does; groups whose length is no multiple of
32 and rows that are no multiple of 16 are padded up to one.

Shape legend: N, K outputs and inputs of a weight; P panels, ceil(N / 16); U units of 32 inputs, groups padded; G groups of a row;
R rows of x; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import MATRIX, kernels, native, rows_of, threads
from glm5_port.errors import InputError
from glm5_port.memory import zeros
from glm5_port.operators.int4 import check_int4, int4_matmul, int8_matmul
from glm5_port.operators.linear import linear
from glm5_port.quant.int4 import groups_of

UNIT = 32
"""Inputs of a unit; groups are padded to whole ones."""
PANEL = 16
"""Output rows of a panel."""


def panel_shapes(outputs: int, width: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes [P, U, 16, 16] (bytes) and of the scales [P, G, 16] of a prepared weight."""
    groups, size = groups_of(width, group_size)
    panels = -(-outputs // PANEL)
    return (panels, groups * -(-size // UNIT), PANEL, UNIT // 2), (panels, groups, PANEL)


def fill_panels(packed: Tensor, scales: Tensor, group_size: int, codes: Tensor, panel_scales: Tensor) -> None:
    """Writes a canonical weight [N, K / 8] and its scales [N, G] into the panels `codes` and `panel_scales`."""
    outputs, width = packed.shape[0], packed.shape[1] * 8
    _, size = groups_of(width, group_size)
    packed, scales = rows_of(packed), rows_of(scales.to(torch.bfloat16))
    kernels().prepare_int4(
        packed.data_ptr(),
        scales.data_ptr(),
        packed.stride(0) * packed.element_size(),
        scales.stride(0),
        codes.data_ptr(),
        panel_scales.data_ptr(),
        outputs,
        width,
        size,
        threads(),
    )


class PanelWeight:
    """One INT4 weight in panels."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._group_size = facts["group_size"]
        self._weights: dict[str, Tensor | int] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes the weight; `part` is None."""
        packed, scales = tensors["packed"], tensors["scales"]
        check_int4("int4_matmul", packed, scales, self._group_size)
        code_shape, scale_shape = panel_shapes(packed.shape[0], packed.shape[1] * 8, self._group_size)
        codes, panel_scales = zeros(*code_shape, dtype=torch.uint8), zeros(*scale_shape, dtype=torch.bfloat16)
        fill_panels(packed, scales, self._group_size, codes, panel_scales)
        self._weights = {"codes": codes, "panel_scales": panel_scales, "outputs": packed.shape[0]}

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of the kernel."""
        if not self._weights:
            raise InputError("int4_matmul on cpu: the weight never arrived")
        return self._weights


def check_width(name: str, width: int, expected: int) -> None:
    """Raises InputError unless rows of `width` fit a prepared weight of `expected` inputs."""
    if width != expected:
        raise InputError(f"{name}: rows of {width} numbers, and a weight of {expected} inputs")


def _fake_matmul(x: Tensor, *, group_size: int, codes: Tensor, panel_scales: Tensor, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@native(int4_matmul, isas=MATRIX, prepare=PanelWeight, fake=_fake_matmul)
def int4_matmul_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, *, group_size: int, codes: Tensor, panel_scales: Tensor, outputs: int) -> Tensor:
        width = x.shape[-1]
        _, size = groups_of(width, group_size)
        check_width("int4_matmul", width, panel_scales.shape[1] * size)
        rows_RK = rows_of(x)
        y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
        kernels().int4_matmul(
            isa,
            rows_RK.data_ptr(),
            x.dtype == torch.bfloat16,
            rows_RK.shape[0],
            rows_RK.stride(0),
            codes.data_ptr(),
            panel_scales.data_ptr(),
            outputs,
            width,
            size,
            y.data_ptr(),
            threads(),
        )
        return y

    return run


@native(int8_matmul, isas=MATRIX)
def int8_matmul_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        rows_RK, weight_NK, scales_N = rows_of(x), rows_of(weight), weight_scale.to(torch.float32).contiguous()
        check_width("int8_matmul", x.shape[-1], weight.shape[1])
        y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
        kernels().int8_matmul(
            isa,
            rows_RK.data_ptr(),
            x.dtype == torch.bfloat16,
            rows_RK.shape[0],
            rows_RK.stride(0),
            weight_NK.data_ptr(),
            weight_NK.stride(0),
            scales_N.data_ptr(),
            *weight.shape,
            y.data_ptr(),
            threads(),
        )
        return y

    return run


@native(linear, isas=MATRIX)
def linear_native(isa: int) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        rows_RK, weight_NK = rows_of(x), rows_of(weight)
        check_width("linear", x.shape[-1], weight.shape[1])
        y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
        kernels().linear(
            isa,
            rows_RK.data_ptr(),
            x.dtype == torch.bfloat16,
            rows_RK.shape[0],
            rows_RK.stride(0),
            weight_NK.data_ptr(),
            weight_NK.stride(0),
            *weight.shape,
            y.data_ptr(),
            threads(),
        )
        return y

    return run
