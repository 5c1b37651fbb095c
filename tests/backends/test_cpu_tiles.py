"""Kernels for AMX are in the extension with the unit's own instructions. What they compute is tested over the unit's emulation
(native/tests), on machines without it; this looks at the machine code alone.

Products of tiles are told apart by the numbers of their three tiles, which are part of the instruction.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from pathlib import Path

import pytest

from glm5_port.backends.cpu.extension import isa_missing

pytestmark = [
    pytest.mark.skipif(bool(isa_missing("scalar")), reason=f"NOT TESTED: {isa_missing('scalar')}"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="NOT TESTED: AMX is an extension of x86-64"),
]

PAIRS, BYTES = "tdpbf16ps", "tdpbssd"
# VEX in three bytes (registers 0 to 7 on all sides; map 0F38; the prefix, and the right tile inverted), opcode, two tiles
ENCODINGS = {
    PAIRS: rb"\xc4\xe2([\x42\x4a\x52\x5a\x62\x6a\x72\x7a])\x5c([\xc0-\xff])",
    BYTES: rb"\xc4\xe2([\x43\x4b\x53\x5b\x63\x6b\x73\x7b])\x5e([\xc0-\xff])",
}
KERNELS = {
    "bfloat16 activations (matmul/tile_kernel.h)": (PAIRS, {(0, 4, 6), (1, 5, 6), (2, 4, 6), (3, 5, 6)}),
    "INT4 weights, 8-bit activations, 64 inputs (matmul/int4_tiles.h)": (BYTES, {(0, 4, 5), (1, 4, 5), (2, 4, 5), (3, 4, 5)}),
    "INT4 weights, 8-bit activations, 32 inputs (matmul/int4_tiles.h)": (BYTES, {(0, 6, 7), (1, 6, 7), (2, 6, 7), (3, 6, 7)}),
    "INT8 weights (matmul/int8_tiles.h)": (BYTES, {(0, 4, 6), (1, 5, 6), (2, 4, 7), (3, 5, 7)}),
    "the indexer (indexer/matrix.cpp)": (PAIRS, {(0, 6, 4), (1, 6, 5), (2, 7, 4), (3, 7, 5)}),
    "the limit of bfloat16 (limits/matrix.cpp)": (PAIRS, {(0, 6, 4), (1, 6, 5), (2, 7, 4), (3, 7, 5)}),
    "the limit of 8 bits (limits/matrix.cpp)": (BYTES, {(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)}),
}
"""Instruction, and its tiles of sums, left side and right side."""


def products(code: bytes, instruction: str) -> set[tuple[int, int, int]]:
    """The tiles that an instruction takes somewhere in `code`."""
    return {
        (found[2][0] >> 3 & 7, found[2][0] & 7, ~(found[1][0] >> 3) & 7) for found in re.finditer(ENCODINGS[instruction], code)
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_instructions_of_every_kernel_are_built(kernel: str) -> None:
    instruction, expected = KERNELS[kernel]
    spec = importlib.util.find_spec("glm5_port.backends.cpu._native")
    assert spec is not None and spec.origin is not None
    assert expected - products(Path(spec.origin).read_bytes(), instruction) == set()


def test_instructions_are_read_as_they_are_encoded() -> None:
    assert products(bytes.fromhex("c4e25b5ed5"), BYTES) == {(2, 5, 4)}  # tdpbssd tmm2, tmm5, tmm4
    assert products(bytes.fromhex("c4e25a5cd5"), PAIRS) == {(2, 5, 4)}
    assert products(bytes.fromhex("c4e25b5ed5"), PAIRS) == set()
    assert products(bytes.fromhex("c4e2595ed5"), BYTES) == set()  # tdpbusd
