"""The native INT4 products: layout, every tail, the same bits in any batch and on any number of threads, for every instruction
set of this machine. That they compute the operators at GLM-5's widths is held by parity (tests/parity)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.backends.cpu.experts import expert_mlp_native
from glm5_port.backends.cpu.matmul import int4_matmul_native, linear_native, panel_shapes
from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.operators.int4 import expert_mlp_int4, expert_mlp_int4_w4a8, int4_matmul, int8_matmul
from glm5_port.operators.linear import gated_mlp, linear
from glm5_port.operators.moe import expert_mlp
from glm5_port.preparation import CanonicalWeights
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, dequantize, quantize_packed
from glm5_port.quant.packing import pack_int4
from glm5_port.testing.cases import WIDTH
from glm5_port.testing.parity import run

HERE = [isa for isa in extension.MATRIX if not extension.isa_missing(isa)]
DTYPES = [torch.float32, torch.bfloat16]
OPERATORS = [int4_matmul, int8_matmul, linear, gated_mlp, expert_mlp, expert_mlp_int4, expert_mlp_int4_w4a8]

pytestmark = pytest.mark.skipif(not HERE, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")
each_isa = pytest.mark.parametrize("isa", HERE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture
def pin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets the kernels of one instruction set run."""

    def apply(isa: str) -> None:
        monkeypatch.setenv(flags.CPU_ISA.name, isa)
        flags.reset()

    yield apply
    monkeypatch.undo()
    flags.reset()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(*shape: int, group_size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    return quantize_packed(random(*shape, seed=seed) * shape[-1] ** -0.5, Int4Rule("amax7", group_size))


def product(isa: str, packed: Tensor, scales: Tensor, group_size: int = 32) -> Callable[[Tensor], Tensor]:
    implementation = int4_matmul.implementations[f"cpu/{isa}"]
    assert implementation.prepare is not None
    preparation = implementation.prepare({"group_size": group_size})
    preparation.add(None, {"packed": packed, "scales": scales})
    prepared = preparation.finish()
    return lambda x: implementation.function(x, group_size=group_size, **prepared)


def experts(
    isa: str,
    count: int,
    width: int,
    between: int,
    *,
    group_size: int = 32,
    operator: Operator = expert_mlp_int4,
    **more: int,
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, Any]]:
    """The mixture, and the canonical weights it was prepared from, with the arguments that it is called with."""
    weights: dict[str, Any] = {"group_size": group_size, **more}
    for name, shape, seed in (("gate_up", (count, 2 * between, width), 2), ("down", (count, width, between), 3)):
        weights[f"{name}_packed"], weights[f"{name}_scales"] = weight(*shape, group_size=group_size, seed=seed)
    implementation = operator.implementations[f"cpu/{isa}"]
    assert implementation.prepare is not None
    preparation = implementation.prepare({"experts": count, "group_size": group_size, "width_between": between})
    for expert in range(count):
        preparation.add(expert, {name: weights[name][expert] for name in operator.weights})
    prepared = preparation.finish()
    return lambda *call: implementation.function(*call, group_size=group_size, **more, **prepared), weights


def routing(tokens: int, choices: int, count: int, seed: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, count + 1, (tokens, choices), generator=generator, dtype=torch.int32)
    return torch.rand(tokens, choices, generator=generator), ids


def error(ours: Tensor, gold: Tensor) -> float:
    return float((ours.double() - gold).norm() / gold.norm().clamp_min(1e-30))


# -- one product ---------------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("operator", OPERATORS)
def test_parity(pin: Callable[[str], None], isa: str, operator: Operator) -> None:
    pin(isa)
    results = run([operator.implementations[f"cpu/{isa}"]], dtypes=DTYPES, without_tags=WIDTH)
    assert [result for result in results if result.status != "passed"] == []
    assert len(results) >= 14


