"""The quantised operators: the contract's sentences, held against plain arithmetic and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from glm5_port.backends.torch import chunks
from glm5_port.errors import InputError
from glm5_port.operators.int4 import (
    expert_mlp_int4,
    expert_mlp_int4_w4a8,
    int4_dequantize,
    int4_matmul,
    int4_quantize,
    int8_matmul,
    quantize_rows,
)
from glm5_port.operators.moe import expert_mlp
from glm5_port.quant import PER_CHANNEL, RULES, Int4Rule, as_bytes, int4, pack_int4, quantize, quantize_packed, unpack_int4
from tests.operators.contract import bind, check_compiles, check_traces, portable, trace_on

quantisers = pytest.mark.parametrize("function", portable(int4_quantize))
decoders = pytest.mark.parametrize("function", portable(int4_dequantize))
products = pytest.mark.parametrize("function", portable(int4_matmul))
int8_products = pytest.mark.parametrize("function", portable(int8_matmul))
mixtures = pytest.mark.parametrize("mixture", portable(expert_mlp_int4))
w4a8_mixtures = pytest.mark.parametrize("mixture", portable(expert_mlp_int4_w4a8))


def stored(*shape: int, group_size: int = 32) -> tuple[Tensor, Tensor]:
    return quantize_packed(torch.randn(shape) * shape[-1] ** -0.5, Int4Rule(group_size=group_size))


# -- weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group_size", [8, 32, 64, PER_CHANNEL])
@quantisers
def test_the_operator_is_the_quantiser(function: Callable[..., tuple[Tensor, Tensor]], rule: str, group_size: int) -> None:
    """All bfloat16 mantissas in both: the reference compares with boundaries, the quantiser multiplies and rounds."""
    weight = torch.cat((torch.randn(40, 64), torch.randn(40, 64) * torch.logspace(-39, 37, 40).unsqueeze(1)))
    made = quantize(weight, Int4Rule(rule, group_size))
    packed, scales = function(weight, group_size=group_size, rule=rule)
    assert torch.equal(unpack_int4(packed), made.codes)
    assert torch.equal(scales, made.scales)


@quantisers
def test_a_bad_group_is_marked_without_raising(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    weight = torch.randn(3, 64)
    weight[1, 40] = float("nan")
    packed, scales = function(weight, group_size=32, rule="amax7")
    assert scales.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert (unpack_int4(packed)[1, 32:] == 0).all()
    assert int4_dequantize(packed, scales, group_size=32)[1, 32:].isnan().all()


@quantisers
def test_quantising_refuses_rules_and_groups_that_do_not_exist(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(InputError, match="known: amax7"):
        function(torch.zeros(2, 32), group_size=32, rule="amax9")
    with pytest.raises(InputError, match="rows of 48 weights"):
        function(torch.zeros(2, 48), group_size=32, rule="amax7")


@decoders
def test_decoding_by_hand(function: Callable[..., Tensor]) -> None:
    """Codes -8 .. 7 by 129 / 128. Of eight bits, 387 = 3 * 129 lies halfway between 386 and 388, whose mantissa 194 is even."""
    packed = pack_int4(torch.arange(-8, 8, dtype=torch.int8))
    values = function(packed, torch.tensor([1.0078125]).bfloat16(), group_size=16)
    assert values.dtype == torch.bfloat16
    positive = [129, 258, 388, 516, 644, 776, 904]
    assert (values.float() * 128).tolist() == [-1032, *(-value for value in reversed(positive)), 0, *positive]


@pytest.mark.parametrize("group_size", [16, 64, PER_CHANNEL])
@decoders
def test_another_group_size_than_stored_is_refused(function: Callable[..., Tensor], group_size: int) -> None:
    packed, scales = stored(4, 64)
    with pytest.raises(InputError, match=f"group size {group_size} wants int32 words"):
        function(packed, scales, group_size=group_size)


# -- one product ---------------------------------------------------------------------------------------------------------


def onnx_matmul(x: np.ndarray, packed: Tensor, scales: Tensor, group: int) -> np.ndarray:
    """ONNX Runtime's MatMulNBits on our bytes, as they are."""
    out, width = packed.shape[0], packed.shape[1] * 8
    attributes = {"K": width, "N": out, "bits": 4, "block_size": group}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
    weight = as_bytes(packed).view(out, width // group, group // 2).numpy()
    tensors = [
        helper.make_tensor("b", TensorProto.UINT8, weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.float().numpy().tobytes(), raw=True),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], out])]
    graph = helper.make_graph([node], "matmul", inputs, outputs, tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_onnx_runtime_reads_our_bytes() -> None:
    """The product by the identity shows q * s, which rounds to our weight."""
    packed, scales = stored(48, 128)
    shown = torch.from_numpy(onnx_matmul(np.eye(128, dtype=np.float32), packed, scales, 32)).T
    assert torch.equal(shown.bfloat16(), int4_dequantize(packed, scales, group_size=32))


@products
def test_onnx_runtime_computes_nearly_the_same(function: Callable[..., Tensor]) -> None:
    """Its weights are not rounded to bfloat16: near, and not equal."""
    packed, scales = stored(48, 256)
    x = torch.randn(5, 256)
    theirs = torch.from_numpy(onnx_matmul(x.numpy(), packed, scales, 32))
    ours = function(x, packed, scales, group_size=32)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)
    assert not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@products
