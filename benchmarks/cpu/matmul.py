"""int4_matmul and experts against torch, ONNX Runtime, transformers' way of computing experts, kt-kernel and ggml."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu.contest import Contest, copies_for
from benchmarks.cpu.outside import players
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.operators import expert_mlp, expert_mlp_int4, expert_mlp_int4_w4a8, int4_matmul
from glm5_port.quant.int4 import PER_CHANNEL, dequantize_packed, quantize_packed
from glm5_port.quant.packing import unpack_int4

SHAPES = ((6144, 2048), (2048, 6144), (6144, 12288))
ROWS = (1, 4, 16, 64, 256, 1024)
TOKENS = (1, 8, 64, 512, 2048)
WIDTH, BETWEEN, TOP_K, GROUP = 6144, 2048, 8, 32
DISTINCT = 8
"""Experts whose weights differ."""
INT4_BYTES = 0.5 + 2 / GROUP


def _prepared(
    operator: Any, facts: dict[str, Any], parts: list[dict[str, Tensor]], backend: str, whole: bool
) -> Callable[..., Tensor]:
    """The operator bound for decoding bfloat16 on a backend, with its weights."""
    bound = operator.bind(backend=backend, device_type="cpu", dtype=torch.bfloat16, **facts)
    preparation = bound.prepare()
    for number, tensors in enumerate(parts):
        preparation.add(None if whole else number, tensors)
    weights = preparation.finish()
    return lambda *args, **kwargs: bound(*args, **kwargs, **weights)


def _int4pack(packed: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's own kernel: (q - 8) * scale + zero, with zeros of 0."""
    codes = (unpack_int4(packed).to(torch.int32) + 8).contiguous()
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales_and_zeros = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=-1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales_and_zeros)


