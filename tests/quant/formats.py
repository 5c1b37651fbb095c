"""What the tests of the formats share: codes and scales that tell every place from every other, and a source to export."""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.quant.packing import pack_int4


def numbered(outputs: int, inputs: int, groups: int) -> tuple[Tensor, Tensor]:
    """Codes -8..7 without a pattern that a wrong order would keep, and scales that bfloat16 and float16 hold exactly."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand((outputs, groups), generator=generator).add_(0.01).to(torch.bfloat16)
    return codes, scales


def nibbles(word: int) -> list[int]:
    """The eight unsigned nibbles of an int32 word, lowest bits first."""
    return [(word >> (4 * place)) & 15 for place in range(8)]


def words(outputs: int, inputs: int, groups: int) -> tuple[Tensor, Tensor]:
    """As `numbered`, with the codes in canonical words."""
    codes, scales = numbered(outputs, inputs, groups)
    return pack_int4(codes), scales
