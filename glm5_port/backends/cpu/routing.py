"""Native route_experts. Shape legend: T tokens; D hidden size; E experts; k choices per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5_port.backends.cpu.extension import kernels, native, rows_of, threads
from glm5_port.errors import InputError
from glm5_port.operators.moe import check_routing, route_experts


@native(route_experts)
def route_experts_native(isa: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        hidden: Tensor,
        gate: Tensor,
        correction_bias: Tensor,
        *,
        top_k: int,
        groups: int,
        groups_kept: int,
        renormalise: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        check_routing(gate.shape[0], top_k, groups, groups_kept)
        if gate.shape[1] != hidden.shape[1]:
            raise InputError(
                f"route_experts: hidden {tuple(hidden.shape)} and gate {tuple(gate.shape)}; supported: [T, D] and [E, D]"
            )
        hidden_TD, gate_ED = rows_of(hidden.detach()), rows_of(gate.detach().to(hidden.dtype))
        bias_E = correction_bias.detach().to(torch.float32).expand(gate.shape[0]).contiguous()
        weights_Tk = torch.empty((hidden.shape[0], top_k), dtype=torch.float32)
        ids_Tk = torch.empty((hidden.shape[0], top_k), dtype=torch.int32)
        kernels().route_experts(
            isa,
            hidden_TD.data_ptr(),
            hidden.dtype == torch.bfloat16,
            *hidden_TD.shape,
            hidden_TD.stride(0),
            gate_ED.data_ptr(),
            gate_ED.stride(0),
            gate_ED.shape[0],
            bias_E.data_ptr(),
            top_k,
            groups,
            groups_kept,
            renormalise,
            scale,
            weights_Tk.data_ptr(),
            ids_Tk.data_ptr(),
            threads(),
        )
        return weights_Tk, ids_Tk

    return run