def products() -> Iterator[Contest]:
    """int4_matmul at three widths, one row to many."""
    for inputs, outputs in SHAPES:
        copies = copies_for(inputs * outputs * INT4_BYTES)
        generator = torch.Generator().manual_seed(inputs + outputs)
        wide_copies = min(copies, 8)
        weights = [torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5) for _ in range(wide_copies)]
        canonical = [quantize_packed(weight) for weight in weights]
        values = [dequantize_packed(*parts) for parts in canonical]
        del weights
        facts = {"width_in": inputs, "width_out": outputs, "group_size": GROUP}
        made = [{"packed": packed, "scales": scales} for packed, scales in canonical]
        ours = [_prepared(int4_matmul, facts, [parts], "cpu", True) for parts in made * -(-copies // wide_copies)]
        ort = [_prepared(int4_matmul, facts, [parts], "onnxruntime", True) for parts in made]
        torch_int4 = [_int4pack(*parts) for parts in canonical * -(-copies // wide_copies)]
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator).bfloat16()

            def in_turn(calls: list[Callable[..., Tensor]], x: Tensor = x, **named: Any) -> Callable[[int], Tensor]:
                return lambda copy: calls[copy % len(calls)](x, **named)

            yield Contest(
                operator="int4_matmul",
                work=f"{inputs} x {outputs}, {rows} rows",
                bytes=inputs * outputs * INT4_BYTES + 2 * rows * (inputs + outputs),
                operations=2 * rows * inputs * outputs,
                kind="bf16",
                contenders={
                    f"cpu/{widest_isa()}": in_turn(ours, group_size=GROUP),
                    "torch int4pack": in_turn(torch_int4),
                    "torch bf16 mm": in_turn([lambda x, value=value: F.linear(x, value) for value in values]),
                    "onnxruntime MatMulNBits": in_turn(ort, group_size=GROUP),
                },
                gold=lambda x=x, value=values[0]: x.double() @ value.double().t(),
                copies=len(ours),
            )


def _expert(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(2 * BETWEEN, WIDTH, generator=generator).mul_(WIDTH**-0.5).bfloat16()
    return gate_up, torch.randn(WIDTH, BETWEEN, generator=generator).mul_(BETWEEN**-0.5).bfloat16()


def _int4_parts(experts: int) -> list[dict[str, Tensor]]:
    """Some experts that differ; the others repeat them at places of their own, since only their bits cost time."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(DISTINCT):
        gate_up, down = _expert(generator)
        (gate_up_packed, gate_up_scales), (down_packed, down_scales) = quantize_packed(gate_up), quantize_packed(down)
        made.append(
            {
                "gate_up_packed": gate_up_packed,
                "gate_up_scales": gate_up_scales,
                "down_packed": down_packed,
                "down_scales": down_scales,
            }
        )
    return [made[number % len(made)] for number in range(experts)]


def _routing(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    return torch.rand(tokens, TOP_K, generator=generator).softmax(-1), ids


def _hugging_face_eager(gate_up: Tensor, down: Tensor) -> Callable[..., Tensor]:
    """As transformers' eager experts: each expert that was chosen, one after the other."""

    def run(hidden: Tensor, route_weights: Tensor, ids: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            tokens, choices = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden[tokens], gate_up[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, down[expert])
            total.index_add_(0, tokens, result * route_weights[tokens, choices, None].to(hidden.dtype))
        return total

    return run


def experts(count: int, *, peers: bool) -> Iterator[Contest]:
    """The routed experts of one layer, uniform random routing; fresh experts for each call. Wide activations and those of 8 bits
    are contests of their own: the products that limit them differ.

    Args:
        count: experts.
        peers: also bfloat16 weights (3.6 times the bytes; 64 experts at most fit a small machine), kt-kernel and ggml.
    """
    facts = {"width": WIDTH, "width_between": BETWEEN, "experts": count, "top_k": TOP_K, "group_size": GROUP}
    parts = _int4_parts(count)
    ours = _prepared(expert_mlp_int4, facts, parts, "cpu", False)
    in_8_bits = _prepared(expert_mlp_int4_w4a8, facts | {"activation_group_size": GROUP}, parts, "cpu", False)  # rows too
    if peers:
        gate_up = torch.stack([dequantize_packed(p["gate_up_packed"], p["gate_up_scales"]) for p in parts])
        down = torch.stack([dequantize_packed(p["down_packed"], p["down_scales"]) for p in parts])
        grouped = expert_mlp.implementations["torch/grouped_mm"].function
        eager = _hugging_face_eager(gate_up, down)
    outside = players(parts[:DISTINCT], count) if peers else {}
    expert_bytes = 3 * WIDTH * BETWEEN * INT4_BYTES
    for tokens in TOKENS:
        hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        routings = [_routing(tokens, count, seed) for seed in range(16 if tokens <= 8 else 2)]
        touched = sum(len(ids.unique()) for _, ids in routings) / len(routings)

        def quantised(size: int, h: Tensor = hidden, r: list[tuple[Tensor, Tensor]] = routings) -> Callable[[int], Tensor]:
            return lambda copy: in_8_bits(h, *r[copy], group_size=GROUP, activation_group_size=size)

        wide: dict[str, Callable[[int], Tensor]] = {
            f"cpu/{widest_isa()} W4A16": lambda copy, h=hidden, r=routings: ours(h, *r[copy], group_size=GROUP)
        }
        if peers:
            wide |= {
                "torch grouped_mm bf16": lambda copy, h=hidden, r=routings: grouped(h, *r[copy], gate_up, down),
                "transformers eager bf16": lambda copy, h=hidden, r=routings: eager(h, *r[copy]),
            }
        narrow = {
            f"cpu/{widest_isa()} W4A8, a scale a group": quantised(GROUP),
            f"cpu/{widest_isa()} W4A8, a scale a row": quantised(PER_CHANNEL),
        } | {f"{peer} INT4, 8-bit activations": player.routings(hidden, routings) for peer, player in outside.items()}

        def gold(hidden: Tensor = hidden, routing: tuple[Tensor, Tensor] = routings[0]) -> Tensor:
            route_weights, ids = routing
            total = torch.zeros(hidden.shape, dtype=torch.float64)
            for expert in ids.unique().tolist():
                part = parts[expert]
                wide_gate_up = dequantize_packed(part["gate_up_packed"], part["gate_up_scales"]).double()
                wide_down = dequantize_packed(part["down_packed"], part["down_scales"]).double()
                tokens, choices = (ids == expert).nonzero(as_tuple=True)
                gate, up = (hidden[tokens].double() @ wide_gate_up.t()).chunk(2, dim=-1)
                result = (F.silu(gate) * up) @ wide_down.t()
                total.index_add_(0, tokens, result * route_weights[tokens, choices, None].double())
            return total

        for operator, kind, contenders in (("expert_mlp_int4", "bf16", wide), ("expert_mlp_int4_w4a8", "int8", narrow)):
            yield Contest(
                operator=operator,
                work=f"{count} experts, {tokens} token{'s' * (tokens > 1)}",
                bytes=touched * expert_bytes + 4 * tokens * WIDTH,
                operations=2 * tokens * TOP_K * 3 * WIDTH * BETWEEN,
                kind=kind,
                contenders=contenders,
                gold=gold if tokens <= 64 else None,
                copies=len(routings),
                floor_note=f"{math.ceil(touched)} experts are touched",
            )