@each_isa
@each_dtype
def test_the_identity_shows_every_code_by_every_mantissa(isa: str, dtype: torch.dtype) -> None:
    """bf16(q * s) bit for bit, for scales of both signs and of very different sizes, and NaN."""
    mantissas = torch.arange(128, dtype=torch.int16)
    scales = torch.cat([((exponent << 7) + mantissas).view(torch.bfloat16) for exponent in (40, 127, 200)])
    scales = torch.cat((scales, -scales, torch.full((1,), float("nan"), dtype=torch.bfloat16))).unsqueeze(1)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(scales.shape[0], 1)
    shown = product(isa, pack_int4(codes), scales, PER_CHANNEL)(torch.eye(16, dtype=dtype)).T
    expected = dequantize(codes, scales)
    finite = expected[:-1]
    assert torch.equal(shown[:-1].to(torch.bfloat16), finite)
    assert shown[-1].isnan().all()


@each_isa
@each_dtype
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 63, 65, 130])
@pytest.mark.parametrize(
    ("width", "group_size"), [(32, 32), (96, 32), (256, 128), (40, 8), (200, PER_CHANNEL), (576, 64), (1120, 32), (72, 24)]
)
def test_tails(isa: str, dtype: torch.dtype, outputs: int, width: int, group_size: int) -> None:
    if isa == "scalar" and outputs not in (1, 17, 65):
        outputs = 33  # it has no panels of its own to go wrong
    packed, scales = weight(outputs, width, group_size=group_size)
    compute = product(isa, packed, scales, group_size)
    for rows in (0, 1, 3, 5, 7, 13):
        x = random(rows, width, dtype=dtype)
        y = compute(x)
        gold = int4_matmul.reference(x.double(), packed, scales, group_size=group_size)
        assert y.shape == (rows, outputs)
        assert y.dtype == dtype
        assert error(y, gold) < (1e-6 if dtype == torch.float32 else 4e-3)  # half a step of bfloat16


@each_isa
@each_dtype
def test_a_row_has_the_same_bits_in_every_batch(isa: str, dtype: torch.dtype) -> None:
    rows = 270 if isa != "scalar" else 9
    x, compute = random(rows, 544, dtype=dtype), product(isa, *weight(72, 544))
    together = compute(x)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 64):
        assert torch.equal(compute(x[:count]), together[:count])
    assert torch.equal(compute(x[-1:]), together[-1:])


@each_isa
@each_dtype
def test_the_same_bits_on_any_number_of_threads(threads: Callable[[int], None], isa: str, dtype: torch.dtype) -> None:
    compute, results = product(isa, *weight(200, 320)), []
    mixture, _ = experts(isa, 5, 64, 96)
    x, hidden = random(37, 320, dtype=dtype), random(37, 64, dtype=dtype)
    for count in (1, 2, 3, 4):
        threads(count)
        results.append((compute(x), mixture(hidden, *routing(37, 3, 5))))
    for y, mixed in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(mixed, results[0][1])


@each_isa
@each_dtype
def test_rows_may_lie_anywhere(isa: str, dtype: torch.dtype) -> None:
    packed, scales = weight(48, 96)
    compute, memory = product(isa, packed, scales), random(5000, dtype=dtype)
    for x in (memory[1 : 1 + 480].view(5, 96), memory.as_strided((5, 96), (203, 1), 3), memory.as_strided((5, 96), (100, 2), 1)):
        assert torch.equal(compute(x), compute(x.clone().contiguous()))
        assert torch.equal(compute(x.view(1, 5, 96) if x.is_contiguous() else x.unsqueeze(0))[0], compute(x))


@each_isa
def test_what_is_not_finite_stays_in_its_row(isa: str) -> None:
    x, compute = random(9, 64, dtype=torch.bfloat16), product(isa, *weight(48, 64))
    clean = compute(x)
    x[4, 33], x[7, 2] = float("nan"), float("inf")
    y = compute(x)
    assert y[4].isnan().all()
    assert not y[7].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 8]], clean[[0, 1, 2, 3, 5, 6, 8]])


