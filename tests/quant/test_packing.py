"""The canonical bit layout: by hand, against plain Python, and as compressed-tensors reads it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from glm5_port.errors import InputError
from glm5_port.quant import Int4Rule, as_bytes, from_bytes, pack_int4, quantize, unpack_int4


def test_one_word_by_hand():
    """Element 0 in the lowest four bits, stored as q + 8."""
    codes = torch.tensor([-8, -7, -1, 0, 1, 2, 6, 7], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [0xFEA98710 - 2**32]
    assert as_bytes(pack_int4(codes)).tolist() == [0x10, 0x87, 0xA9, 0xFE]


def test_every_code_in_every_place():
    codes = torch.randint(-8, 8, (3, 5, 64), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, 5, 8)
    for row, words in zip(codes.view(15, 64).tolist(), packed.view(15, 8).tolist(), strict=True):
        for m, word in enumerate(words):
            assert word % 2**32 == sum((q + 8) << 4 * j for j, q in enumerate(row[8 * m : 8 * m + 8]))
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(from_bytes(as_bytes(packed)), packed)


def test_strided_words_and_codes():
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    wide = torch.zeros(6, 128, dtype=torch.int8)
    wide[:, ::2] = codes
    assert torch.equal(pack_int4(wide[:, ::2]), pack_int4(codes))
    words = pack_int4(codes)
    assert torch.equal(unpack_int4(words[::2]), codes[::2])
    assert torch.equal(unpack_int4(words.t().contiguous().t()), codes)


def test_a_code_out_of_range_stays_out_of_its_neighbours():
    codes = torch.zeros(8, dtype=torch.int8)
    codes[3] = 100
    assert unpack_int4(pack_int4(codes))[[0, 1, 2, 4, 5, 6, 7]].tolist() == [0] * 7


def test_no_rows():
    assert pack_int4(torch.zeros(0, 64, dtype=torch.int8)).shape == (0, 8)
    assert unpack_int4(torch.zeros(0, 8, dtype=torch.int32)).shape == (0, 64)
    assert unpack_int4(torch.zeros(0, 16, dtype=torch.int32)[:, ::2]).shape == (0, 64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_int4(torch.zeros(2, 12, dtype=torch.int8)),
        lambda: pack_int4(torch.zeros(2, 16)),
        lambda: pack_int4(torch.zeros((), dtype=torch.int8)),
        lambda: unpack_int4(torch.zeros(2, 16, dtype=torch.uint8)),
        lambda: from_bytes(torch.zeros(2, 6, dtype=torch.uint8)),
        lambda: from_bytes(torch.zeros(2, 8, dtype=torch.int8)),
    ],
)
def test_other_shapes_and_dtypes_are_refused(call):
    with pytest.raises(InputError):
        call()


@pytest.mark.parametrize(("rule", "group"), [("amax7", 32), ("amax7", 64), ("amax7", 128), ("amax7", -1), ("signed8", 32)])
def test_compressed_tensors_decodes_the_same_values(rule, group):
    weight = torch.randn(48, 256)
    weight[3] = 0
    made = quantize(weight, Int4Rule(rule, group))
    arguments = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored = {
        "weight_packed": made.packed(),
        "weight_scale": made.scales,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    judge = BaseCompressor.get_value_from_registry("pack-quantized")
    assert torch.equal(judge.decompress(stored, scheme)["weight"], made.dequantize())
