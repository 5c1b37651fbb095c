"""Native expert_mlp, expert_mlp_int4, expert_mlp_int4_w4a8 and gated_mlp: grouping, products, activation and mixing in one call.

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; the letters of
`glm5_port.backends.cpu.matmul` for prepared weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import MATRIX, kernels, native, rows_of, threads
from glm5_port.backends.cpu.matmul import UNIT, check_width, fill_panels, panel_shapes
from glm5_port.errors import InputError
from glm5_port.memory import zeros
from glm5_port.operators.int4 import check_activation_groups, check_int4, expert_mlp_int4, expert_mlp_int4_w4a8
from glm5_port.operators.linear import gated_mlp
from glm5_port.operators.moe import expert_mlp
from glm5_port.quant.int4 import PER_CHANNEL


class PanelExperts:
    """INT4 experts in panels: gate, then up [E, 2, ...], and down [E, 1, ...]. Memory for all is taken when the first arrives."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._experts = facts["experts"]
        self._group_size = facts["group_size"]
        self._width_between = facts["width_between"]
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes one expert."""
        if part is None or not 0 <= part < self._experts:
            raise InputError(f"experts on cpu: part {part} arrived; expected experts 0 to {self._experts - 1}")
        for name, halves in (("gate_up", 2), ("down", 1)):
            packed, scales = tensors[f"{name}_packed"], tensors[f"{name}_scales"]
            check_int4(f"experts on cpu, {name}", packed, scales, self._group_size)
            codes, panel_scales = self._memory(name, halves, packed)
            for half, (half_packed, half_scales) in enumerate(zip(packed.chunk(halves), scales.chunk(halves), strict=True)):
                fill_panels(half_packed, half_scales, self._group_size, codes[part, half], panel_scales[part, half])
        self._seen.add(part)

    def _memory(self, name: str, halves: int, packed: Tensor) -> tuple[Tensor, Tensor]:
        if f"{name}_codes" not in self._tensors:
            shapes = panel_shapes(packed.shape[0] // halves, packed.shape[1] * 8, self._group_size)
            for kind, shape, dtype in zip(("codes", "panel_scales"), shapes, (torch.uint8, torch.bfloat16), strict=True):
                self._tensors[f"{name}_{kind}"] = zeros(self._experts, halves, *shape, dtype=dtype)
        return self._tensors[f"{name}_codes"], self._tensors[f"{name}_panel_scales"]

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of the kernel."""
        if absent := set(range(self._experts)) - self._seen:
            raise InputError(f"experts on cpu: experts missing: {sorted(absent)}")
        return {**self._tensors, "width_between": self._width_between}


