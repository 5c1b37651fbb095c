"""Parity cases of `glm5_port.operators.int4`. Cases of bits are exact; products are exact where every sum is of whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glm5_port.operators.int4 import (
    expert_mlp_int4,
    expert_mlp_int4_w4a8,
    int4_dequantize,
    int4_matmul,
    int4_quantize,
    int8_matmul,
)
from glm5_port.quant.int4 import Int4Rule, quantize_packed
from glm5_port.quant.packing import pack_int4
from glm5_port.testing.cases import WIDTH, Case, Make, Sweep, suite

NARROW = (torch.float32, torch.bfloat16)
"""Working dtypes of the widest cases: the gold needs twice the memory of float32."""


def int4_weight(make: Make, *shape: int, group_size: int) -> tuple[Tensor, Tensor]:
    """A random weight of unit gain, quantised by the default rule. The same for every working dtype."""
    return quantize_packed(make.normal(*shape, std=shape[-1] ** -0.5, dtype=torch.bfloat16), Int4Rule("amax7", group_size))


def any_codes(make: Make, *shape: int) -> Tensor:
    """Words of all sixteen codes, -8 among them."""
    return pack_int4(make.integers(*shape, low=-8, high=8, dtype=torch.int8))


def powers_of_two(make: Make, *shape: int) -> Tensor:
    """Scales 1/2, 1 and 2 of both signs, bfloat16."""
    return make.integers(*shape, low=-1, high=2, dtype=torch.bfloat16).exp2() * make.integers(
        *shape, low=0, high=2, dtype=torch.bfloat16
    ).mul(2).sub(1)


def random_grouping(make: Make, groups: int) -> tuple[int, int]:
    """(group size or -1, a width of up to `groups` groups)."""
    group_size = make.one_of(32, 32, 8, 64, 128, 8 * make.size(1, 20), -1)
    return group_size, 8 * make.size(1, 40) if group_size < 0 else group_size * make.size(1, groups)


def random_weight(make: Make) -> dict[str, Any]:
    """Arguments of a quantiser."""
    group_size, width = random_grouping(make, 9)
    leading = [make.size(1, 3)] * make.size(0, 1)
    weight = make.normal(*leading, make.size(0, 40), width, std=make.one_of(0.02, 1.0))
    return {"weight": weight, "group_size": group_size, "rule": make.one_of("amax7", "signed8", "mse")}


# -- weights -------------------------------------------------------------------------------------------------------------


@suite(int4_quantize, rows=("weight",))
def int4_quantize_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, group_size: int = 32, rule: str = "amax7") -> dict[str, Any]:
        return {"weight": make.normal(*shape, std=0.02), "group_size": group_size, "rule": rule}

    def ties(make: Make, rule: str = "amax7") -> dict[str, Any]:
        """Scales are powers of two, and quotients multiples of 1/2: every second one is a tie. float16 holds them too."""
        halves = make.integers(40, 64, low=-14, high=15)
        halves[:, ::32] = 14.0  # amax / 7 = 2 in halves; signed8 has other ties
        return {"weight": halves * make.integers(40, 1, low=-3, high=4).exp2(), "group_size": 32, "rule": rule}

    def outside(make: Make) -> dict[str, Any]:
        """Zeros, groups below 2^-110 where the dtype holds them, and what cannot be quantised."""
        made = arguments(make, 9, 64)
        weight = made["weight"]
        weight[0] = 0.0
        weight[1, :32] = -0.0
        weight[2] *= 2.0**-106
        weight[3] *= 2.0**-120
        weight[4, 5] = float("nan")
        weight[5, 6] = float("inf")
        weight[6, 63] = -float("inf")
        weight[7] *= torch.finfo(make.dtype).tiny
        return made

    def bits(make: Make, patterns: Tensor, rule: str) -> dict[str, Any]:
        weight = patterns.to(torch.int16).view(torch.bfloat16).to(make.dtype)
        return {"weight": weight, "group_size": -1, "rule": rule}

    def all_mantissas(make: Make, rule: str = "amax7") -> dict[str, Any]:
        """Every mantissa of amax, each with every magnitude from amax / 64 up, in both signs."""
        amax = (127 << 7) + torch.arange(128).unsqueeze(1)
        magnitudes = amax - torch.arange(6 * 128)
        return bits(make, torch.cat((magnitudes, magnitudes + (1 << 15)), dim=1), rule)

    def every_amax(make: Make) -> dict[str, Any]:
        """All bfloat16 magnitudes, infinity and NaN included, one in each row."""
        return bits(make, torch.arange(1 << 15).unsqueeze(1) * (torch.arange(8) == 5), "amax7")

    yield Case("all_mantissas", all_mantissas, exact=True, dtypes=NARROW)
    yield Case("all_mantissas_signed8", lambda make: all_mantissas(make, "signed8"), exact=True, dtypes=NARROW)
    yield Case("every_amax", every_amax, exact=True, dtypes=NARROW)
    yield Case("no_rows", lambda make: arguments(make, 0, 64), exact=True)
    yield Case("one_group", lambda make: arguments(make, 1, 32), exact=True)
    yield Case("matrix", lambda make: arguments(make, 48, 256), exact=True)
    yield Case("experts", lambda make: arguments(make, 3, 16, 96), exact=True)
    yield Case("group_8", lambda make: arguments(make, 7, 40, group_size=8), exact=True)
    yield Case("group_64", lambda make: arguments(make, 7, 192, group_size=64), exact=True)
    yield Case("group_128", lambda make: arguments(make, 7, 256, group_size=128), exact=True)
    yield Case("per_channel", lambda make: arguments(make, 7, 200, group_size=-1), exact=True)
    yield Case("ties", lambda make: ties(make), exact=True)
    yield Case("outside_the_range", outside, exact=True)
    yield Case("signed8", lambda make: arguments(make, 20, 128, rule="signed8"), exact=True)
    yield Case("signed8_ties", lambda make: ties(make, "signed8"), exact=True)
    yield Case("mse", lambda make: arguments(make, 20, 128, rule="mse"), exact=True)
    yield Case("mse_per_channel", lambda make: arguments(make, 20, 128, group_size=-1, rule="mse"), exact=True)
    yield Case("glm5_gate", lambda make: arguments(make, 32, 6144), exact=True, tags=WIDTH)
    yield Case("glm5_down", lambda make: arguments(make, 64, 2048), exact=True, tags=WIDTH)
    yield Sweep(random_weight, exact=True)


BITS_ONLY = (torch.bfloat16,)
"""Nothing in the arguments is of the working dtype."""


@suite(int4_dequantize, rows=("packed", "scales"))
def int4_dequantize_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, group_size: int = 32) -> dict[str, Any]:
        packed, scales = int4_weight(make, *shape, group_size=group_size)
        return {"packed": packed, "scales": scales, "group_size": group_size}

    def every_code(make: Make) -> dict[str, Any]:
        """All sixteen codes by scales of every mantissa and both signs."""
        scales = ((120 << 7) + torch.arange(128)).to(torch.int16).view(torch.bfloat16)
        codes = torch.arange(-8, 8, dtype=torch.int8).expand(256, 16)
        return {"packed": pack_int4(codes), "scales": torch.cat((scales, -scales)).unsqueeze(1), "group_size": -1}

    def not_a_number(make: Make) -> dict[str, Any]:
        made = arguments(make, 4, 64)
        made["scales"][1, 1] = float("nan")
        return made

    yield Case("no_rows", lambda make: arguments(make, 0, 64), exact=True, dtypes=BITS_ONLY)
    yield Case("one_group", lambda make: arguments(make, 1, 32), exact=True, dtypes=BITS_ONLY)
    yield Case("experts", lambda make: arguments(make, 3, 16, 96), exact=True, dtypes=BITS_ONLY)
    yield Case("group_8", lambda make: arguments(make, 7, 40, group_size=8), exact=True, dtypes=BITS_ONLY)
    yield Case("group_128", lambda make: arguments(make, 7, 256, group_size=128), exact=True, dtypes=BITS_ONLY)
    yield Case("per_channel", lambda make: arguments(make, 7, 200, group_size=-1), exact=True, dtypes=BITS_ONLY)
    yield Case("every_code", every_code, exact=True, dtypes=BITS_ONLY)
    yield Case("not_a_number", not_a_number, exact=True, dtypes=BITS_ONLY)
    yield Case("glm5_gate", lambda make: arguments(make, 32, 6144), exact=True, tags=WIDTH, dtypes=BITS_ONLY)

    def random(make: Make) -> dict[str, Any]:
        group_size, width = random_grouping(make, 9)
        return arguments(make, *[make.size(1, 3)] * make.size(0, 1), make.size(0, 40), width, group_size=group_size)

    yield Sweep(random, exact=True, dtypes=BITS_ONLY)


# -- one product ---------------------------------------------------------------------------------------------------------


@suite(int4_matmul, rows=("x",))
def int4_matmul_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, out: int, group_size: int = 32) -> dict[str, Any]:
        packed, scales = int4_weight(make, out, shape[-1], group_size=group_size)
        return {"x": make.normal(*shape), "packed": packed, "scales": scales, "group_size": group_size}

    def integers(make: Make) -> dict[str, Any]:
        return {
            "x": make.integers(5, 64, low=-2, high=3),
            "packed": any_codes(make, 9, 64),
            "scales": powers_of_two(make, 9, 2),
            "group_size": 32,
        }

    def rounded_weight(make: Make) -> dict[str, Any]:
        """The product by the identity shows each weight: bf16(q * s), not q * s."""
        made = arguments(make, 64, 64, out=16)
        return {**made, "x": torch.eye(64, dtype=make.dtype)}

    def views(make: Make) -> dict[str, Any]:
        made = arguments(make, 4, 64, out=48)
        return {**made, "packed": made["packed"][::2], "scales": made["scales"][::2]}

    yield Case("no_tokens", lambda make: arguments(make, 0, 64, out=48))
    yield Case("one_token", lambda make: arguments(make, 1, 64, out=48))
    yield Case("one_output", lambda make: arguments(make, 5, 96, out=1))
    yield Case("three_dims", lambda make: arguments(make, 2, 3, 64, out=48))
    yield Case("group_8", lambda make: arguments(make, 5, 72, out=33, group_size=8))
    yield Case("group_128", lambda make: arguments(make, 5, 256, out=33, group_size=128))
    yield Case("per_channel", lambda make: arguments(make, 5, 200, out=33, group_size=-1))
    yield Case("strided", lambda make: {**arguments(make, 4, 64, out=48), "x": make.normal(4, 128)[:, ::2]})
    yield Case("weight_is_a_view", views)
    yield Case("not_finite", lambda make: {**arguments(make, 3, 64, out=48), "x": make.with_non_finite(3, 64)})
    yield Case("integers", integers, exact=True)
    yield Case("identity", rounded_weight, exact=True, dtypes=NARROW)
    yield Case("glm5_gate", lambda make: arguments(make, 3, 6144, out=256), tags=WIDTH)
    yield Case("glm5_down", lambda make: arguments(make, 3, 2048, out=512), tags=WIDTH)

    def random(make: Make) -> dict[str, Any]:
        group_size, width = random_grouping(make, 9)
        tokens = make.one_of(1, make.size(0, 20), make.size(0, 150))
        return arguments(make, tokens, width, out=make.size(1, 200), group_size=group_size)

    yield Sweep(random)


@suite(int8_matmul, rows=("x",))
def int8_matmul_cases() -> Iterator[Case | Sweep]:
    def arguments(make: Make, *shape: int, out: int) -> dict[str, Any]:
        return {
            "x": make.normal(*shape),
            "weight": make.integers(out, shape[-1], low=-128, high=128, dtype=torch.int8),
            "weight_scale": make.uniform(out, low=0.5, high=2.0, dtype=torch.float32) * shape[-1] ** -0.5 / 73,
        }

    def integers(make: Make) -> dict[str, Any]:
        """The largest magnitude is 127 in each row, so that the scale is 1 and every code is its number."""
        x = make.integers(6, 64, low=-2, high=3)
        x[:, 9] = 127.0
        weight = make.integers(9, 64, low=-1, high=2, dtype=torch.int8)
        return {"x": x, "weight": weight, "weight_scale": make.integers(9, low=-1, high=2, dtype=torch.float32).exp2()}

    def ties(make: Make) -> dict[str, Any]:
        """Halves: every second number lies between two codes."""
        x = make.integers(40, 64, low=-20, high=21) / 2
        x[:, 9] = -127.0
        weight = make.integers(9, 64, low=-1, high=2, dtype=torch.int8)
        return {"x": x, "weight": weight, "weight_scale": make.zeros(9, dtype=torch.float32) + 1}

    def quiet_rows(make: Make) -> dict[str, Any]:
        made = arguments(make, 4, 64, out=48)
        made["x"][1] = 0.0
        made["x"][2] *= 2.0**-110
        return made

    def largest(make: Make) -> dict[str, Any]:
        """Sums near the end of 32 bits."""
        made = arguments(make, 2, 16384, out=3)
        made["weight"].fill_(-128)
        return {**made, "x": make.zeros(2, 16384) + 3.0}

    yield Case("no_tokens", lambda make: arguments(make, 0, 64, out=48))
    yield Case("one_token", lambda make: arguments(make, 1, 64, out=48))
    yield Case("odd_widths", lambda make: arguments(make, 5, 77, out=33))
    yield Case("three_dims", lambda make: arguments(make, 2, 3, 64, out=48))
    yield Case("strided", lambda make: {**arguments(make, 4, 64, out=48), "x": make.normal(4, 128)[:, ::2]})
    yield Case("large_activations", lambda make: {**arguments(make, 4, 64, out=48), "x": make.normal(4, 64, std=1000.0)})
    yield Case("quiet_rows", quiet_rows)
    yield Case("not_finite", lambda make: {**arguments(make, 3, 64, out=48), "x": make.with_non_finite(3, 64)})
    yield Case("integers", integers, exact=True)
    yield Case("ties", ties, exact=True)
    yield Case("large_sums", largest, dtypes=NARROW)
    yield Sweep(lambda make: arguments(make, make.one_of(1, make.size(0, 80)), make.size(1, 300), out=make.size(1, 200)))
    yield Case("glm5_query_down", lambda make: arguments(make, 3, 6144, out=2048), tags=WIDTH)
    yield Case("glm5_output", lambda make: arguments(make, 2, 16384, out=512), tags=WIDTH)


# -- experts -------------------------------------------------------------------------------------------------------------


def expert_arguments(
    make: Make, tokens: int, experts: int = 8, width: int = 64, between: int = 32, choices: int = 3, low: int = 0,
    high: int = -1, group_size: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both expert operators."""
    gate_up_packed, gate_up_scales = int4_weight(make, experts, 2 * between, width, group_size=group_size)
    down_packed, down_scales = int4_weight(make, experts, width, between, group_size=group_size)
    return {
        "hidden": make.normal(tokens, width),
        "route_weights": make.uniform(tokens, choices, low=0.1, dtype=torch.float32),
        "ids": make.integers(tokens, choices, low=low, high=experts if high < 0 else high, dtype=torch.int32),
        "gate_up_packed": gate_up_packed,
        "gate_up_scales": gate_up_scales,
        "down_packed": down_packed,
        "down_scales": down_scales,
        "group_size": group_size,
    }