def test_float16_does_not_narrow_the_weight(function: Callable[..., Tensor]) -> None:
    """Weights below the smallest float16 number, and activations that bring them back."""
    packed, scales = quantize_packed(torch.randn(8, 64) * 1e-9)
    x = (torch.randn(3, 64) * 1e4).half()
    exact = x.double() @ int4_dequantize(packed, scales, group_size=32).double().T
    torch.testing.assert_close(function(x, packed, scales, group_size=32), exact.half())
    assert (exact.half() != 0).float().mean() > 0.9


@pytest.mark.parametrize("workspace", [2**28, 5000])
@products
def test_gradients_reach_the_activations(
    function: Callable[..., Tensor], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    packed, scales = stored(24, 64)
    x, weight = torch.randn(3, 64, requires_grad=True), int4_dequantize(packed, scales, group_size=32)
    (ours,) = torch.autograd.grad(function(x, packed, scales, group_size=32).sin().sum(), x)
    (theirs,) = torch.autograd.grad((x @ weight.float().T).sin().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_activations_are_quantised_as_numpy_does() -> None:
    x = torch.randn(50, 96) * torch.logspace(-20, 20, 50).unsqueeze(1)
    x[:, :8] = (x.abs().amax(1, keepdim=True) / 127 * torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5])).float()
    codes, scales = quantize_rows(x)
    expected = np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127)
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(codes.numpy(), np.rint(x.numpy() / expected).astype(np.int8))
    assert codes.abs().max() == 127


def test_quiet_and_bad_rows_of_activations() -> None:
    x = torch.ones(5, 8)
    x[0], x[1], x[2, 3], x[3, 4] = 0.0, 2.0**-101, float("inf"), float("nan")
    codes, scales = quantize_rows(x)
    assert (codes[:4] == 0).all()
    assert scales[:2].flatten().tolist() == [1, 1]
    assert scales[2:4].isnan().all()
    assert codes[4].tolist() == [127] * 8


@int8_products
def test_int8_by_hand(function: Callable[..., Tensor]) -> None:
    """Scales 1 and 2 for the rows; the codes of the second are 127, 1 (0.5 steps of 2 are a tie: 0), -64."""
    x = torch.tensor([[127.0, 2.0, -3.0, 0.5], [254.0, 2.0, 1.0, -128.0]])
    weight = torch.tensor([[1, 1, 1, 1], [-128, 2, 0, 1]], dtype=torch.int8)
    y = function(x, weight, torch.tensor([1.0, 0.5]))
    assert y.tolist() == [[126.0, (-128 * 127 + 4) / 2], [2.0 * (127 + 1 - 64), -128 * 127 + 2 - 64.0]]


@int8_products
def test_int8_sums_are_exact(function: Callable[..., Tensor]) -> None:
    """Sums that float32 could not hold on the way: the large terms cancel, and 1 remains."""
    x = torch.zeros(1, 16384)
    x[0, :8000], x[0, 8000:16000], x[0, -1] = 127, -127, 1
    weight = torch.full((2, 16384), 127, dtype=torch.int8)
    weight[:, -1] = 1
    assert function(x, weight, torch.ones(2)).tolist() == [[1.0, 1.0]]


# -- experts -------------------------------------------------------------------------------------------------------------


def mixing(tokens: int = 11, experts: int = 6, dtype: torch.dtype = torch.float32, group_size: int = 8) -> dict[str, Any]:
    gate_up, down = stored(experts, 48, 32, group_size=group_size), stored(experts, 32, 24, group_size=group_size)
    return {
        "hidden": torch.randn(tokens, 32, dtype=dtype),
        "route_weights": torch.rand(tokens, 3, dtype=torch.promote_types(dtype, torch.float32)),
        "ids": torch.randint(-2, experts + 2, (tokens, 3), dtype=torch.int32),
        "gate_up_packed": gate_up[0],
        "gate_up_scales": gate_up[1],
        "down_packed": down[0],
        "down_scales": down[1],
        "group_size": group_size,
    }


