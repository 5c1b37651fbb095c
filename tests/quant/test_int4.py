"""The quantiser against exact arithmetic, a numpy writing of the definition, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.quant import PER_CHANNEL, Int4Rule, dequantize, int4, quantize, quantize_packed, unpack_int4
from glm5_port.quant.int4 import LARGEST_AMAX, SMALLEST_AMAX, seventh_bits

ORDINARY = range(SMALLEST_AMAX, LARGEST_AMAX + 1)
"""Bit patterns of every amax that is quantised."""


def from_bits(bits: Tensor | list[int]) -> Tensor:
    return torch.as_tensor(bits).to(torch.int16).view(torch.bfloat16)


def bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def exact(bits: int) -> Fraction:
    """The number that a normal bfloat16 pattern stands for."""
    value = Fraction(128 + (bits & 127)) * Fraction(2) ** ((bits >> 7 & 255) - 134)
    return -value if bits >> 15 else value


def nearest_bits(value: Fraction) -> int:
    """The bfloat16 pattern nearest to a positive number, halves to even."""
    exponent = 134
    while value >= 256:
        value, exponent = value / 2, exponent + 1
    while value < 128:
        value, exponent = value * 2, exponent - 1
    mantissa = round(value)  # Python rounds fractions half to even
    return (exponent << 7) + mantissa - 128  # a carry to 256 moves on to the next exponent by itself


def rounded_to_bfloat16(master: np.ndarray) -> np.ndarray:
    """Nearest, halves to even, by integers; float32 that holds bfloat16 values."""
    bits = master.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantize_in_numpy(master: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, values) as the definition is written in the issue: |w| compared with (k + 1/2) s, which float32 holds
    exactly; the first of two equal neighbours is even for even k."""
    w = rounded_to_bfloat16(master).reshape(*master.shape[:-1], -1, group)
    amax = np.abs(w).max(-1, keepdims=True)
    zero = amax < 2.0**-110
    scales = np.where(zero, np.float32(1), rounded_to_bfloat16((amax.astype(np.float64) / 7).astype(np.float32)))
    codes = np.zeros(w.shape, np.int8)
    for k in range(7):
        threshold = np.float32(k + 0.5) * scales
        codes += (np.abs(w) > threshold) if k % 2 == 0 else (np.abs(w) >= threshold)
    codes = np.where(w < 0, -codes, codes)
    values = rounded_to_bfloat16(codes * scales)
    return codes.reshape(master.shape), scales.squeeze(-1), values.reshape(master.shape)


def grid() -> Iterator[tuple[int, Tensor]]:
    """Every mantissa of amax, with every bfloat16 magnitude from amax / 64 up to it, in both signs: all pairs of mantissas."""
    for mantissa in range(128):
        amax = (127 << 7) + mantissa
        magnitudes = torch.arange(amax - 6 * 128 + 1, amax + 1)
        yield amax, torch.cat((magnitudes, magnitudes | 1 << 15))


# -- amax7 against exact arithmetic --------------------------------------------------------------------------------------


def test_every_scale_is_the_nearest_bfloat16_to_a_seventh():
    expected = [nearest_bits(exact(bits) / 7) for bits in ORDINARY]
    assert seventh_bits(torch.tensor(ORDINARY, dtype=torch.int32)).tolist() == expected
    rows = from_bits(list(ORDINARY)).unsqueeze(1) * torch.tensor([1] + [0] * 7).bfloat16()
    assert bits_of(quantize(rows, Int4Rule(group_size=8)).scales).flatten().tolist() == expected


def test_codes_of_all_pairs_of_mantissas():
    """Exact quotients, halves to even; at both ends of the range and in the middle."""
    ties = 0
    for amax, bits in grid():
        scale = exact(nearest_bits(exact(amax) / 7))
        quotients = [exact(b) / scale for b in bits.tolist()]
        expected = torch.tensor([round(quotient) for quotient in quotients])
        ties += sum(quotient.denominator == 2 for quotient in quotients)
        for exponent in (127, 25, 253):  # 2^0, 2^-102 and 2^126: amax / 64 stays normal, amax below 2^127
            row = from_bits(bits + ((exponent - 127) << 7)).unsqueeze(0)
            assert torch.equal(quantize(row, Int4Rule(group_size=PER_CHANNEL)).codes[0], expected.to(torch.int8)), amax
    assert ties > 400, "the grid holds no ties to round to even"


