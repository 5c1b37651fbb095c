"""INT4 weights as the products read them, and the products' arithmetic.

A tile is 256 inputs of one output row: 32 words, side by side in memory, of which nibble j of word m is input 32 j + m. A shift
and a mask of all words therefore give 32 consecutive inputs, which share one scale, and which the matrix unit takes as they are:
no nibble moves between threads.

From nibble to number without a conversion: the nibble stays where it is in the word and becomes the lowest bits of the mantissa
of a float32 with a suitable exponent, 2^(23 - p) + nibble for a nibble p bits up; three of eight are shifted down first.
Subtracting 2^(23 - p) + 8 is exact, the product with the scale has at most 11 bits, and is rounded to bfloat16 once: four to
five instructions a weight. (At 4.8 TB/s the 132 multiprocessors of an H200 have about 3.4 issue slots a lane for each weight, so
a single token is bound by decoding and by memory about alike; from 64 tokens a tile the products cover it.)"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import INTERPRETED, dot_add, round_to_bfloat16

TILE = tl.constexpr(256)
RUN = tl.constexpr(32)
RUNS = tl.constexpr(8)


@triton.jit
def run_of_codes(words, J: tl.constexpr):
    """The codes -8..7 of inputs 32 J .. 32 J + 31 of tiles, float32, from words [outputs, 32]."""
    if J < 5:
        place: tl.constexpr = 4 * J
        held = words
    else:
        place: tl.constexpr = 4 * J - 20
        held = words >> 20
    bits = (held & (15 << place)) | ((150 - place) << 23)
    return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - place) + 8.0)


@triton.jit
def run_of_weights(words, scale, J: tl.constexpr):
    """bf16(q * s) of those inputs, [outputs, 32] bfloat16; scale [outputs] float32."""
    return round_to_bfloat16(run_of_codes(words, J) * scale[:, None])


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
        codes = (((words >> (4 * J)) & 15) - 8).to(tl.int8)
        return total + tl.dot(codes, inputs, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
    return multiply_add(run_of_weights(words, scale, J), inputs, total)