def decoded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of `expert_mlp`."""
    size = arguments["group_size"]
    weights = {
        name: int4_dequantize(arguments[f"{name}_packed"], arguments[f"{name}_scales"], group_size=size)
        for name in ("gate_up", "down")
    }
    return {name: arguments[name] for name in ("hidden", "route_weights", "ids")} | weights


@mixtures
def test_int4_experts_are_experts_of_the_decoded_weights(mixture: Callable[..., Tensor]) -> None:
    for tokens, experts in ((0, 4), (1, 4), (3, 64), (40, 2), (11, 6)):
        arguments = mixing(tokens, experts)
        expected = expert_mlp.reference(**decoded(arguments))
        torch.testing.assert_close(mixture(**arguments), expected)


@pytest.mark.parametrize(("group_size", "activation_group_size"), [(8, PER_CHANNEL), (8, 8), (PER_CHANNEL, PER_CHANNEL)])
@w4a8_mixtures
def test_w4a8_experts_by_hand(mixture: Callable[..., Tensor], group_size: int, activation_group_size: int) -> None:
    """Token by token, with integer sums of each group."""
    arguments = mixing(7, group_size=group_size) | {"activation_group_size": activation_group_size}

    def product(row: Tensor, name: str, expert: int) -> Tensor:
        size = row.numel() if activation_group_size == PER_CHANNEL else activation_group_size
        steps = (row.unflatten(0, (-1, size)).abs().amax(1) / 127).repeat_interleave(size)
        codes = (row / steps).round().long()
        weight, scales = unpack_int4(arguments[f"{name}_packed"][expert]).long(), arguments[f"{name}_scales"][expert]
        sums = (weight * codes).unflatten(1, (scales.shape[1], -1)).sum(-1)
        return (sums * scales.double() * steps[:: row.numel() // scales.shape[1]].double()).sum(1).float()

    expected = torch.zeros(7, 32)
    for token, row in enumerate(arguments["ids"].tolist()):
        for choice, expert in enumerate(row):
            if 0 <= expert < 6:
                gate, up = product(arguments["hidden"][token], "gate_up", expert).chunk(2)
                result = product(torch.nn.functional.silu(gate) * up, "down", expert)
                expected[token] += arguments["route_weights"][token, choice] * result
    torch.testing.assert_close(mixture(**arguments), expected, rtol=1e-4, atol=1e-5)


@w4a8_mixtures
def test_w4a8_is_near_w4a16_and_not_equal(mixture: Callable[..., Tensor]) -> None:
    arguments = mixing(40)
    ours, wide = mixture(**arguments), expert_mlp.reference(**decoded(arguments))
    error = ((ours - wide).square().mean() / wide.square().mean()).sqrt()
    assert 0.001 < error < 0.03


@w4a8_mixtures
def test_groups_of_activations_lose_less_than_rows(mixture: Callable[..., Tensor]) -> None:
    """Most where an input is far larger than the others: only its own group has coarse steps."""
    gate_up, down = stored(2, 256, 256), stored(2, 256, 128)
    arguments = mixing(40, 2) | {"hidden": torch.randn(40, 256), "group_size": 32}
    for name, (packed, scales) in {"gate_up": gate_up, "down": down}.items():
        arguments |= {f"{name}_packed": packed, f"{name}_scales": scales}
    for largest, aim, times in ((1, 0.015, 1.2), (30, 0.025, 2)):
        arguments["hidden"][:, 3] *= largest
        wide = expert_mlp.reference(**decoded(arguments))
        results = (mixture(**arguments, activation_group_size=size) for size in (PER_CHANNEL, 32))
        rows, groups = (float((ours - wide).norm() / wide.norm()) for ours in results)
        assert groups < aim
        assert groups * times < rows


@w4a8_mixtures
def test_activation_groups_are_those_of_the_weights(mixture: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match="activations in groups of 16, and weights in groups of 8"):
        mixture(**mixing(2), activation_group_size=16)
    with pytest.raises(InputError, match="activations in groups of 8, and weights in groups of -1"):
        mixture(**mixing(2, group_size=PER_CHANNEL), activation_group_size=8)


@pytest.mark.parametrize("operator", [expert_mlp_int4, expert_mlp_int4_w4a8])
def test_scales_that_do_not_fit_are_refused(operator: Any) -> None:
    for function in (parameter.values[0] for parameter in portable(operator)):
        for name in ("gate_up_scales", "down_scales"):
            arguments = mixing()
            arguments[name] = arguments[name][..., :-1]
            with pytest.raises(InputError, match="group size 8 wants"):
                function(**arguments)


@pytest.mark.parametrize("workspace", [2**28, 5000])
@mixtures
def test_gradients_are_those_of_the_decoded_experts(
    mixture: Callable[..., Tensor], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    arguments = mixing()

    def gradients(function: Callable[..., Tensor], call: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = {name: call[name].detach().clone().requires_grad_() for name in ("hidden", "route_weights")}
        return torch.autograd.grad(function(**(call | leaves)).sin().sum(), list(leaves.values()))

    for ours, theirs in zip(gradients(mixture, arguments), gradients(expert_mlp.reference, decoded(arguments)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("operator", [expert_mlp_int4, expert_mlp_int4_w4a8])
def test_experts_stream_in_one_by_one(operator: Any, canonical_weights: None) -> None:
    arguments = mixing()
    bound = bind(operator, arguments)
    preparation = bound.prepare()
    for expert in (3, 0, 5, 1, 2, 4):
        preparation.add(expert, {name: arguments[name][expert].clone() for name in operator.weights})
    rest = {name: value for name, value in arguments.items() if name not in operator.weights}
    assert torch.equal(bound(**rest, **preparation.finish()), bound(**arguments))


@pytest.mark.parametrize(("tokens", "experts"), [(2, 256), (100, 8)])
@pytest.mark.parametrize("operator", [expert_mlp_int4, expert_mlp_int4_w4a8])
def test_decoded_experts_keep_to_the_workspace(operator: Any, tokens: int, experts: int) -> None:
    """At GLM-5 widths, where 256 decoded experts would take 19 GB."""
    arguments = {
        "hidden": torch.empty(tokens, 6144, dtype=torch.bfloat16, device="meta"),
        "route_weights": torch.empty(tokens, 8, device="meta"),
        "ids": torch.empty(tokens, 8, dtype=torch.int32, device="meta"),
        "gate_up_packed": torch.empty(experts, 4096, 768, dtype=torch.int32, device="meta"),
        "gate_up_scales": torch.empty(experts, 4096, 192, dtype=torch.bfloat16, device="meta"),
        "down_packed": torch.empty(experts, 6144, 256, dtype=torch.int32, device="meta"),
        "down_scales": torch.empty(experts, 6144, 64, dtype=torch.bfloat16, device="meta"),
        "group_size": 32,
    }
    for sizes in trace_on("cuda", operator, arguments):
        assert 0 < sizes.largest <= chunks.WORKSPACE_BYTES


def test_decoded_rows_keep_to_the_workspace() -> None:
    """A weight the size of GLM-5's vocabulary: 3.8 GB in float32."""
    arguments = {
        "x": torch.empty(2, 6144, device="meta"),
        "packed": torch.empty(154880, 768, dtype=torch.int32, device="meta"),
        "scales": torch.empty(154880, 192, dtype=torch.bfloat16, device="meta"),
        "group_size": 32,
    }
    for sizes in trace_on("cuda", int4_matmul, arguments):
        assert 0 < sizes.largest <= chunks.WORKSPACE_BYTES
    int8 = {
        "x": torch.empty(2, 6144, device="meta"),
        "weight": torch.empty(154880, 6144, dtype=torch.int8, device="meta"),
        "weight_scale": torch.empty(154880, device="meta"),
    }
    for sizes in trace_on("cuda", int8_matmul, int8):
        assert 0 < sizes.largest <= chunks.WORKSPACE_BYTES


