"""Triton expert_mlp, expert_mlp_int4 and expert_mlp_int4_w4a8.

Memory beside the weights: R rows of D + F numbers in the working dtype.

Shape legend: T tokens; D hidden size; F intermediate size of one expert; E experts; k choices per token; R = T * k routed rows;
S blocks of B rows of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.linear import dense_tiles
from glm5_port.backends.cuda.matmul import (
    TILE,
    check_width,
    group_reasons,
    int4_tiles,
    quantize_rows,
    scale_rows,
    tile_words,
)
from glm5_port.backends.cuda.triton_support import check_shapes, kernels, launch, power_of_two, rows_of, triton
from glm5_port.errors import InputError
from glm5_port.operators.int4 import (
    check_int4,
    check_scale_a_row,
    expert_mlp_int4,
    expert_mlp_int4_w4a8,
    scale_a_row_reasons,
)
from glm5_port.operators.moe import expert_mlp
from glm5_port.quant.int4 import PER_CHANNEL, groups_of

CHUNK = 1024
"""Routed rows that are looked at together."""
MOST_EXPERTS = 1024


@dataclass(frozen=True, slots=True)
class Blocks:
    """The routed rows in blocks of one expert.

    Attributes:
        rows_SB: routed row (token * k + choice) of each place; -1 in places that are not used.
        experts_S: the expert of each block; -1 for blocks that hold nothing.
    """

    rows_SB: Tensor
    experts_S: Tensor


def group_rows(ids_Tk: Tensor, experts: int, block: int) -> Blocks:
    """Lists the routed rows by expert. As many blocks as any routing may need: their number must be known without asking the
    device."""
    routed = ids_Tk.numel()
    blocks = (routed + min(experts, routed) * (block - 1)) // block
    rows_SB = torch.empty((blocks, block), dtype=torch.int32, device=ids_Tk.device)
    experts_S = torch.empty((blocks,), dtype=torch.int32, device=ids_Tk.device)
    launch(
        kernels("experts").group_rows,
        (experts if blocks else 0,),
        ids_Tk,
        rows_SB,
        experts_S,
        routed,
        blocks,
        EXPERTS=experts,
        CHUNKS=power_of_two(-(-routed // CHUNK)),
        CHUNK=CHUNK,
        BLOCK_B=block,
        BLOCK_E=power_of_two(experts, least=32),
        BLOCK_S=power_of_two(blocks),
        num_warps=4,
    )
    return Blocks(rows_SB, experts_S)


def mix_choices(results_RD: Tensor, route_weights_Tk: Tensor, ids_Tk: Tensor, experts: int) -> Tensor:
    """Sums each token's weighted results in routing order, in float32, and rounds once."""
    tokens, choices = ids_Tk.shape
    width = results_RD.shape[1]
    y_TD = torch.empty((tokens, width), dtype=results_RD.dtype, device=results_RD.device)
    block = min(power_of_two(width), 512)
    launch(
        kernels("experts").mix_choices,
        (-(-width // block), -(-tokens // 4)),
        results_RD,
        route_weights_Tk,
        ids_Tk,
        y_TD,
        tokens,
        EXPERTS=experts,
        CHOICES=choices,
        WIDTH=width,
        TOKENS=4,
        BLOCK=block,
        num_warps=4,
    )
    return y_TD


def _routed(hidden: Tensor, route_weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_shapes("experts", ids=(ids, (hidden.shape[0], ids.shape[-1])), route_weights=(route_weights, tuple(ids.shape)))
    return rows_of(hidden), route_weights.detach().to(torch.float32).contiguous(), ids.to(torch.int32).contiguous()


def _rows_of_an_expert(ids: Tensor, experts: int) -> int:
    """Rounded up, if all experts are met alike."""
    return -(-ids.numel() // experts)


def _not_supported(*, experts: int, **_: Any) -> list[str]:
    return [f"takes at most {MOST_EXPERTS} experts, not {experts}"] if experts > MOST_EXPERTS else []


# -- weights in floating point -----------------------------------------------------------------------------------------


@triton(expert_mlp, not_supported=_not_supported)
def expert_mlp_triton(hidden: Tensor, route_weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weights as they are declared; copied only if their rows are strided."""
    gate_up, down = (weight.detach() if weight.stride(2) == 1 else weight.detach().contiguous() for weight in (gate_up, down))
    hidden_TD, weights_Tk, ids_Tk = _routed(hidden, route_weights, ids)
    experts, width, between = down.shape
    check_shapes("expert_mlp", hidden=(hidden, (ids.shape[0], width)), gate_up=(gate_up, (experts, 2 * between, width)))
    tiles = dense_tiles(_rows_of_an_expert(ids, experts), hidden.dtype)
    options = {
        "BLOCK_N": tiles.outputs,
        "BLOCK_B": tiles.rows,
        "BLOCK_K": tiles.inputs,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    grouped = group_rows(ids_Tk, experts, tiles.rows)
    between_RF = hidden.new_empty((ids_Tk.numel(), between))
    results_RD = hidden.new_empty((ids_Tk.numel(), width))
    module = kernels("experts")
    launch(
        module.dense_gate_up,
        (-(-between // tiles.outputs), grouped.experts_S.shape[0]),
        hidden_TD,
        gate_up,
        grouped.rows_SB,
        grouped.experts_S,
        between_RF,
        hidden_TD.stride(0),
        gate_up.stride(1),
        gate_up.stride(0),
        CHOICES=ids.shape[1],
        WIDTH=width,
        BETWEEN=between,
        **options,
    )
    launch(
        module.dense_down,
        (-(-width // tiles.outputs), grouped.experts_S.shape[0]),
        between_RF,
        down,
        grouped.rows_SB,
        grouped.experts_S,
        results_RD,
        down.stride(1),
        down.stride(0),
        WIDTH=width,
        BETWEEN=between,
        **options,
    )
    return mix_choices(results_RD, weights_Tk, ids_Tk, experts)


# -- INT4 weights ------------------------------------------------------------------------------------------------------


class TiledExperts:
    """INT4 experts in tiles (`glm5_port.backends.cuda.matmul`). Memory for all is taken when the first arrives."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._experts = facts["experts"]
        self._group_size = facts["group_size"]
        self._tensors: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes one expert."""
        if part is None or not 0 <= part < self._experts:
            raise InputError(f"experts on cuda: part {part} arrived; expected experts 0 to {self._experts - 1}")
        for name in ("gate_up", "down"):
            packed, scales = tensors[f"{name}_packed"], tensors[f"{name}_scales"]
            check_int4(f"experts on cuda, {name}", packed, scales, self._group_size)
            for kind, tiled in (("words", tile_words(packed)), ("group_scales", scale_rows(scales))):
                if f"{name}_{kind}" not in self._tensors:
                    self._tensors[f"{name}_{kind}"] = tiled.new_empty((self._experts, *tiled.shape))
                self._tensors[f"{name}_{kind}"][part] = tiled
        self._seen.add(part)

    def finish(self) -> dict[str, Tensor | int]:
        """The keyword arguments of the kernel."""
        if absent := set(range(self._experts)) - self._seen:
            raise InputError(f"experts on cuda: experts missing: {sorted(absent)}")
        return {**self._tensors}


def _int4_not_supported(*, group_size: int, **facts: Any) -> list[str]:
    return _not_supported(**facts) + group_reasons(group_size)


def _w4a8_not_supported(*, activation_group_size: int, **facts: Any) -> list[str]:
    return _int4_not_supported(**facts) + scale_a_row_reasons(activation_group_size)


def _fake_experts(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


@dataclass(frozen=True, slots=True)
class Int4Weights:
    """The prepared weights of INT4 experts: words [E, tiles, outputs, 16] and scales [E, groups, outputs] of both products."""

    gate_up_words: Tensor
    gate_up_scales: Tensor
    down_words: Tensor
    down_scales: Tensor
    group_size: int

    @property
    def experts(self) -> int:
        return self.down_words.shape[0]

    @property
    def width(self) -> int:
        return self.down_words.shape[2]

    @property
    def between(self) -> int:
        return self.gate_up_words.shape[2] // 2


def _int4_experts(hidden: Tensor, route_weights: Tensor, ids: Tensor, weights: Int4Weights, *, int8_activations: bool) -> Tensor:
    width, between = weights.width, weights.between
    check_width("experts on cuda", hidden.shape[1], weights.gate_up_words.shape[1] * TILE)
    hidden_TD, weights_Tk, ids_Tk = _routed(hidden, route_weights, ids)
    inputs = quantize_rows(hidden_TD) if int8_activations else (hidden_TD, hidden_TD)
    tiles = int4_tiles(_rows_of_an_expert(ids, weights.experts), inputs[0].dtype)
    grouped = group_rows(ids_Tk, weights.experts, tiles.rows)
    between_RF = hidden.new_empty((ids_Tk.numel(), between))
    results_RD = hidden.new_empty((ids_Tk.numel(), width))
    options = {"BLOCK_N": tiles.outputs, "BLOCK_B": tiles.rows, "num_warps": tiles.warps, "num_stages": tiles.stages}
    module = kernels("experts")
    launch(
        module.int4_gate_up,
        (-(-between // tiles.outputs), grouped.experts_S.shape[0]),
        *inputs,
        weights.gate_up_words,
        weights.gate_up_scales,
        grouped.rows_SB,
        grouped.experts_S,
        between_RF,
        inputs[0].stride(0),
        CHOICES=ids.shape[1],
        WIDTH=width,
        BETWEEN=between,
        GROUP=groups_of(width, weights.group_size)[1],
        TILES=weights.gate_up_words.shape[1],
        GROUPS=weights.gate_up_scales.shape[1],
        **options,
    )
    inputs = quantize_rows(between_RF) if int8_activations else (between_RF, between_RF)
    launch(
        module.int4_down,
        (-(-width // tiles.outputs), grouped.experts_S.shape[0]),
        *inputs,
        weights.down_words,
        weights.down_scales,
        grouped.rows_SB,
        grouped.experts_S,
        results_RD,
        WIDTH=width,
        BETWEEN=between,
        GROUP=groups_of(between, weights.group_size)[1],
        TILES=weights.down_words.shape[1],
        GROUPS=weights.down_scales.shape[1],
        **options,
    )
    return mix_choices(results_RD, weights_Tk, ids_Tk, weights.experts)


@triton(expert_mlp_int4, not_supported=_int4_not_supported, prepare=TiledExperts, fake=_fake_experts)
def expert_mlp_int4_triton(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    *,
    group_size: int,
    gate_up_words: Tensor,
    gate_up_group_scales: Tensor,
    down_words: Tensor,
    down_group_scales: Tensor,
) -> Tensor:
    weights = Int4Weights(gate_up_words, gate_up_group_scales, down_words, down_group_scales, group_size)
    return _int4_experts(hidden, route_weights, ids, weights, int8_activations=False)


@triton(expert_mlp_int4_w4a8, not_supported=_w4a8_not_supported, prepare=TiledExperts, fake=_fake_experts)
def expert_mlp_int4_w4a8_triton(
    hidden: Tensor,
    route_weights: Tensor,
    ids: Tensor,
    *,
    group_size: int,
    activation_group_size: int = PER_CHANNEL,
    gate_up_words: Tensor,
    gate_up_group_scales: Tensor,
    down_words: Tensor,
    down_group_scales: Tensor,
) -> Tensor:
    """Codes of one group multiply and sum as whole numbers."""
    check_scale_a_row("expert_mlp_int4_w4a8 on cuda", activation_group_size)
    weights = Int4Weights(gate_up_words, gate_up_group_scales, down_words, down_group_scales, group_size)
    return _int4_experts(hidden, route_weights, ids, weights, int8_activations=True)