def test_values_of_all_scales():
    for mantissa in range(128):
        bits = (120 << 7) + mantissa
        values = dequantize(torch.arange(-8, 8, dtype=torch.int8), from_bits([bits]))
        expected = [nearest_bits(abs(q) * exact(bits)) if q else 0 for q in range(-8, 8)]
        assert (bits_of(values) & 0x7FFF).tolist() == expected
        assert (values.sign() == torch.arange(-8, 8).sign()).all()


def test_no_pair_is_near_a_boundary_without_being_on_it():
    """What the module's text rests on: quotients are ties or at least 2^-11 away from one."""
    nearest = min(
        abs(exact(b) / scale - half)
        for amax, bits in grid()
        for scale in [exact(nearest_bits(exact(amax) / 7))]
        for b in bits[: bits.numel() // 2].tolist()
        for half in [Fraction(2 * int(exact(b) / scale) + 1, 2)]
        if exact(b) / scale != half
    )
    assert nearest >= Fraction(1, 2**11)


@pytest.mark.parametrize("error", [2.0**-18, -(2.0**-18), 3e-6])
def test_a_bad_reciprocal_changes_no_code(error, monkeypatch):
    """As an approximate division, or a fused multiply-add, would."""
    rows = [from_bits(bits).unsqueeze(0) for _, bits in grid()]
    rule = Int4Rule(group_size=PER_CHANNEL)
    right = [quantize(row, rule).codes for row in rows]
    reciprocal = Tensor.reciprocal
    monkeypatch.setattr(Tensor, "reciprocal", lambda scales: reciprocal(scales) * (1 + error))
    assert all(torch.equal(quantize(row, rule).codes, codes) for row, codes in zip(rows, right, strict=True))


def test_nothing_is_clipped_and_every_amax_is_a_fixed_point():
    rows = from_bits(list(ORDINARY)).unsqueeze(1) * torch.tensor([1, -1, 0.5, 0.75, -0.3, 0.1, 0.9, -0.6]).bfloat16()
    first = quantize(rows, Int4Rule(group_size=8))
    assert (first.codes[:, 0] == 7).all()
    assert (first.codes[:, 1] == -7).all()
    again = quantize(first.dequantize(), first.rule)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.scales, first.scales)


@pytest.mark.parametrize("group", [8, 32, 64, 128, PER_CHANNEL])
def test_quantising_what_was_quantised_changes_nothing(group):
    first = quantize(torch.randn(40, 256) * torch.logspace(-30, 30, 40).unsqueeze(1), Int4Rule(group_size=group))
    again = quantize(first.dequantize(), first.rule)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.scales, first.scales)


# -- independent writings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [8, 32, 64, 128, PER_CHANNEL])
def test_numpy_agrees(dtype, group):
    weight = (torch.randn(3, 50, 256) * 0.02).to(dtype)
    weight[0, 3] = 0
    weight[1, 4] = (torch.randn(256) * 1e-5).to(dtype)
    if dtype != torch.float16:
        weight[2, :20] = (torch.randn(20, 256) * torch.logspace(-42, -30, 20).unsqueeze(1)).to(dtype)
    codes, scales, values = quantize_in_numpy(weight.float().numpy(), 256 if group == PER_CHANNEL else group)
    ours = quantize(weight, Int4Rule(group_size=group))
    assert torch.equal(ours.codes, torch.from_numpy(codes))
    assert torch.equal(ours.scales.float(), torch.from_numpy(scales))
    assert torch.equal(ours.dequantize().float(), torch.from_numpy(values))


def test_numpy_agrees_on_all_pairs_of_mantissas():
    for _, bits in grid():
        row = from_bits(bits).unsqueeze(0)
        codes, scales, values = quantize_in_numpy(row.float().numpy(), bits.numel())
        ours = quantize(row, Int4Rule(group_size=PER_CHANNEL))
        assert torch.equal(ours.codes, torch.from_numpy(codes))
        assert torch.equal(ours.scales.float(), torch.from_numpy(scales))
        assert torch.equal(ours.dequantize().float(), torch.from_numpy(values))