def _fake_experts(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


@dataclass(frozen=True, slots=True)
class _Panels:
    """What `PanelExperts` prepares."""

    gate_up_codes: Tensor
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor
    width_between: int
    group_size: int


def _int4_experts(
    isa: int,
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    panels: _Panels,
    *,
    int8_activations: bool = False,
    activation_groups: bool = False,
) -> Tensor:
    tokens, width = hidden.shape
    (_, units, *_), _ = panel_shapes(panels.width_between, width, panels.group_size)
    check_width("experts on cpu", units * UNIT, panels.gate_up_codes.shape[3] * UNIT)
    hidden_TD, weights_Tk, ids_Tk = _routed(hidden, route_weights, ids)
    y_TD = torch.empty((tokens, width), dtype=hidden.dtype)
    kernels().int4_experts(
        isa,
        int8_activations,
        activation_groups,
        hidden_TD.data_ptr(),
        hidden.dtype == torch.bfloat16,
        tokens,
        hidden_TD.stride(0),
        weights_Tk.data_ptr(),
        ids_Tk.data_ptr(),
        ids.shape[1],
        panels.gate_up_codes.shape[0],
        panels.gate_up_codes.data_ptr(),
        panels.gate_up_scales.data_ptr(),
        panels.down_codes.data_ptr(),
        panels.down_scales.data_ptr(),
        width,
        panels.width_between,
        panels.group_size,
        y_TD.data_ptr(),
        threads(),
    )
    return y_TD


def _routed(hidden: Tensor, route_weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows_of(hidden), route_weights.to(torch.float32).contiguous(), ids.to(torch.int32).contiguous()


@native(expert_mlp_int4, isas=MATRIX, prepare=PanelExperts, fake=_fake_experts)
def expert_mlp_int4_native(isa: int) -> Callable[..., Tensor]:
    def run(
        hidden: Tensor,
        route_weights: Tensor,
        ids: Tensor,
        *,
        group_size: int,
        gate_up_codes: Tensor,
        gate_up_panel_scales: Tensor,
        down_codes: Tensor,
        down_panel_scales: Tensor,
        width_between: int,
    ) -> Tensor:
        panels = _Panels(gate_up_codes, gate_up_panel_scales, down_codes, down_panel_scales, width_between, group_size)
        return _int4_experts(isa, hidden, route_weights, ids, panels)

    return run


@native(expert_mlp_int4_w4a8, isas=MATRIX, prepare=PanelExperts, fake=_fake_experts)
def expert_mlp_int4_w4a8_native(isa: int) -> Callable[..., Tensor]:
    def run(
        hidden: Tensor,
        route_weights: Tensor,
        ids: Tensor,
        *,
        group_size: int,
        activation_group_size: int = PER_CHANNEL,
        gate_up_codes: Tensor,
        gate_up_panel_scales: Tensor,
        down_codes: Tensor,
        down_panel_scales: Tensor,
        width_between: int,
    ) -> Tensor:
        check_activation_groups("expert_mlp_int4_w4a8", activation_group_size, group_size)
        panels = _Panels(gate_up_codes, gate_up_panel_scales, down_codes, down_panel_scales, width_between, group_size)
        groups = activation_group_size != PER_CHANNEL
        return _int4_experts(isa, hidden, route_weights, ids, panels, int8_activations=True, activation_groups=groups)

    return run


# -- weights in floating point -------------------------------------------------------------------------------------------


def _dense_experts(isa: int, hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weights as they are declared, [E, 2F, D] and [E, D, F]; copied only if their rows are strided."""
    gate_up, down = (weight if weight.stride(2) == 1 else weight.contiguous() for weight in (gate_up, down))
    hidden_TD, weights_Tk, ids_Tk = _routed(hidden, route_weights, ids)
    y_TD = torch.empty(hidden.shape, dtype=hidden.dtype)
    kernels().dense_experts(
        isa,
        hidden_TD.data_ptr(),
        hidden.dtype == torch.bfloat16,
        hidden.shape[0],
        hidden_TD.stride(0),
        weights_Tk.data_ptr(),
        ids_Tk.data_ptr(),
        ids.shape[1],
        gate_up.shape[0],
        gate_up.data_ptr(),
        gate_up.stride(1),
        gate_up.stride(0),
        down.data_ptr(),
        down.stride(1),
        down.stride(0),
        hidden.shape[1],
        down.shape[2],
        y_TD.data_ptr(),
        threads(),
    )
    return y_TD


@native(expert_mlp, isas=MATRIX)
def expert_mlp_native(isa: int) -> Callable[..., Tensor]:
    def run(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return _dense_experts(isa, hidden, route_weights, ids, gate_up, down)

    return run


@native(gated_mlp, isas=MATRIX)
def gated_mlp_native(isa: int) -> Callable[..., Tensor]:
    """One expert that every token chooses."""

    def run(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = rows_of(x)
        ones, zeros = torch.ones(rows.shape[0], 1), torch.zeros(rows.shape[0], 1, dtype=torch.int32)
        return _dense_experts(isa, rows, ones, zeros, gate_up.unsqueeze(0), down.unsqueeze(0)).view(x.shape)

    return run
