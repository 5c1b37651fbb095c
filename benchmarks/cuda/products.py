"""The contests: products by INT4 and INT8 weights, experts, and the small operators around them, at GLM-5's widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.contest import Contest, copies_for
from glm5_port.dispatch import Operator
from glm5_port.operators import add_rms_norm, expert_mlp, expert_mlp_int4, int4_matmul, int4_quantize, int8_matmul, route_experts
from glm5_port.quant.int4 import quantize_packed

TRITON = "cuda/triton"
INT4_BYTES = 0.5 + 2 / 32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of the work. `GLM5` is the model's; `TINY` shows that the benchmark runs."""

    width: int
    between: int
    experts: int
    top_k: int
    rows: tuple[int, ...]
    tokens: tuple[int, ...]


GLM5 = Sizes(6144, 2048, 256, 8, (1, 16, 64, 512, 4096), (1, 4, 16, 64, 512, 4096))
TINY = Sizes(64, 32, 4, 2, (1, 3), (1, 3))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how large."""

    device: torch.device
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).mul_(std).to(dtype or self.dtype)


def calls(
    operator: Operator, implementation_id: str, facts: Mapping[str, Any], copies: list[list[dict[str, Tensor]]], whole: bool
) -> Callable[..., Any]:
    """An implementation with several copies of its weights: (number of a copy, arguments) -> result."""
    implementation = operator.implementations[implementation_id]
    complete = operator.complete_facts(facts)
    if reasons := implementation.not_supported(**complete):
        raise ValueError("; ".join(reasons))
    made = []
    for parts in copies:
        if implementation.prepare is None:
            names = parts[0]
            made.append({n: parts[0][n] if whole else torch.stack([part[n] for part in parts]) for n in names})
            continue
        preparation = implementation.prepare(complete)
        for number, tensors in enumerate(parts):
            preparation.add(None if whole else number, tensors)
        made.append(preparation.finish())
    return lambda copy, **arguments: implementation.function(**arguments, **made[copy])


def contenders(operator: Operator, names: tuple[str, ...], **given: Any) -> dict[str, Callable[..., Any]]:
    """Those of `names` that accept the work."""
    found = {}
    for name in names:
        try:
            found[name] = calls(operator, name, **given)
        except ValueError as refused:
            message = str(refused)

            def refuse(_: int, message: str = message, **__: Any) -> None:
                raise ValueError(message)

            found[name] = refuse
    return found


def with_arguments(found: dict[str, Callable[..., Any]], **arguments: Any) -> dict[str, Callable[[int], Any]]:
    return {name: lambda copy, call=call: call(copy, **arguments) for name, call in found.items()}


def int4_products(bench: Bench) -> Iterator[Contest]:
    """int4_matmul, groups of 32, beside the same product in bfloat16."""
    for inputs, outputs in ((bench.sizes.width, bench.sizes.between), (bench.sizes.between, bench.sizes.width)):
        copies = copies_for(inputs * outputs * INT4_BYTES) if bench.sizes is GLM5 else 2
        wide = [bench.normal(outputs, inputs, std=inputs**-0.5, seed=n) for n in range(copies)]
        packed = [[dict(zip(("packed", "scales"), quantize_packed(weight), strict=True))] for weight in wide]
        facts = {
            "device_type": bench.device.type,
            "dtype": bench.dtype,
            "width_in": inputs,
            "width_out": outputs,
            "group_size": 32,
        }
        found = contenders(int4_matmul, (TRITON, "torch/eager"), facts=facts, copies=packed, whole=True)
        for rows in bench.sizes.rows:
            x = bench.normal(rows, inputs)
            yield Contest(
                "int4_matmul",
                f"{inputs} x {outputs}, {rows} rows",
                inputs * outputs * INT4_BYTES + 2 * rows * (inputs + outputs),
                2.0 * rows * inputs * outputs,
                {
                    **with_arguments(found, x=x, group_size=32),
                    "torch bf16 product": lambda copy, x=x, wide=wide: torch.nn.functional.linear(x, wide[copy]),
                },
                copies,
            )


def int8_products(bench: Bench) -> Iterator[Contest]:
    inputs, outputs = bench.sizes.width, bench.sizes.between
    copies = copies_for(inputs * outputs) if bench.sizes is GLM5 else 2
    parts = [
        [{"weight": bench.normal(outputs, inputs, std=40.0, seed=n).clamp(-127, 127).to(torch.int8),
          "weight_scale": bench.normal(outputs, dtype=torch.float32).abs()}]
        for n in range(copies)
    ]  # fmt: skip
    facts = {"device_type": bench.device.type, "dtype": bench.dtype, "width_in": inputs, "width_out": outputs}
    found = contenders(int8_matmul, (TRITON, "torch/eager"), facts=facts, copies=parts, whole=True)
    for rows in bench.sizes.rows:
        yield Contest(
            "int8_matmul",
            f"{inputs} x {outputs}, {rows} rows",
            inputs * outputs + 2 * rows * (inputs + outputs),
            rows * inputs * outputs,  # 8-bit products run at twice the rate of bfloat16
            with_arguments(found, x=bench.normal(rows, inputs)),
            copies,
        )


def _routed(bench: Bench, tokens: int) -> dict[str, Tensor]:
    """Tokens whose experts are drawn at random, all different within a token."""
    sizes = bench.sizes
    scores = torch.rand((tokens, sizes.experts), generator=torch.Generator().manual_seed(tokens))
    return {
        "hidden": bench.normal(tokens, sizes.width),
        "route_weights": torch.full((tokens, sizes.top_k), 2.5 / sizes.top_k, device=bench.device),
        "ids": scores.topk(sizes.top_k, dim=1).indices.to(torch.int32).to(bench.device),
    }


def experts(bench: Bench) -> Iterator[Contest]:
    """One layer's experts in bfloat16 and INT4. Tokens meet different experts, so one copy is cold enough."""
    sizes = bench.sizes
    facts = {
        "device_type": bench.device.type, "dtype": bench.dtype, "width": sizes.width, "width_between": sizes.between,
        "experts": sizes.experts, "top_k": sizes.top_k,
    }  # fmt: skip
    wide, packed = [], []
    for n in range(sizes.experts):
        weights = {
            "gate_up": bench.normal(2 * sizes.between, sizes.width, std=sizes.width**-0.5, seed=n),
            "down": bench.normal(sizes.width, sizes.between, std=sizes.between**-0.5, seed=n),
        }
        wide.append(weights)
        quantised = {name: quantize_packed(weight) for name, weight in weights.items()}
        packed.append(
            {f"{name}_{kind}": t for name, made in quantised.items() for kind, t in zip(("packed", "scales"), made, strict=True)}
        )
    in_bf16 = contenders(expert_mlp, (TRITON, "torch/grouped_mm"), facts=facts, copies=[wide], whole=False)
    wide.clear()
    in_int4 = contenders(expert_mlp_int4, (TRITON, "torch/eager"), facts=facts | {"group_size": 32}, copies=[packed], whole=False)
    weights_of_expert = 3 * sizes.width * sizes.between
    for tokens in sizes.tokens:
        routed = _routed(bench, tokens)
        met = int(routed["ids"].unique().numel())
        operations = 2.0 * tokens * sizes.top_k * weights_of_expert
        work = f"{tokens} tokens, {met} of {sizes.experts} experts"
        yield Contest("expert_mlp", work, 2.0 * met * weights_of_expert, operations, with_arguments(in_bf16, **routed), 1)
        yield Contest(
            "expert_mlp_int4", work, INT4_BYTES * met * weights_of_expert, operations,
            with_arguments(in_int4, group_size=32, **routed), 1,
        )  # fmt: skip