def onnx_round_trip(w: np.ndarray, scales: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and code * scale by ONNX Runtime's QuantizeLinear and DequantizeLinear on blocks of 4-bit integers."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s"], ["q"], axis=1, block_size=group, output_dtype=TensorProto.INT4),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=1, block_size=group),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.INT8),
    ]
    inputs = [
        helper.make_tensor_value_info("w", TensorProto.FLOAT, w.shape),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, scales.shape),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT8, w.shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, w.shape),
    ]
    graph = helper.make_graph(nodes, "round_trip", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, values = session.run(["codes", "y"], {"w": w, "s": scales})
    return codes, values


def test_onnx_runtime_agrees():
    """Given our scales: ONNX has no rule for them. On all pairs of mantissas, in groups of 32 that begin with amax."""
    rows = torch.stack([from_bits(bits) for _, bits in grid()])
    pieces = rows.view(128, -1, 24)
    amax = rows.abs().amax(1).view(128, 1, 1).expand(-1, pieces.shape[1], 8)
    weight = torch.cat((amax, pieces), dim=2).flatten(1)
    ours = quantize(weight)
    codes, values = onnx_round_trip(weight.float().numpy(), ours.scales.float().numpy(), 32)
    assert torch.equal(ours.codes, torch.from_numpy(codes))
    assert torch.equal(ours.dequantize(), torch.from_numpy(values).bfloat16())


# -- groups outside the ordinary range -----------------------------------------------------------------------------------


def test_groups_of_nothing_but_noise_become_zeros_with_scale_one():
    smallest, below = from_bits([SMALLEST_AMAX]), from_bits([SMALLEST_AMAX - 1])
    subnormal = from_bits([1])
    weight = torch.zeros(5, 32).bfloat16()
    weight[1, 3], weight[2, 4], weight[3, 5], weight[4, 6] = -0.0, -subnormal, below, -smallest
    made = quantize(weight)
    assert made.scales.flatten()[:4].tolist() == [1, 1, 1, 1]
    assert (made.codes[:4] == 0).all()
    assert (bits_of(made.dequantize()[:4]) == 0).all()
    assert made.codes[4].tolist() == [0] * 6 + [-7] + [0] * 25
    assert bits_of(made.scales[4]).item() == nearest_bits(Fraction(2) ** -110 / 7)


def test_scales_are_never_subnormal_and_flushing_changes_nothing():
    """Weights down to 2^-133, with the processor set to flush subnormal numbers and without."""
    weight = from_bits(torch.arange(0, LARGEST_AMAX, 7)[:4608]).view(-1, 32)
    weight = torch.cat((weight, weight[:, torch.randperm(32)].roll(5, 0)))
    plain = quantize(weight)
    if not torch.set_flush_denormal(True):
        pytest.fail("this processor cannot flush subnormal numbers: run this test on another")
    try:
        flushed = quantize(weight)
        values = flushed.dequantize()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed.codes, plain.codes)
    assert torch.equal(bits_of(flushed.scales), bits_of(plain.scales))
    assert torch.equal(bits_of(values), bits_of(plain.dequantize()))
    assert (bits_of(plain.scales) >= 128).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.01 * 2.0**127, -3.3895e38])
@pytest.mark.parametrize("rule", ["amax7", "signed8", "mse"])
def test_what_cannot_be_held_is_refused_by_name_and_index(value, rule):
    weight = torch.randn(2, 6, 64)
    weight[1, 2, 41] = value
    with pytest.raises(InputError, match=r"experts\.3\.up_proj\.weight: element \[1, 2, 41\] is .* 1 of 24 groups"):
        quantize(weight, Int4Rule(rule), name="experts.3.up_proj.weight")
    with pytest.raises(InputError, match=r"x: element \[1, 2, 41\]"):
        quantize_packed(weight, Int4Rule(rule), name="x")
    packed, scales = quantize_packed(weight, Int4Rule(rule), check=False)
    assert scales.isnan().nonzero().tolist() == [[1, 2, 1]]
    assert (unpack_int4(packed)[1, 2, 32:] == 0).all()
    weight[1, 2, 41] = 0
    good = quantize(weight, Int4Rule(rule))
    assert torch.equal(scales[0], good.scales[0])


def test_a_master_that_rounds_to_infinity_is_refused():
    weight = torch.zeros(1, 32)
    weight[0, 7] = torch.finfo(torch.float32).max
    with pytest.raises(InputError, match=r"element \[0, 7\] is inf in bfloat16"):
        quantize(weight)


def test_the_largest_group_comes_back_finite():
    weight = from_bits([LARGEST_AMAX] * 32).unsqueeze(0)
    assert quantize(weight).dequantize().isfinite().all()


# -- the other rules -----------------------------------------------------------------------------------------------------


def test_signed8_by_hand():
    weight = torch.tensor([[4.0, -4.0, 0.25, 0.75, -0.25, -0.75, 1.0, 0.0], [-4.0, 3.0, 0.25, 0.75, -0.25, -0.75, 1.0, 3.75]])
    made = quantize(weight, Int4Rule("signed8", 8))
    assert made.scales.tolist() == [[-0.5], [0.5]]  # both signs reach the extreme in the first row: the positive one counts
    assert made.codes.tolist() == [[-8, 7, 0, -2, 0, 2, -2, 0], [-8, 6, 0, 2, 0, -2, 2, 7]]


