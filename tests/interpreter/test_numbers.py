"""The house helpers of kernels over the bit patterns that matter, against torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import launch
from glm5_port.operators.cache_layouts import power_of_two_scale, to_e4m3
from tests.interpreter import number_kernels

LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def run(helper: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    block = min(x.numel(), 2**14)
    assert x.numel() % block == 0
    launch(number_kernels.each, (x.numel() // block,), x, y, HELPER=helper, BLOCK=block)
    return y


def every_upper_half() -> Tensor:
    """float32 numbers of every sign, exponent and upper mantissa, with lower halves around the ties of rounding to bfloat16."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    bits = (upper | torch.tensor(LOW_HALVES)).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def check(ours: Tensor, theirs: Tensor) -> None:
    """The same bits, where a NaN may be any NaN."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    numbers = ~theirs.isnan()
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours[numbers].view(size), theirs[numbers].view(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = every_upper_half()
    check(run("narrow", x, dtype), x.to(dtype))


def test_e4m3_codes_of_every_float() -> None:
    # Beside the ties of bfloat16, those of e4m3 at every exponent: a mantissa of 3 bits, a half, and one above and below it.
    upper = (torch.arange(2**12, dtype=torch.int64)[:, None] << 20) | torch.tensor([0, 0x7FFFF, 0x80000, 0x80001])
    upper = torch.where(upper >= 2**31, upper - 2**32, upper).to(torch.int32).view(torch.float32).flatten()
    subnormals = torch.arange(2**14) / 2.0**16  # every quarter of a step up to the first normal codes, with its ties
    x = torch.cat((every_upper_half(), upper, subnormals, -subnormals))
    ours, theirs = run("to_e4m3", x, torch.uint8), to_e4m3(x)
    nan = x.isnan()
    assert torch.equal(ours[~nan], theirs[~nan])
    assert ((ours[nan] & 0x7F) == 0x7F).all()


def test_e4m3_reads_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    check(run("from_e4m3", codes, torch.float32), codes.view(torch.float8_e4m3fn).to(torch.float32))


def test_scales_are_powers_of_two() -> None:
    x = every_upper_half()
    amax = torch.where(x.isnan(), x, x.abs().clamp_min(1e-4))
    check(run("power_of_two_scale", amax, torch.float32), power_of_two_scale(amax))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype, add: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b, total = (torch.randn(shape, generator=generator) for shape in ((16, 32), (32, 16), (16, 16)))
    a, b, out = a.to(dtype), b.to(dtype), torch.empty(16, 16)
    launch(number_kernels.multiply, (1,), a, b, total, out, M=16, K=32, N=16, ADD=add)
    torch.testing.assert_close(out.double(), a.double() @ b.double() + (total.double() if add else 0), rtol=2e-6, atol=4e-6)