def test_weights_that_do_not_fit_are_refused() -> None:
    packed, scales = weight(8, 64)
    with pytest.raises(InputError, match="group size 16 wants"):
        product(HERE[-1], packed, scales, group_size=16)
    with pytest.raises(InputError, match="rows of 96 numbers, and a weight of 64 inputs"):
        product(HERE[-1], packed, scales)(random(1, 96))
    implementation = int4_matmul.implementations[f"cpu/{HERE[-1]}"]
    assert implementation.prepare is not None
    with pytest.raises(InputError, match="never arrived"):
        implementation.prepare({"group_size": 32}).finish()


def test_the_layout_takes_the_bytes_that_the_bits_need() -> None:
    for outputs, width in ((2048, 6144), (6144, 2048), (12288, 6144), (154880, 6144)):
        codes, scales = panel_shapes(outputs, width, 32)
        taken = torch.Size(codes).numel() + 2 * torch.Size(scales).numel()
        assert taken == outputs * width * 0.5625


def test_a_direct_call_takes_canonical_weights() -> None:
    packed, scales = weight(48, 64)
    x = random(3, 64)
    assert int4_matmul.select(device_type="cpu", dtype=torch.float32, width_in=64, width_out=48, group_size=32).chosen is not None
    assert error(int4_matmul(x, packed, scales, group_size=32), product(HERE[-1], packed, scales)(x).double()) < 1e-6


# -- experts -------------------------------------------------------------------------------------------------------------


def gold_of(hidden: Tensor, call: tuple[Tensor, Tensor], weights: dict[str, Any], operator: Operator = expert_mlp_int4) -> Tensor:
    result: Tensor = operator.reference(hidden.double(), call[0].double(), call[1], **weights)
    return result


@each_isa
@each_dtype
@pytest.mark.parametrize(
    ("width", "between", "group_size"), [(64, 32, 32), (72, 40, 8), (72, 40, PER_CHANNEL), (160, 96, 32), (128, 64, 64)]
)
def test_mixtures_of_every_size(isa: str, dtype: torch.dtype, width: int, between: int, group_size: int) -> None:
    mixture, weights = experts(isa, 6, width, between, group_size=group_size)
    for tokens in (0, 1, 2, 9, 60):
        hidden, call = random(tokens, width, dtype=dtype), routing(tokens, 3, 6)
        assert error(mixture(hidden, *call), gold_of(hidden, call, weights)) < (1e-6 if dtype == torch.float32 else 6e-3)


@each_isa
def test_unequal_loads(isa: str) -> None:
    """Most rows on one expert, more than one block of them; some experts with a row or two, some with none."""
    tokens = 700 if isa != "scalar" else 40
    mixture, weights = experts(isa, 9, 64, 32)
    ids = torch.full((tokens, 2), 4, dtype=torch.int32)
    ids[5, 0], ids[9, 1], ids[17, 0], ids[18, 0], ids[30] = 0, 8, 2, 2, torch.tensor([-7, 99], dtype=torch.int32)
    call = (torch.rand(tokens, 2, generator=torch.Generator().manual_seed(5)), ids)
    hidden = random(tokens, 64, dtype=torch.bfloat16)
    mixed = mixture(hidden, *call)
    assert error(mixed, gold_of(hidden, call, weights)) < 6e-3
    assert torch.equal(mixed[30], torch.zeros(64, dtype=torch.bfloat16))
    for token in (0, 5, 17, 18, 39):
        assert torch.equal(mixture(hidden[token : token + 1], *(part[token : token + 1] for part in call))[0], mixed[token])


@each_isa
def test_a_token_that_is_no_number_stays_alone(isa: str) -> None:
    mixture, _ = experts(isa, 6, 64, 32)
    hidden, call = random(12, 64, dtype=torch.bfloat16), routing(12, 3, 6)
    call[1][:, 0] = 1
    clean = mixture(hidden, *call)
    hidden[5, 3] = float("nan")
    mixed = mixture(hidden, *call)
    assert mixed[5].isnan().all()
    rest = [token for token in range(12) if token != 5]
    assert torch.equal(mixed[rest], clean[rest])


