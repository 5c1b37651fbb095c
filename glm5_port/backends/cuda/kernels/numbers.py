"""House helpers of every kernel: products and roundings that are right both compiled and interpreted, and the 8-bit codes.

Triton's interpreter computes with numpy, which has no bfloat16: it holds the bits as 16-bit integers, multiplies those as
integers, and cuts the low bits off where a float32 should be rounded, all without an error. Reading bfloat16 into float32 is
exact. So: products through `dot`, roundings through `narrow`, and arithmetic in float32.

e4m3 codes are handled as the integers they are: cards before 8.9 have no instruction for them, and the interpreter reads two of
the 256 codes wrong.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.triton_support import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b):
    """[M, K] by [K, N] -> [M, N] float32: exact products of 16-bit numbers, and of float32 in IEEE mode, summed in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, total):
    """total + dot(a, b), summed in the accumulators of the matrix unit."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to_bfloat16(x):
    """float32 to bfloat16, to nearest, ties to even; NaN stays NaN."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(x == x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded once to `dtype`: float32, float16 or bfloat16."""
    if dtype == tl.bfloat16:
        return round_to_bfloat16(x)
    return x.to(dtype)


@triton.jit
def from_e4m3(codes):
    """e4m3 bytes (uint8) to float32, exactly. The bits fit float32, whose exponents begin 2^120 lower; 0x7F and 0xFF are NaN."""
    wide = codes.to(tl.int8, bitcast=True).to(tl.int32)
    bits = (wide << 20) & -0x78100000  # 0x87F00000: the sign, which was spread over the upper bits, and the other seven
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def to_e4m3(x):
    """float32 to e4m3 bytes (uint8), to nearest, ties to even, saturating at 448; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    large = magnitude.to(tl.uint32, bitcast=True)
    normal = ((large + 0x7FFFF + ((large >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14 leaves the multiples of 2^-9, which subnormal codes count, in the lowest bits of the sum.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0.015625, small, normal)
    return (tl.where(x == x, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def power_of_two_scale(amax):
    """2^ceil(log2(amax / 448)) on the bits of the float32, as `cache_layouts.power_of_two_scale`; not finite stays what it is."""
    bits = tl.div_rn(amax, 448.0).to(tl.uint32, bitcast=True)
    rounded_up = ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(amax) < float("inf"), rounded_up, amax)
