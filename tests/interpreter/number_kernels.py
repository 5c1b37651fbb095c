"""Kernels that pass numbers through the house helpers, for test_numbers."""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import (
    dot,
    dot_add,
    from_e4m3,
    narrow,
    power_of_two_scale,
    to_e4m3,
)


@triton.jit
def multiply(a, b, total, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    places = m[:, None] * N + n[None, :]
    if ADD:
        tl.store(out + places, dot_add(left, right, tl.load(total + places)))
    else:
        tl.store(out + places, dot(left, right))


@triton.jit
def each(x, y, HELPER: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places)
    if HELPER == "narrow":
        result = narrow(value, y.dtype.element_ty)
    elif HELPER == "to_e4m3":
        result = to_e4m3(value)
    elif HELPER == "from_e4m3":
        result = from_e4m3(value)
    else:
        result = power_of_two_scale(value)
    tl.store(y + places, result)
