"""INT4 weights as the products read them, and the products' arithmetic.

A tile is 128 inputs of one output row: 16 words, side by side in memory, of which nibbles i and i + 4 of word m are the inputs
32 i + 2 m and 32 i + 2 m + 1. A shift and a mask of all words give 32 consecutive inputs, two in each word 16 bits apart, which
is how the matrix unit wants them: no nibble moves between threads. 32 inputs share one scale.

From nibble to bfloat16 without a conversion, two weights an instruction: over 0x4300, the bits of 128, a nibble makes 128 +
nibble. Subtracting 136 is exact, and the product with the scale is rounded once: bf16(q * s). On Hopper that is 2.4 instructions
a weight (counted in machine code: 64 LOP3, 32 HADD2, 32 HMUL2 and 24 shifts for 64 weights). At 4.8 TB/s the 132 multiprocessors
of an H200 have 3.4 issue slots a lane for each weight; what is left must do for loads, scales and products."""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import INTERPRETED, dot_add, round_to_bfloat16

TILE = tl.constexpr(128)
WORDS = tl.constexpr(16)
RUN = tl.constexpr(32)
RUNS = tl.constexpr(4)


@triton.jit
def side_by_side(even, odd):
    """[outputs, 16] twice -> [outputs, 32], in turn."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def run_of_weights(words, scale, J: tl.constexpr):
    """bf16(q * s) of inputs 32 J .. 32 J + 31 of tiles, [outputs, 32], from words [outputs, 16] and scale [outputs] bfloat16."""
    pairs = ((words >> (4 * J)) & 0x000F000F) | 0x43004300
    even = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    odd = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRETED:
        wide = scale.to(tl.float32)[:, None]
        even = round_to_bfloat16((even.to(tl.float32) - 136.0) * wide)
        odd = round_to_bfloat16((odd.to(tl.float32) - 136.0) * wide)
    else:
        middle = tl.full((1, 1), 136.0, tl.bfloat16)
        even = (even - middle) * scale[:, None]
        odd = (odd - middle) * scale[:, None]
    return side_by_side(even, odd)


@triton.jit
def run_of_codes(words, J: tl.constexpr):
    """The codes -8..7 of the same inputs, int8."""
    pairs = words >> (4 * J)
    return side_by_side(((pairs & 15) - 8).to(tl.int8), (((pairs >> 16) & 15) - 8).to(tl.int8))


@triton.jit
def multiply_add(weight, x, total):
    """total + weight x, for bfloat16 weights of any source and x in the dtype of the activations.

    float16 activations do not narrow the weight: the numbers of both formats have at most 11 bits and the exponents of float32,
    so that their TF32 products are exact."""
    if x.dtype == tl.bfloat16:
        return dot_add(weight, x, total)
    if INTERPRETED or x.dtype == tl.float32:
        return dot_add(weight.to(tl.float32), x.to(tl.float32), total)
    return tl.dot(weight.to(tl.float32), x.to(tl.float32), total, input_precision="tf32")


@triton.jit
def add_run(words, scale, inputs, total, J: tl.constexpr):
    """total + W inputs for inputs 32 J .. 32 J + 31 of tiles.

    Inputs in floating point meet bf16(q * s). int8 inputs meet q, in whole numbers, and their sum the scale."""
    if inputs.dtype == tl.int8:
        sums = tl.dot(run_of_codes(words, J), inputs, out_dtype=tl.int32)
        return total + sums.to(tl.float32) * scale.to(tl.float32)[:, None]
    return multiply_add(run_of_weights(words, scale, J), inputs, total)
