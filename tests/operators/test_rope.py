"""rotate and rotary_angles: the contract, an independent formulation with complex numbers, and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.operators.rope import rotary_angles, rotate
from tests.operators.doors import BOTH, compiled, function_of, on_absent_device

TOKENS, HEADS, PAIRS = 5, 3, 4


def example(dims: int = 2 * PAIRS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HEADS, dims, generator=generator, dtype=dtype)
    return x, *(angle.double() for angle in rotary_angles(torch.arange(7, 7 + TOKENS), 1e4, 2 * PAIRS))


def rotate_as_complex(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Every channel of x rotated: a pair is one complex number, a rotation one multiplication."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None]
    result = torch.empty_like(x)
    if interleaved:
        result[..., 0::2], result[..., 1::2] = turned.real, turned.imag
    else:
        result[..., : x.shape[-1] // 2], result[..., x.shape[-1] // 2 :] = turned.real, turned.imag
    return result


@BOTH
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("start", [0, 3])
def test_equals_complex_multiplication_and_leaves_other_channels(variant: str, interleaved: bool, start: int) -> None:
    x, cos, sin = example(dims=2 * PAIRS + 7)
    result = function_of(rotate, variant)(x, cos, sin, interleaved=interleaved, start=start)
    end = start + 2 * PAIRS
    torch.testing.assert_close(result[..., start:end], rotate_as_complex(x[..., start:end], cos, sin, interleaved))
    assert torch.equal(result[..., :start], x[..., :start])
    assert torch.equal(result[..., end:], x[..., end:])


@BOTH
def test_the_two_layouts_differ(variant: str) -> None:
    x, cos, sin = example()
    interleaved = function_of(rotate, variant)(x, cos, sin, interleaved=True, start=0)
    half_split = function_of(rotate, variant)(x, cos, sin, interleaved=False, start=0)
    assert (interleaved - half_split).abs().max() > 0.1


@BOTH
def test_scores_depend_on_the_distance_only(variant: str) -> None:
    x, _, _ = example()
    query, key = x[:1], x[1:2]
    scores = []
    for offset in (0, 50):
        cos, sin = rotary_angles(torch.tensor([3 + offset, 9 + offset]), 1e4, 2 * PAIRS)
        turned = [
            function_of(rotate, variant)(side, cos[i : i + 1].double(), sin[i : i + 1].double(), interleaved=True, start=0)
            for i, side in enumerate((query, key))
        ]
        scores.append((turned[0] * turned[1]).sum(-1))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


@BOTH
def test_nan_stays_in_its_pair(variant: str) -> None:
    x, cos, sin = example()
    x[2, 1, 5] = torch.nan
    result = function_of(rotate, variant)(x, cos, sin, interleaved=True, start=0)
    assert result.isnan().nonzero().tolist() == [[2, 1, 4], [2, 1, 5]]


@BOTH
def test_gradients_are_the_inverse_rotation(variant: str) -> None:
    x, cos, sin = example()
    x.requires_grad_()
    upstream = torch.randn_like(x)
    function_of(rotate, variant)(x, cos, sin, interleaved=True, start=0).backward(upstream)
    torch.testing.assert_close(x.grad, rotate_as_complex(upstream, cos, -sin, True))


def test_scores_agree_with_hugging_face() -> None:
    modeling = pytest.importorskip("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")
    x, _, _ = example(dtype=torch.float32)
    cos, sin = rotary_angles(torch.arange(7, 7 + TOKENS), 1e4, 2 * PAIRS)
    query, key = x, x.flip(0)
    ours = [rotate.reference(side, cos, sin, interleaved=True, start=0) for side in (query, key)]
    doubled = [torch.cat((angle, angle), dim=-1)[None] for angle in (cos, sin)]
    theirs = modeling.apply_rotary_pos_emb_interleave(query[None].transpose(1, 2), key[None].transpose(1, 2), *doubled)
    their_query, their_key = (side[0].transpose(0, 1) for side in theirs)
    scores = torch.einsum("thd,shd->ths", *ours)
    torch.testing.assert_close(scores, torch.einsum("thd,shd->ths", their_query, their_key), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[0], their_query), "Hugging Face permutes channels, says the contract"


def test_angles_are_float32_and_as_far_off_as_documented() -> None:
    def error(position: int) -> float:
        cos, sin = rotary_angles(torch.tensor([position]), 1e6, 64)
        assert cos.shape == (1, 32)
        assert cos.dtype == sin.dtype == torch.float32
        exact = position * 1e6 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        return float(torch.maximum((cos - exact.cos()).abs(), (sin - exact.sin()).abs()).max())

    assert error(100) < 1e-5
    assert error(200_000) < 0.005
    assert 0.005 < error(1_048_575) < 0.035


def test_wrong_shapes_are_refused() -> None:
    x, cos, sin = example()
    for wrong in ({"start": 1}, {"start": -1}, {"cos": cos[:2]}, {"x": x[0]}):
        for variant in ("reference", "torch/eager"):
            with pytest.raises(InputError, match="supported: x"):
                function_of(rotate, variant)(**{"x": x, "cos": cos, "sin": sin, "interleaved": True, "start": 0} | wrong)
    for dims in (0, 7):
        with pytest.raises(InputError, match="even"):
            rotary_angles(torch.arange(3), 1e4, dims)


def test_no_host_sync_and_compiles() -> None:
    x, cos, sin = example()
    call = {"x": x, "cos": cos, "sin": sin, "interleaved": True, "start": 0}
    result, _ = on_absent_device(rotate, call)
    assert result.shape == x.shape
    torch.testing.assert_close(compiled(rotate, call), rotate.reference(**call))
