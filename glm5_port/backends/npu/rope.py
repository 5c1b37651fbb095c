"""rotate by npu_rotary_mul, in float32: the vendor wants angles in the dtype of the channels, and 16 bits would round them.

Shape legend: T tokens; H heads; D channels of a head; P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import FLOATING
from glm5_port.backends.npu.contracts.small import ROTARY_MUL
from glm5_port.backends.npu.rules import Needs, aclnn, call, dtype_among
from glm5_port.operators.rope import check_rotation, rotate


def both_channels(angles: Tensor, *, interleaved: bool) -> Tensor:
    """[T, P] for pairs to [T, 2 P] for channels, in the order in which the pairs lie."""
    return angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)


@aclnn(rotate, Needs((ROTARY_MUL,), (dtype_among(*FLOATING),)))
def rotate_aclnn(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
    check_rotation(x, cos, sin, start)
    end = start + 2 * cos.shape[-1]
    if x.shape[:2].numel() == 0 or start == end:
        return x.clone(memory_format=torch.contiguous_format)
    turned_TH1D = call(
        ROTARY_MUL,
        x[..., start:end].to(torch.float32).contiguous().unsqueeze(2),
        both_channels(cos.to(torch.float32), interleaved=interleaved)[:, None, None, :],
        both_channels(sin.to(torch.float32), interleaved=interleaved)[:, None, None, :],
        rotary_mode="interleave" if interleaved else "half",
    )
    return torch.cat((x[..., :start], turned_TH1D.squeeze(2).to(x.dtype), x[..., end:]), dim=-1)
