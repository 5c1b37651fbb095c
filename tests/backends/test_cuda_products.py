"""The CUDA backend's INT4 weight layout, tiles and reasons: what holds without a GPU and without Triton's interpreter. That the
kernels compute their operators is held by tests/interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.backends.cuda.experts import (
    TiledExperts,
    expert_mlp_int4_triton,
    expert_mlp_int4_w4a8_triton,
    expert_mlp_triton,
)
from glm5_port.backends.cuda.linear import (
    VENDOR,
    attention_output_triton,
    gated_mlp_triton,
    linear_per_head_triton,
)
from glm5_port.backends.cuda.matmul import (
    PROGRAMS,
    TILE,
    TiledWeight,
    check_width,
    int4_matmul_triton,
    int4_tiles,
    int8_matmul_triton,
    segments_of,
    tile_words,
)
from glm5_port.backends.cuda.triton_support import assume, recording
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.int4 import expert_mlp_int4, expert_mlp_int4_w4a8, int4_matmul, int4_quantize, int8_matmul
from glm5_port.operators.linear import linear, linear_per_head
from glm5_port.operators.moe import expert_mlp, route_experts
from glm5_port.operators.norm import rms_norm
from glm5_port.quant.packing import pack_int4
from glm5_port.registry import OPERATORS
from glm5_port.selection import decide

SMALL, LARGE = (8, 9), (9, 0)


def codes(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@pytest.mark.parametrize("width", [8, 72, 128, 136, 384])
def test_nibbles_i_and_i_plus_4_of_word_m_are_two_inputs_side_by_side(width: int) -> None:
    canonical = codes(3, width)
    words = tile_words(pack_int4(canonical))
    tiles = -(-width // TILE)
    assert words.shape == (tiles, 3, 16)
    for k in range(tiles * TILE):
        tile, run, pair, second = k // TILE, k % TILE // 32, k % 32 // 2, k % 2
        stored = (words[tile, :, pair] >> (4 * (run + 4 * second))) & 15
        expected = canonical[:, k].to(torch.int32) + 8 if k < width else torch.full((3,), 8, dtype=torch.int32)
        assert torch.equal(stored, expected)


def test_experts_are_tiled_one_by_one() -> None:
    packed = pack_int4(codes(2, 5, 264))
    assert torch.equal(tile_words(packed), torch.stack([tile_words(expert) for expert in packed]))


def test_prepared_weights_take_what_canonical_ones_take_plus_the_padding() -> None:
    preparation = TiledWeight({"group_size": 32})
    preparation.add(None, {"packed": pack_int4(codes(48, 512)), "scales": torch.ones(48, 16, dtype=torch.bfloat16)})
    made = preparation.finish()
    assert {name: tuple(t.shape) for name, t in made.items() if isinstance(t, Tensor)} == {
        "words": (4, 48, 16),
        "group_scales": (16, 48),
    }
    assert sum(t.nbytes for t in made.values() if isinstance(t, Tensor)) == 48 * 512 // 2 + 48 * 16 * 2


def test_a_missing_expert_is_named() -> None:
    preparation = TiledExperts({"experts": 3, "group_size": -1})
    one = {
        "gate_up_packed": pack_int4(codes(16, 64)),
        "gate_up_scales": torch.ones(16, 1, dtype=torch.bfloat16),
        "down_packed": pack_int4(codes(64, 8)),
        "down_scales": torch.ones(64, 1, dtype=torch.bfloat16),
    }
    preparation.add(1, one)
    with pytest.raises(InputError, match=r"experts missing: \[0, 2\]"):
        preparation.finish()
    with pytest.raises(InputError, match="part 3 arrived; expected experts 0 to 2"):
        preparation.add(3, one)


def test_rows_of_another_width_are_refused() -> None:
    check_width("int4_matmul", 200, 256)
    with pytest.raises(InputError, match="rows of 257 numbers, and a weight of 129 to 256 inputs"):
        check_width("int4_matmul", 257, 256)


@pytest.mark.parametrize("tiles", [1, 7, 8, 24, 64])
@pytest.mark.parametrize("blocks", [1, 8, 64, 2420])
def test_segments_are_equally_long_and_not_too_many(tiles: int, blocks: int) -> None:
    segment, segments = segments_of(tiles, blocks)
    assert segment * segments == tiles
    assert segments == 1 or segments * blocks <= PROGRAMS


@pytest.mark.parametrize("card", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_tiles_grow_with_the_rows_and_end(card: tuple[int, int], dtype: torch.dtype) -> None:
    with assume(card):
        rows = [int4_tiles(count, dtype).rows for count in (1, 16, 17, 64, 4096)]
    assert rows == sorted(rows)
    assert rows[0] == 16
    assert rows[-1] <= 128


REASONS: list[tuple[Operator, dict[str, Any], str]] = [
    (int4_matmul, {"width_in": 64, "width_out": 8, "group_size": 8}, "groups of a multiple of 32 weights"),
    (int4_quantize, {"width": 64, "group_size": 32, "rule": "mse"}, "amax7 and signed8, not mse"),
    (int4_quantize, {"width": 32768, "group_size": -1, "rule": "amax7"}, "at most 16384 weights, not 32768"),
    (int8_matmul, {"width_in": 2**17, "width_out": 8}, "fewer than 131072 inputs, not 131072"),
    (rms_norm, {"width": 2**15 + 1}, "at most 32768 numbers, not 32769"),
    (expert_mlp, {"width": 64, "width_between": 32, "experts": 1025, "top_k": 8}, "at most 1024 experts, not 1025"),
    (
        expert_mlp_int4,
        {"width": 64, "width_between": 32, "experts": 4, "top_k": 8, "group_size": 24},
        "multiple of 32 weights, or whole rows (-1), not of 24",
    ),
    (
        expert_mlp_int4_w4a8,
        {"width": 64, "width_between": 32, "experts": 4, "top_k": 8, "group_size": 32, "activation_group_size": 32},
        "one scale a row (activation group size -1), not groups of 32",
    ),
    (
        route_experts,
        {"width": 64, "experts": 2048, "top_k": 8, "groups": 1, "groups_kept": 1, "renormalise": True},
        "at most 1024 experts, not 2048",
    ),
]


@pytest.mark.parametrize(("operator", "facts", "reason"), REASONS, ids=lambda value: getattr(value, "name", None))
def test_what_a_kernel_cannot_do_it_says(operator: Operator, facts: dict[str, Any], reason: str) -> None:
    complete = operator.complete_facts({"device_type": "cuda", "dtype": torch.bfloat16} | facts)
    assert reason in "\n".join(operator.implementations["cuda/triton"].not_supported(**complete))


@pytest.mark.parametrize("operator", [int4_matmul, expert_mlp, expert_mlp_int4, route_experts, rms_norm])
def test_float64_is_left_to_the_portable(operator: Operator) -> None:
    facts: dict[str, Any] = dict.fromkeys(operator.facts, 64) | {"device_type": "cuda", "dtype": torch.float64}
    reasons = operator.implementations["cuda/triton"].not_supported(**operator.complete_facts(facts))
    assert any("not float64" in reason for reason in reasons)


def test_products_of_the_vendor_go_first_and_the_record_says_why(set_flags: Callable[..., None]) -> None:
    facts = linear.complete_facts({"device_type": "cuda", "dtype": torch.bfloat16, "width_in": 6144, "width_out": 2048})
    record = decide(linear, facts, as_backend="cuda")
    assert record.chosen is not None and record.chosen.id == "torch/eager"
    (refused,) = (candidate for candidate in record.candidates if candidate.id == "cuda/triton")
    assert refused.reasons == (f"outranked by torch/eager: {VENDOR}",)
    set_flags(GLM5_PORT_STRICT="1")
    strict = decide(linear, facts, as_backend="cuda")
    assert strict.chosen is not None and strict.chosen.id == "cuda/triton"


def test_rows_that_do_not_fit_a_weight_are_refused() -> None:
    with pytest.raises(InputError, match=r"linear on cuda: rows \(3, 63\) torch.float32 and a weight \(5, 64\)"):
        linear.implementations["cuda/triton"].function(torch.zeros(3, 63), torch.zeros(5, 64))
    with pytest.raises(InputError, match=r"torch.bfloat16 and a weight \(5, 64\) torch.float32"):
        linear.implementations["cuda/triton"].function(torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(5, 64))
    with pytest.raises(InputError, match=r"rows \(4, 2, 8\) torch.float32 and a weight \(3, 5, 8\)"):
        linear_per_head.implementations["cuda/triton"].function(torch.zeros(4, 2, 8), torch.zeros(3, 5, 8))


SHAPES: list[tuple[str, tuple[Any, ...], str]] = [
    (
        "rms_norm",
        (torch.zeros(3, 8), torch.zeros(7), 1e-5),
        r"rms_norm on cuda: weight \(7,\) does not fit; supported here: \(8,\)",
    ),
    ("int8_matmul", (torch.zeros(3, 8), torch.zeros(5, 9, dtype=torch.int8), torch.zeros(5)), r"x \(3, 8\) does not fit"),
    (
        "expert_mlp",
        (torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(4, 12, 8), torch.zeros(4, 9, 6)),
        r"hidden \(3, 8\) does not fit; supported here: \(3, 9\)",
    ),
    (
        "expert_mlp",
        (torch.zeros(3, 8), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)),
        r"ids \(2, 2\) does not fit; supported here: \(3, 2\)",
    ),
]


@pytest.mark.parametrize(
    ("operator", "arguments", "message"), SHAPES, ids=[f"{row[0]}-{place}" for place, row in enumerate(SHAPES)]
)
def test_shapes_that_a_kernel_would_read_beside_are_refused(operator: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message), torch.no_grad():
        OPERATORS[operator].implementations["cuda/triton"].function(*arguments)


# -- many rows ---------------------------------------------------------------------------------------------------------

WIDE, BETWEEN, EXPERTS, ROWS = 6144, 2048, 2, 512
HEADS, NOPE, VALUE, LATENT = 64, 192, 256, 512
"""Of cases at GLM-5 widths, tests/backends/test_triton.py compiles the tiles of few rows; these are the ones of many."""


def launch_everything(dtype: torch.dtype) -> None:
    """All products of many rows, with weights that hold anything."""

    def words(*shape: int) -> Tensor:
        return torch.empty((*shape, 16), dtype=torch.int32)

    def scales(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    x, ids = torch.empty(ROWS, WIDE, dtype=dtype), torch.zeros(ROWS, 2, dtype=torch.int32)
    int4_matmul_triton(x, group_size=32, words=words(48, BETWEEN), group_scales=scales(192, BETWEEN))
    int8_matmul_triton(x, torch.empty(BETWEEN, WIDE, dtype=torch.int8), torch.empty(BETWEEN))
    int4_experts = {
        "group_size": 32,
        "gate_up_words": words(EXPERTS, 48, 2 * BETWEEN),
        "gate_up_group_scales": scales(EXPERTS, 192, 2 * BETWEEN),
        "down_words": words(EXPERTS, 16, WIDE),
        "down_group_scales": scales(EXPERTS, 64, WIDE),
    }
    expert_mlp_int4_triton(x, torch.empty(ROWS, 2), ids, **int4_experts)
    expert_mlp_int4_w4a8_triton(x, torch.empty(ROWS, 2), ids, **int4_experts)
    weights = (torch.empty(EXPERTS, 2 * BETWEEN, WIDE, dtype=dtype), torch.empty(EXPERTS, WIDE, BETWEEN, dtype=dtype))
    expert_mlp_triton(x, torch.empty(ROWS, 2), ids, *weights)
    gated_mlp_triton(x, *(weight[0] for weight in weights))
    key_rows = torch.empty(HEADS, NOPE, LATENT, dtype=dtype).transpose(1, 2)  # as they lie in kv_b, transposed
    linear_per_head_triton(torch.empty(ROWS, HEADS, NOPE, dtype=dtype), key_rows)
    value_rows, output = torch.empty(HEADS, VALUE, LATENT, dtype=dtype), torch.empty(WIDE, HEADS * VALUE, dtype=dtype)
    attention_output_triton(torch.empty(ROWS, HEADS, LATENT, dtype=dtype), value_rows, output)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 89, 90, 100, 120])
def test_tiles_of_many_rows_compile(target: int) -> None:
    pytest.importorskip("triton", reason="NOT TESTED: triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tests.backends.triton_compile import SHARED_MEMORY, TENSOR_MEMORY, compile_launch, distinct, signature_of

    with assume(divmod(target, 10)), recording() as launches:
        launch_everything(torch.bfloat16)
    products = [launch for launch in distinct(launches) if "num_stages" in launch.options]
    assert len(products) == 13
    for launch in products:
        taken = compile_launch(launch, target)
        assert taken.stack == 0 and taken.shared <= SHARED_MEMORY[target] and taken.tensor <= TENSOR_MEMORY, str(taken)
        made = compile(
            ASTSource(launch.kernel, *signature_of(launch)), target=GPUTarget("cuda", target, 32), options=launch.options
        )
        assert re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", made.asm["ptx"]), f"{taken}: it multiplies nothing"
