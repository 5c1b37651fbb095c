"""Rotary position embedding: the angles, and the rotation of pairs of channels.

Shape legend: T tokens; H heads; D channels of a head; P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_port.dispatch import operator
from glm5_port.errors import InputError
from glm5_port.operators.norm import accumulation_dtype


def rotary_angles(positions: Tensor, theta: float, dims: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, a plain function (no operator: a model computes them once a step).

    angle[t, i] = positions[t] * theta^(-2i / dims), frequency and product both in float32, as the training did and every
    engine does. Against exact arithmetic the angle is off by up to 0.004 radian at position 200,000 and 0.03 at 1,048,575
    (theta 1e6; measured). A more exact angle would be a different model: never mix the two in one cache.

    Args:
        positions: [T], any integer dtype.
        theta: the base, `rope_theta` of the config (1e6 for GLM-5 and 5.1, 8e6 for 5.2 and 5.3).
        dims: rotated channels, 2 * P; even.

    Returns:
        (cos, sin), each [T, P] float32 on the device of positions.

    Raises:
        InputError: `dims` is odd or not positive.

    Source: GLM-5 `GlmMoeDsaRotaryEmbedding` (default rope, no scaling).
    """
    if dims <= 0 or dims % 2:
        raise InputError(f"rotary_angles: dims={dims}; channels rotate in pairs, so dims must be even and positive")
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device) / dims
    angles = positions.to(torch.float32)[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def check_rotation(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> None:
    """Raises InputError unless the rotated channels lie inside x and the angles fit its tokens."""
    end = start + 2 * cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2 or x.dim() != 3 or cos.shape[0] != x.shape[0] or start < 0 or end > x.shape[-1]:
        raise InputError(
            f"rotate: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, start={start} do not fit.\n"
            "  supported: x [T, H, D], cos and sin [T, P], 0 <= start, start + 2 * P <= D"
        )


@operator(
    facts={
        "head_dim": lambda x, **_: x.shape[-1],
        "rope_dim": lambda cos, **_: 2 * cos.shape[-1],
        "interleaved": lambda interleaved, **_: interleaved,
        "start": lambda start, **_: start,
    },
    fake=lambda x, cos, sin, *, interleaved, start: x.new_empty(x.shape),
)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int) -> Tensor:
    """Rotates pairs of channels of every head by the token's angles.

    (a, b) -> (a cos - b sin, b cos + a sin), in float32 (float64 for float64 inputs) and rounded once. Pair i is channels
    (start + 2i, start + 2i + 1) when interleaved, and (start + i, start + P + i) when half-split. Each pair is written back
    to where it came from; the other channels pass through unchanged.

    Args:
        x: [T, H, D], any floating dtype.
        cos: [T, P], of `rotary_angles`.
        sin: [T, P].
        interleaved: which channels make a pair. GLM-5: True, in the attention and in the indexer.
        start: the first rotated channel. GLM-5: 0 once the rope part is split off; the indexer rotates its first 64.

    Returns:
        [T, H, D] in the dtype of x.

    Contract:
        Rows are independent; norms of pairs are kept up to rounding. NaN stays in its pair. No tokens: an empty result.
        Deterministic. Hugging Face writes all first members, then all second members (a permutation): scores q . k agree
        with it when both sides come from one implementation, cached keys do not agree element by element.

    Raises:
        InputError: shapes do not fit, or the rotated channels reach beyond D.

    Source: GLM-5 and DeepSeek-V3.2 inference code; glm5_port keeps pairs in place as vLLM and DeepSeek do.
    """
    check_rotation(x, cos, sin, start)
    pairs = cos.shape[-1]
    wide = accumulation_dtype(x)
    cos_wide, sin_wide = cos.to(wide)[:, None, :], sin.to(wide)[:, None, :]
    before, rotated, after = x.split([start, 2 * pairs, x.shape[-1] - start - 2 * pairs], dim=-1)
    rotated = rotated.to(wide)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :pairs], rotated[..., pairs:]
    turned = (first * cos_wide - second * sin_wide, second * cos_wide + first * sin_wide)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((before, joined.to(x.dtype), after), dim=-1)
