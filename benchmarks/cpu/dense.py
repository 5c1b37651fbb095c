"""Products with dense weights and with INT8 weights, and what INT4 weights stand for; copies stand for the layers of a model.

Shape legend: R rows; T tokens; E experts; k choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cpu.calls import (
    HEADS,
    LATENT,
    NOPE,
    QUERY_LATENT,
    ROPE,
    VALUE,
    WIDTH,
    Call,
    normal,
    operator_contest,
    plural,
    weight,
    widened,
)
from benchmarks.cpu.contest import Contest, copies_for
from glm5_port.operators import (
    attention_output,
    expert_mlp,
    gated_mlp,
    int4_dequantize,
    int8_matmul,
    linear,
    linear_per_head,
)
from glm5_port.operators.int4 import quantize_rows
from glm5_port.quant.int4 import quantize_packed

BETWEEN, EXPERTS, TOP_K, GROUP = 2048, 16, 8, 32
ROWS = (1, 16, 512)


def linears() -> Iterator[Contest]:
    """The largest two projections of a layer: up from the query latent, and the output's."""
    for inputs, outputs in ((QUERY_LATENT, HEADS * (NOPE + ROPE)), (HEADS * VALUE, WIDTH)):
        weights = [weight(outputs, inputs) for _ in range(copies_for(2 * inputs * outputs))]
        for rows in ROWS:
            x = normal(rows, inputs)
            yield operator_contest(
                linear, f"{inputs} x {outputs}, {plural(rows, 'row')}", [{"x": x, "weight": w} for w in weights],
                2.0 * (inputs * outputs + rows * (inputs + outputs)), 2.0 * rows * inputs * outputs, exact=rows <= 16,
            )  # fmt: skip


def mlps() -> Iterator[Contest]:
    """The shared expert, and routed experts in bfloat16."""
    one = 3 * WIDTH * BETWEEN
    weights = [{"gate_up": weight(2 * BETWEEN, WIDTH), "down": weight(WIDTH, BETWEEN)} for _ in range(copies_for(2 * one))]
    for rows in ROWS:
        calls = [{"x": normal(rows, WIDTH), **w} for w in weights]
        yield operator_contest(
            gated_mlp, f"{WIDTH} x {BETWEEN}, {plural(rows, 'row')}", calls, 2.0 * one + 4.0 * rows * WIDTH, 2.0 * rows * one,
            exact=rows <= 16,
        )  # fmt: skip
    del weights
    experts = {"gate_up": weight(EXPERTS, 2 * BETWEEN, WIDTH), "down": weight(EXPERTS, WIDTH, BETWEEN)}
    for tokens in (1, 64):
        ids = [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32) for _ in range(4)]
        routed = {"hidden": normal(tokens, WIDTH), "route_weights": torch.rand(tokens, TOP_K).softmax(-1), **experts}
        calls = [{**routed, "ids": ids_Tk} for ids_Tk in ids]
        touched = sum(len(ids_Tk.unique()) for ids_Tk in ids) / len(ids)
        yield operator_contest(
            expert_mlp, f"{EXPERTS} experts, {plural(tokens, 'token')}", calls, touched * 2 * one + 4.0 * tokens * WIDTH,
            2.0 * tokens * TOP_K * one, exact=lambda call=calls[0]: _expert_by_expert(call),
            peers={"torch grouped_mm": lambda a: expert_mlp.implementations["torch/grouped_mm"].function(**a)},
        )  # fmt: skip


def _expert_by_expert(call: Call) -> Tensor:
    """expert_mlp in float64, one expert's weights at a time: an id that is none contributes nothing."""
    total = torch.zeros(call["hidden"].shape, dtype=torch.float64)
    for number in range(EXPERTS):
        one = {name: call[name][number : number + 1] for name in ("gate_up", "down")}
        total += expert_mlp.reference(**widened({**call, **one, "ids": torch.where(call["ids"] == number, 0, -1)}))
    return total


def heads() -> Iterator[Contest]:
    """Values out of the latent space, head by head, and with the output projection behind them."""
    per_head, output = HEADS * VALUE * LATENT, HEADS * VALUE * WIDTH
    values = [weight(HEADS, VALUE, LATENT) for _ in range(copies_for(2 * per_head))]
    outputs = [weight(WIDTH, HEADS * VALUE) for _ in range(copies_for(2 * (per_head + output)))]
    for tokens in ROWS:
        x = normal(tokens, HEADS, LATENT)
        moved = 2.0 * tokens * HEADS * (LATENT + VALUE)
        yield operator_contest(
            linear_per_head, plural(tokens, "token"), [{"x": x, "weight": w} for w in values], 2.0 * per_head + moved,
            2.0 * tokens * per_head, exact=tokens <= 16,
            peers={"torch bmm": lambda a: torch.bmm(a["x"].transpose(0, 1), a["weight"].transpose(1, 2)).transpose(0, 1)},
        )  # fmt: skip
        calls = [{"latent_out": x, "w_uv": v, "o": o} for v, o in zip(values, outputs, strict=False)]
        yield operator_contest(
            attention_output, plural(tokens, "token"), calls, 2.0 * (per_head + output + tokens * (HEADS * LATENT + WIDTH)),
            2.0 * tokens * (per_head + output), exact=tokens <= 16,
        )  # fmt: skip


def int8() -> Iterator[Contest]:
    """An INT8 projection of rows that are quantised as they come."""
    inputs, outputs = WIDTH, BETWEEN
    copies = copies_for(inputs * outputs)
    weights = [torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8) for _ in range(copies)]
    scales = torch.rand(outputs) * 1e-3

    def by_torch(a: Call) -> Tensor:
        codes, steps = quantize_rows(a["x"])
        return (torch._int_mm(codes, a["weight"].t()) * (steps * a["weight_scale"])).to(a["x"].dtype)

    for rows in ROWS:
        x = normal(rows, inputs)
        yield operator_contest(
            int8_matmul, f"{inputs} x {outputs}, {plural(rows, 'row')}",
            [{"x": x, "weight": w, "weight_scale": scales} for w in weights],
            inputs * outputs + 2.0 * rows * (inputs + outputs), 2.0 * rows * inputs * outputs, kind="int8",
            peers={"torch _int_mm": by_torch}, exact=rows <= 16,
        )  # fmt: skip


def dequantisers() -> Iterator[Contest]:
    """One expert's gate and up projections, from codes to bfloat16; what is written counts as read."""
    outputs, inputs = 2 * BETWEEN, WIDTH
    made = [quantize_packed(weight(outputs, inputs)) for _ in range(copies_for(0.5625 * outputs * inputs))]
    calls = [{"packed": packed, "scales": scales, "group_size": GROUP} for packed, scales in made]
    yield operator_contest(int4_dequantize, f"{outputs} x {inputs}", calls, (0.5625 + 2) * outputs * inputs)