def test_experts_arrive_in_any_order_and_missing_ones_are_told() -> None:
    mixture, weights = experts(HERE[-1], 4, 64, 32)
    implementation = expert_mlp_int4.implementations[f"cpu/{HERE[-1]}"]
    assert implementation.prepare is not None
    preparation = implementation.prepare({"experts": 4, "group_size": 32, "width_between": 32})
    for expert in (2, 0, 3):
        preparation.add(expert, {name: weights[name][expert] for name in expert_mlp_int4.weights})
    with pytest.raises(InputError, match=r"experts missing: \[1\]"):
        preparation.finish()
    with pytest.raises(InputError, match="expected experts 0 to 3"):
        preparation.add(4, {})
    preparation.add(1, {name: weights[name][1] for name in expert_mlp_int4.weights})
    hidden, call = random(5, 64), routing(5, 2, 4)
    ours = implementation.function(hidden, *call, group_size=32, **preparation.finish())
    assert torch.equal(ours, mixture(hidden, *call))


def test_a_layer_takes_the_bytes_of_the_canonical_one() -> None:
    shapes = {"gate_up_packed": (4096, 768), "gate_up_scales": (4096, 192), "down_packed": (6144, 256), "down_scales": (6144, 64)}
    implementation = expert_mlp_int4.implementations[f"cpu/{HERE[-1]}"]
    assert implementation.prepare is not None
    ours, canonical = implementation.prepare({"experts": 2, "group_size": 32, "width_between": 2048}), CanonicalWeights(shapes, 2)
    for expert in range(2):
        parts = {n: torch.zeros(s, dtype=torch.int32 if "packed" in n else torch.bfloat16) for n, s in shapes.items()}
        ours.add(expert, parts)
        canonical.add(expert, parts)
    sizes = [sum(t.nbytes for t in made.finish().values() if isinstance(t, Tensor)) for made in (ours, canonical)]
    assert sizes[0] == sizes[1]


# -- 8-bit activations, and weights in floating point ---------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(
    ("width", "between", "group_size"),
    [(64, 32, 32), (72, 40, 8), (72, 40, PER_CHANNEL), (160, 96, 32), (288, 192, 96), (1120, 352, PER_CHANNEL), (640, 320, 320)],
)
def test_w4a8_mixtures_of_every_size(
    isa: str, dtype: torch.dtype, width: int, between: int, group_size: int, groups: bool
) -> None:
    """Held against the operator in the same dtype: rounding to 8 bits hardly ever falls differently."""
    size = group_size if groups else PER_CHANNEL
    mixture, weights = experts(
        isa, 6, width, between, group_size=group_size, operator=expert_mlp_int4_w4a8, activation_group_size=size
    )
    for tokens in (0, 1, 2, 9, 20, 60):
        hidden, call = random(tokens, width, dtype=dtype), routing(tokens, 3, 6)
        expected = expert_mlp_int4_w4a8.reference(hidden, *call, **weights)
        mixed = mixture(hidden, *call)
        assert error(mixed, expected.double()) < (1e-3 if dtype == torch.float32 else 5e-3)
        if tokens:
            assert torch.equal(mixture(hidden[-1:], *(part[-1:] for part in call))[0], mixed[-1])


@each_isa
@each_dtype
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (15, 77), (16, 16), (33, 130), (100, 512), (21, 1100)])
def test_int8_sums_are_exact_at_every_size(isa: str, dtype: torch.dtype, outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-128, 128, (outputs, width + 3), generator=generator, dtype=torch.int8)[:, 1 : width + 1]
    scales = torch.rand(outputs, generator=generator)
    compute = int8_matmul.implementations[f"cpu/{isa}"].function
    for rows in (0, 1, 3, 5, 9, 16, 17, 33):  # passes over the weight as it lies, and tiles
        x = random(rows, width, dtype=dtype) * 100
        assert torch.equal(compute(x, codes, scales), int8_matmul.reference(x, codes, scales))