# -- both doors ----------------------------------------------------------------------------------------------------------


def test_both_doors(monkeypatch: pytest.MonkeyPatch, canonical_weights: None) -> None:
    monkeypatch.setattr(int4, "_BLOCK", 512)  # several blocks
    packed, scales = stored(24, 64)
    int8 = {
        "x": torch.randn(3, 64),
        "weight": torch.randint(-128, 128, (5, 64), dtype=torch.int8),
        "weight_scale": torch.rand(5),
    }
    calls = [
        *((int4_quantize, {"weight": torch.randn(24, 64), "group_size": 32, "rule": rule}) for rule in RULES),
        (int4_dequantize, {"packed": packed, "scales": scales, "group_size": 32}),
        (int4_matmul, {"x": torch.randn(3, 64), "packed": packed, "scales": scales, "group_size": 32}),
        (int8_matmul, int8),
        (expert_mlp_int4, mixing()),
        (expert_mlp_int4, mixing(0, dtype=torch.bfloat16)),
        (expert_mlp_int4_w4a8, mixing()),
        (expert_mlp_int4_w4a8, mixing(0, dtype=torch.bfloat16)),
        (expert_mlp_int4_w4a8, mixing() | {"activation_group_size": 8}),
    ]
    for operator, arguments in calls:
        check_compiles(operator, arguments)
        check_traces(operator, arguments, ("torch/eager",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_training_keeps_gradients(dtype: torch.dtype) -> None:
    arguments = mixing(dtype=dtype)
    bound = bind(expert_mlp_int4, arguments, needs_grad=True)
    torch._dynamo.reset()
    hidden = arguments["hidden"].requires_grad_()
    compiled = torch.compile(lambda values: bound(**values), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(arguments).float().sum(), hidden)
    (theirs,) = torch.autograd.grad(bound(**arguments).float().sum(), hidden)
    torch.testing.assert_close(ours, theirs)
