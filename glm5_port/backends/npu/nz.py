"""The vendor's blocked format of matrices."""

from __future__ import annotations

from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import FRACTAL_NZ
from glm5_port.backends.npu.contracts.small import FORMAT_CAST
from glm5_port.backends.npu.machine import torch_npu
from glm5_port.backends.npu.rules import call


def to_nz(matrix: Tensor) -> Tensor:
    """A dense matrix in the blocked format, which torch_npu only keeps when told that it may."""
    torch_npu().npu.config.allow_internal_format = True
    cast: Tensor = call(FORMAT_CAST, matrix, FRACTAL_NZ)
    return cast