def random_experts(make: Make) -> dict[str, Any]:
    """Arguments of both expert operators: few or many tokens, ids beyond the experts."""
    group_size = make.one_of(32, 8, 64, -1)
    multiple = 8 if group_size < 0 else group_size
    sizes = {"width": multiple * make.size(1, 5), "between": multiple * make.size(1, 5), "choices": make.size(1, 4)}
    experts, tokens = make.size(1, 20), make.one_of(1, make.size(0, 12), make.size(0, 150))
    ids = {"low": make.one_of(0, -2), "high": experts + make.one_of(0, 3)}
    return expert_arguments(make, tokens, experts, **sizes, **ids, group_size=group_size)


def expert_cases() -> Iterator[Case]:
    """For both expert operators."""
    arguments = expert_arguments

    def with_ids(make: Make, ids: list[list[int]]) -> dict[str, Any]:
        return {**arguments(make, len(ids), choices=len(ids[0])), "ids": torch.tensor(ids, dtype=torch.int32)}

    def unread_weights(make: Make) -> dict[str, Any]:
        made = arguments(make, 9, low=-3, high=12)
        outside = (made["ids"] < 0) | (made["ids"] >= 8)
        return {**made, "route_weights": made["route_weights"].masked_fill(outside, float("nan"))}

    def bad_and_quiet_tokens(make: Make) -> dict[str, Any]:
        made = arguments(make, 5)
        made["hidden"][2, 7] = float("nan")
        made["hidden"][3] = 0.0
        return made

    def every_code(make: Make) -> dict[str, Any]:
        """Codes down to -8 and scales of both signs, as other quantisers make them."""
        made = arguments(make, 7)
        for name in ("gate_up", "down"):
            rows, width = made[f"{name}_packed"].shape[1], made[f"{name}_packed"].shape[2] * 8
            made[f"{name}_packed"] = any_codes(make, 8, rows, width)
            made[f"{name}_scales"] = powers_of_two(make, 8, rows, width // 32) * 2.0**-6
        return made

    yield Case("no_tokens", lambda make: arguments(make, 0))
    yield Case("one_token", lambda make: arguments(make, 1))
    yield Case("group_8", lambda make: arguments(make, 13, experts=5, width=72, between=40, choices=2, group_size=8))
    yield Case("group_64", lambda make: arguments(make, 6, width=128, between=64, group_size=64))
    yield Case("per_channel", lambda make: arguments(make, 6, width=72, between=40, group_size=-1))
    yield Case("every_code", every_code)
    yield Case("more_experts_than_rows", lambda make: arguments(make, 3, experts=64))
    yield Case("many_rows_per_expert", lambda make: arguments(make, 150, experts=4))
    yield Case("one_expert", lambda make: arguments(make, 7, experts=1, choices=1))
    yield Case("some_experts_get_nothing", lambda make: arguments(make, 30, experts=16, low=5, high=9))
    yield Case("ids_out_of_range", lambda make: arguments(make, 30, low=-9, high=20))
    yield Case("all_ids_out_of_range", lambda make: with_ids(make, [[-1, 8], [8, 2**31 - 1], [-(2**31), -1]]))
    yield Case("an_id_twice", lambda make: with_ids(make, [[3, 3, 1], [0, 7, 0]]))
    yield Case("unread_weights", unread_weights)
    yield Case("bad_and_quiet_tokens", bad_and_quiet_tokens)
    yield Case(
        "glm5_experts",
        lambda make: arguments(make, 3, experts=2, width=6144, between=2048, choices=2),
        tags=WIDTH,
        dtypes=NARROW,
    )


@suite(expert_mlp_int4, rows=("hidden", "route_weights", "ids"))
def expert_w4a16_cases() -> Iterator[Case | Sweep]:
    yield from expert_cases()
    yield Sweep(random_experts)


@suite(expert_mlp_int4_w4a8, rows=("hidden", "route_weights", "ids"))
def expert_w4a8_cases() -> Iterator[Case | Sweep]:
    def in_groups(case: Case) -> Case:
        def arguments(make: Make) -> dict[str, Any]:
            made = case.build(make)
            return {**made, "activation_group_size": made["group_size"]}

        return replace(case, name=f"{case.name}_in_groups", build=arguments)

    def unequal_groups(make: Make) -> dict[str, Any]:
        """Groups of very different sizes, some of zeros or below 2^-100: one scale for a row would lose most of them."""
        made = cases["one_expert"].build(make)
        made["hidden"][:, 32:] *= 2.0**-9
        made["hidden"][1, :32] = 0.0
        made["hidden"][2, 32:] *= 2.0**-110
        made["hidden"][3, :32] *= 2.0**-110
        made["hidden"][4, 40] = float("inf")
        return made

    cases = {case.name: case for case in expert_cases()}
    yield from cases.values()
    for name in (
        "no_tokens", "one_token", "group_8", "group_64", "every_code", "many_rows_per_expert", "some_experts_get_nothing",
        "ids_out_of_range", "bad_and_quiet_tokens", "glm5_experts",
    ):  # fmt: skip
        yield in_groups(cases[name])
    yield in_groups(Case("unequal_groups", unequal_groups))

    def random(make: Make) -> dict[str, Any]:
        made = random_experts(make)
        return {**made, "activation_group_size": made["group_size"]} if made["group_size"] > 0 and make.size(0, 1) else made

    yield Sweep(random)