@each_isa
@each_dtype
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (15, 77), (16, 16), (33, 130), (100, 1056)])
def test_linear_of_every_size_and_stride(isa: str, dtype: torch.dtype, outputs: int, width: int) -> None:
    memory, compute = random(outputs, width + 5, seed=7, dtype=dtype), linear.implementations[f"cpu/{isa}"].function
    x = random(14, width, dtype=dtype)
    for matrix in (memory[:, :width].contiguous(), memory[:, 3 : 3 + width], memory.t().contiguous().t()[:, :width]):
        y = compute(x, matrix)
        gold = linear.reference(x.double(), matrix.double())
        assert error(y, gold) < (2e-6 if dtype == torch.float32 else 4e-3)
        for count in (0, 1, 2, 5, 7, 13):
            assert torch.equal(compute(x[:count], matrix), y[:count])


@each_isa
@each_dtype
def test_experts_in_floating_point(isa: str, dtype: torch.dtype) -> None:
    gate_up, down = random(5, 80, 72, seed=8, dtype=dtype) / 8, random(5, 72, 40, seed=9, dtype=dtype) / 6
    compute = expert_mlp.implementations[f"cpu/{isa}"].function
    for tokens in (0, 1, 9, 60):
        hidden, call = random(tokens, 72, dtype=dtype), routing(tokens, 3, 5)
        gold = expert_mlp.reference(hidden.double(), call[0].double(), call[1], gate_up.double(), down.double())
        assert error(compute(hidden, *call, gate_up, down), gold) < (2e-6 if dtype == torch.float32 else 6e-3)


# -- the tile unit, emulated ----------------------------------------------------------------------------------------------


@pytest.mark.skipif("avx512_bf16" not in HERE, reason="NOT TESTED: the emulated tile unit is compiled for AVX-512 BF16")
@pytest.mark.parametrize(("outputs", "width"), [(16, 32), (130, 96), (65, 1120)])
def test_the_kernels_of_amx_over_an_emulated_tile_unit(outputs: int, width: int) -> None:
    """The source that AMX runs, where the unit is plain C++. No machine with AMX has run it."""
    tiles = extension.kernels().emulated_tiles
    packed, scales = weight(outputs, width)
    implementation = int4_matmul.implementations["cpu/amx"]
    assert implementation.prepare is not None
    preparation = implementation.prepare({"group_size": 32})
    preparation.add(None, {"packed": packed, "scales": scales})
    prepared, run_int4, run_linear = preparation.finish(), int4_matmul_native(tiles), linear_native(tiles)
    x, matrix = random(150, width, dtype=torch.bfloat16), random(outputs, width, seed=7, dtype=torch.bfloat16)
    y, z = run_int4(x, group_size=32, **prepared), run_linear(x, matrix)
    assert error(y, int4_matmul.reference(x.double(), packed, scales, group_size=32)) < 4e-3
    assert error(z, linear.reference(x.double(), matrix.double())) < 4e-3
    for rows in (0, 1, 15, 16, 17, 49, 66):
        assert torch.equal(run_int4(x[:rows], group_size=32, **prepared), y[:rows])
        assert torch.equal(run_linear(x[:rows], matrix), z[:rows])


@pytest.mark.skipif("avx512_bf16" not in HERE, reason="NOT TESTED: the emulated tile unit is compiled for AVX-512 BF16")
def test_experts_over_an_emulated_tile_unit() -> None:
    gate_up, down = random(5, 80, 72, seed=8, dtype=torch.bfloat16) / 8, random(5, 72, 40, seed=9, dtype=torch.bfloat16) / 6
    compute = expert_mlp_native(extension.kernels().emulated_tiles)
    hidden, call = random(60, 72, dtype=torch.bfloat16), routing(60, 3, 5)
    gold = expert_mlp.reference(hidden.double(), call[0].double(), call[1], gate_up.double(), down.double())
    assert error(compute(hidden, *call, gate_up, down), gold) < 6e-3