def small(bench: Bench) -> Iterator[Contest]:
    """Norms, routing and the quantiser."""
    sizes = bench.sizes
    facts = {"device_type": bench.device.type, "dtype": bench.dtype, "width": sizes.width}
    norm = contenders(
        add_rms_norm, (TRITON, "torch/eager"), facts=facts, copies=[[{"weight": bench.normal(sizes.width)}]], whole=True
    )
    routing = {"top_k": sizes.top_k, "groups": 1, "groups_kept": 1, "renormalise": True}
    gate = {"gate": bench.normal(sizes.experts, sizes.width), "correction_bias": bench.normal(sizes.experts, dtype=torch.float32)}
    router = contenders(
        route_experts, (TRITON, "torch/eager"), facts=facts | routing | {"experts": sizes.experts}, copies=[[gate]], whole=True
    )
    for tokens in sizes.tokens:
        x, residual = bench.normal(tokens, sizes.width), bench.normal(tokens, sizes.width, seed=1)
        moved = 8.0 * tokens * sizes.width
        yield Contest("add_rms_norm", f"{tokens} tokens", moved, 0.0, with_arguments(norm, x=x, residual=residual, eps=1e-5), 1)
        yield Contest(
            "route_experts", f"{tokens} tokens", 2.0 * (tokens + sizes.experts) * sizes.width,
            2.0 * tokens * sizes.experts * sizes.width, with_arguments(router, hidden=x, scale=2.5, **routing), 1,
        )  # fmt: skip
    weight = bench.normal(2 * sizes.between, sizes.width)
    quantiser = contenders(
        int4_quantize, (TRITON, "torch/eager"), facts=facts | {"group_size": 32, "rule": "amax7"}, copies=[[{}]], whole=True
    )
    yield Contest(
        "int4_quantize", f"{2 * sizes.between} x {sizes.width}", weight.numel() * (2 + INT4_BYTES), 0.0,
        with_arguments(quantiser, weight=weight, group_size=32, rule="amax7"), 1,
    )  # fmt: skip


SUITES: dict[str, Callable[[Bench], Iterator[Contest]]] = {
    "int4": int4_products,
    "int8": int8_products,
    "experts": experts,
    "small": small,
}
