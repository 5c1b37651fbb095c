"""Other formats' layouts: golden bits by hand, there and back, and as others' programs read them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.quant import Int4Rule, Int4Tensor, quantize, unpack_int4
from glm5_port.quant.layouts import (
    exact_float16,
    from_awq,
    from_gptq,
    from_q4_0,
    to_awq,
    to_gptq,
    to_q4_0,
)

COUNTING = torch.arange(-8, 8, dtype=torch.int8)


def made(*shape: int, group_size: int = 32, rule: str = "amax7") -> Int4Tensor:
    return quantize(torch.randn(shape) * 0.02, Int4Rule(rule, group_size))


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def wide(tensor: Int4Tensor) -> Tensor:
    """q * s in float32."""
    return tensor.codes.float() * tensor.scales.float().repeat_interleave(tensor.rule.group_size, -1)


def test_gptq_by_hand():
    """Two words down the inputs; zeros 8 stored as 7; columns are outputs."""
    codes = torch.zeros(8, 16, dtype=torch.int8)
    codes[1] = COUNTING
    scales = torch.full((8, 2), 0.5).bfloat16()
    scales[1, 1] = 2.0
    tensors = to_gptq(codes, scales, name="w")
    assert tensors["qweight"].shape == (2, 8)
    assert tensors["qweight"][:, 0].tolist() == [signed(0x88888888)] * 2
    assert tensors["qweight"][:, 1].tolist() == [0x76543210, signed(0xFEDCBA98)]
    assert tensors["qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert to_gptq(codes, scales, name="w", version=2)["qzeros"].tolist() == [[signed(0x88888888)]] * 2
    assert tensors["scales"].dtype == torch.float16
    assert tensors["scales"][:, 1].tolist() == [0.5, 2.0]
    assert tensors["g_idx"].tolist() == [0] * 8 + [1] * 8


def test_awq_by_hand():
    """Outputs 0 2 4 6 1 3 5 7 from the lowest bits up."""
    codes = COUNTING[:8].unsqueeze(1).expand(8, 8).contiguous()
    tensors = to_awq(codes, torch.ones(8, 1).bfloat16(), name="w")
    assert tensors["qweight"].tolist() == [[0x75316420]] * 8
    assert tensors["qzeros"].tolist() == [[signed(0x88888888)]]
    assert tensors["scales"].tolist() == [[1.0] * 8]


def test_q4_0_by_hand():
    codes = torch.cat((COUNTING, COUNTING.flip(0))).unsqueeze(0)
    (block,) = to_q4_0(codes, torch.tensor([[0.5]]).bfloat16(), name="w").tolist()
    assert block[:2] == [0x00, 0x38]  # float16 0.5
    assert block[2:] == [j | (15 - j) << 4 for j in range(16)]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rule", ["amax7", "signed8"])
def test_there_and_back(group_size, rule):
    tensor = made(24, 256, group_size=group_size, rule=rule)
    for version in (1, 2):
        stored = to_gptq(tensor.codes, tensor.scales, name="w", version=version)
        codes, scales = from_gptq(**stored, name="w", version=version)
        assert torch.equal(codes, tensor.codes)
        assert torch.equal(scales.bfloat16(), tensor.scales)
    codes, scales = from_awq(**to_awq(tensor.codes, tensor.scales, name="w"), name="w")
    assert torch.equal(codes, tensor.codes)
    assert torch.equal(scales.bfloat16(), tensor.scales)
    codes, scales = from_q4_0(to_q4_0(tensor.codes, tensor.scales, name="w"))
    assert torch.equal(codes, tensor.codes)
    assert torch.equal(scales.bfloat16(), tensor.scales.repeat_interleave(group_size // 32, 1))


def test_gguf_reads_our_blocks():
    tensor = made(3, 16, 128)
    blocks = to_q4_0(tensor.codes, tensor.scales, name="w")
    assert blocks.shape == gguf.quant_shape_to_byte_shape((3, 16, 128), gguf.GGMLQuantizationType.Q4_0)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(theirs, wide(tensor).numpy())


def test_compressed_tensors_reads_our_awq():
    tensor = made(24, 128)
    stored = {f"m.{name}": value for name, value in to_awq(tensor.codes, tensor.scales, name="w").items()}
    converted = AutoAWQConverter(group_size=32).process(stored)
    assert torch.equal(unpack_int4(converted["m.weight_packed"]), tensor.codes)
    assert torch.equal(converted["m.weight_scale"].bfloat16(), tensor.scales)
    assert (unpack_int4(converted["m.weight_zero_point"].t().contiguous()) == 0).all()


def test_float16_holds_what_the_text_says():
    bits = torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16)
    scales = bits[(bits.float() >= 2.0**-17) & (bits.float() <= 65504)]
    assert torch.equal(exact_float16(scales, name="w").bfloat16(), scales)
    for wrong in (1.0078125 * 2.0**-18, 2.0**-25, 65536.0):
        with pytest.raises(InputError, match=r"experts\.3: 1 of 4 scales are no float16 numbers, first \[1, 0\]"):
            exact_float16(torch.tensor([[1.0, 1.0], [wrong, 1.0]]).bfloat16(), name="experts.3")


def test_what_cannot_be_carried_is_refused():
    tensor = made(24, 128)
    stored = to_gptq(tensor.codes, tensor.scales, name="w")
    with pytest.raises(InputError, match="w: its zeros are not all 8"):
        from_gptq(**{**stored, "qzeros": stored["qzeros"] + 1}, name="w")
    with pytest.raises(InputError, match="w: its zeros are not all 8"):
        from_gptq(**stored, name="w", version=2)
    with pytest.raises(InputError, match="activation order"):
        from_gptq(**{**stored, "g_idx": stored["g_idx"].flip(0)}, name="w")
    with pytest.raises(InputError, match="zeros are not all 8"):
        from_awq(stored["qweight"], stored["qzeros"], stored["scales"], name="w")
    with pytest.raises(InputError, match="GPTQ version 3"):
        to_gptq(tensor.codes, tensor.scales, name="w", version=3)
    with pytest.raises(InputError, match="multiple of 8 outputs"):
        to_awq(tensor.codes[:20], tensor.scales[:20], name="w")
    with pytest.raises(InputError, match="groups of 16 are not of whole blocks"):
        to_q4_0(**{k: getattr(made(4, 64, group_size=16), k) for k in ("codes", "scales")}, name="w")