def test_signed8_is_exact_arithmetic():
    for amax, bits in grid():
        row = from_bits(bits[: bits.numel() // 2])
        made = quantize(row.unsqueeze(0), Int4Rule("signed8", PER_CHANNEL))
        scale = -exact(amax) / 8
        assert made.scales.item() == scale
        expected = [max(-8, min(7, round(exact(b) / scale))) for b in bits[: bits.numel() // 2].tolist()]
        assert made.codes[0].tolist() == expected


@pytest.mark.parametrize("group", [32, PER_CHANNEL])
def test_mse_takes_the_best_of_its_candidates(group):
    weight = torch.randn(30, 128)
    weight[:10] *= torch.logspace(-30, 30, 10).unsqueeze(1)
    made, plain = quantize(weight, Int4Rule("mse", group)), quantize(weight, Int4Rule(group_size=group))
    w = weight.bfloat16().double().unflatten(1, (made.scales.shape[1], -1))
    least = torch.full(made.scales.shape, float("inf"), dtype=torch.float64)
    for candidate in range(24):
        s = from_bits(bits_of(plain.scales) - 2 * candidate).double().unsqueeze(-1)
        least = torch.minimum(least, (w - s * (w / s).round().clamp(-7, 7)).square().sum(-1))
    codes = made.codes.double().view_as(w)
    chosen = (w - codes * made.scales.double().unsqueeze(-1)).square().sum(-1)
    torch.testing.assert_close(chosen, least, rtol=1e-5, atol=0)
    assert (made.scales != plain.scales).float().mean() > 0.5, "the search never left where it starts"
    assert made.codes.abs().max() == 7


def test_mse_does_not_depend_on_the_order_of_a_group():
    weight = torch.randn(200, 32)
    made = quantize(weight, Int4Rule("mse"))
    assert torch.equal(quantize(weight[:, torch.randperm(32)], Int4Rule("mse")).scales, made.scales)


# -- form ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["amax7", "signed8", "mse"])
def test_blocks_strides_and_leading_dimensions_change_nothing(rule, monkeypatch):
    weight = torch.randn(3, 10, 64)
    whole = quantize(weight, Int4Rule(rule))
    packed, scales = quantize_packed(weight, Int4Rule(rule))
    assert torch.equal(unpack_int4(packed), whole.codes)
    assert torch.equal(packed, whole.packed())
    assert torch.equal(scales, whole.scales)
    assert torch.equal(quantize(weight[2, 3], Int4Rule(rule)).codes, whole.codes[2, 3])
    assert torch.equal(quantize(weight.mT.contiguous().mT, Int4Rule(rule)).codes, whole.codes)
    assert quantize(weight[:, :0], Int4Rule(rule)).scales.shape == (3, 0, 2)
    monkeypatch.setattr(int4, "_BLOCK", 200)
    assert torch.equal(quantize(weight, Int4Rule(rule)).codes, whole.codes)
    assert torch.equal(quantize_packed(weight, Int4Rule(rule))[0], packed)


def test_the_weight_is_left_alone_and_no_gradient_passes():
    weight = torch.randn(4, 64, requires_grad=True)
    before = weight.detach().clone()
    assert not quantize(weight).scales.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("width", "group"), [(64, 48), (36, PER_CHANNEL), (100, 32), (0, 32), (16, 32)])
def test_widths_that_do_not_fit_are_refused(width, group):
    with pytest.raises(InputError, match=rf"gate: rows of {width} weights"):
        quantize(torch.zeros(2, width), Int4Rule(group_size=group), name="gate")


@pytest.mark.parametrize("wrong", [torch.zeros(2, 32, dtype=torch.int32), torch.zeros(2, 32).to(torch.float8_e4m3fn)])
def test_dtypes_that_are_no_weights_are_refused(wrong):
    with pytest.raises(InputError, match="gate: .* takes rows of float32"):
        quantize(wrong, name="gate")


def test_rules_are_named_and_versioned():
    assert str(Int4Rule()) == "amax7 v1, groups of 32"
    assert str(Int4Rule("mse", PER_CHANNEL)) == "mse v1, per channel"
    with pytest.raises(InputError, match="did you mean amax7"):
        Int4Rule("amax8")
    with pytest.raises(InputError, match="version 2 was asked for"):
        Int4Rule(version=2)
    for size in (0, 12, -2):
        with pytest.raises(InputError, match=f"group size {size}"):
            Int4Rule(group_size=size)
