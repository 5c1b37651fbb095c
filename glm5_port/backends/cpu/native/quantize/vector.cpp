// The quantiser in vectors. A quotient is a product with the reciprocal, rounded to the grid 2^-12 and then to a whole number:
// quant/int4.py says why no rounding on the way can show.
#include "parallel.h"
#include "quantize/quantize.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr float snap = 1.5f * 2048.0f;  // adding and subtracting it rounds to multiples of 2^-12
constexpr int64_t rows_of_block = 16;
constexpr int32_t nan_bits = 0x7F810000;

// Magnitude bits of bf16(x) in the upper half of each lane; NaN is some pattern above infinity's.
inline I32 magnitude(const bf16* from) { return bits_of(F32::load(from)) & I32::broadcast(INT32_MAX); }
inline I32 magnitude(const float* from) {
  const I32 bits = minimum(bits_of(F32::load(from)) & I32::broadcast(INT32_MAX), I32::broadcast(nan_bits));
  const I32 odd = shift_right<16>(bits) & I32::broadcast(1);
  return (bits + I32::broadcast(0x7FFF) + odd) & I32::broadcast(INT32_MAX ^ 0xFFFF);
}

inline F32 weights(const bf16* from) { return F32::load(from); }
inline F32 weights(const float* from) { return rounded_to_bf16(F32::load(from)); }

// Eight codes q + 8, a byte each, as one canonical word.
inline uint32_t word_of(const int8_t* codes) {
  uint64_t bytes;
  std::memcpy(&bytes, codes, 8);
  return static_cast<uint32_t>(_pext_u64(bytes, 0x0F0F0F0F0F0F0F0F));
}

// Codes q + 8 of a group, a byte each; with `measured`, what they cost. Only for groups of the ordinary range.
template <bool measured, class T>
void quantize_group(const T* members, int64_t size, int32_t amax, float s, int8_t* codes, QuantizeStatistics& statistics) {
  const F32 reciprocal = F32::broadcast(1.0f / s), scale = F32::broadcast(s), grid = F32::broadcast(snap);
  F32 errors = F32::zero(), worst = F32::zero(), sizes = F32::zero();
  I32 limits = I32::broadcast(0);
  for (int64_t i = 0; i < size; i += F32::width) {
    const F32 w = weights(members + i);
    const F32 q = round_to_even((w * reciprocal + grid) - grid);
    (to_int(q) + I32::broadcast(8)).store(codes + i);
    if (measured) {
      const F32 error = absolute(w - rounded_to_bf16(q * scale));
      errors = errors + error;
      worst = maximum(worst, error);
      sizes = sizes + absolute(w);
      limits = limits + shift_right<3>(to_int(absolute(q)) + I32::broadcast(1));  // 1 where |q| is 7
    }
  }
  if (measured) {
    statistics.at_limit += static_cast<int64_t>(to_float(limits).sum());
    statistics.error_sum += errors.sum();
    statistics.magnitude_sum += sizes.sum();
    const float share = worst.largest() / float_of(static_cast<uint32_t>(amax) << 16);
    if (share > statistics.max_error) statistics.max_error = share;
  }
}

// Groups that are all zeros, too small or not finite: every code is 0, and what is lost is the weight itself.
template <bool measured, class T>
void zero_group(const T* members, int64_t size, int32_t amax, int8_t* codes, QuantizeStatistics& statistics) {
  std::memset(codes, 8, size);
  if (!measured || amax == 0) {
    statistics.zero_groups += amax == 0;
    return;
  }
  statistics.tiny_groups += amax < smallest_amax;
  statistics.refused |= amax > largest_amax;
  F32 sizes = F32::zero();
  for (int64_t i = 0; i < size; i += F32::width) sizes = sizes + absolute(weights(members + i));
  statistics.error_sum += sizes.sum();
  statistics.magnitude_sum += sizes.sum();
}

template <bool measured, class T>
void quantize_row(const QuantizeCall& call, int64_t row, int8_t* codes) {
  const T* weight = static_cast<const T*>(call.weight) + row * call.stride;
  const int64_t size = call.group, groups = call.width / size;
  uint32_t* words = call.packed + row * (call.width / 8);
  bf16* scales = call.scales + row * groups;
  QuantizeStatistics statistics;
  for (int64_t group = 0; group < groups; ++group) {
    const T* members = weight + group * size;
    I32 largest = I32::broadcast(0);
    for (int64_t i = 0; i < size; i += F32::width) largest = maximum(largest, magnitude(members + i));
    const int32_t amax = largest.largest() >> 16;
    const bf16 scale = scales[group] = scale_of(amax);
    if (amax >= smallest_amax && amax <= largest_amax) {
      quantize_group<measured>(members, size, amax, widen(scale), codes, statistics);
    } else {
      zero_group<measured>(members, size, amax, codes, statistics);
    }
    if (measured) statistics.fp16_unsafe_scales += !fits_fp16(scale);
    for (int64_t i = 0; i < size; i += 8) *words++ = word_of(codes + i);
  }
  if (measured) statistics.store(call.statistics + row * statistics_count);
}

template <class T>
void quantize_rows(const QuantizeCall& call, int64_t first, int64_t last) {
  const Buffer<int8_t> codes(call.group);
  for (int64_t row = first; row < last; ++row) {
    call.statistics ? quantize_row<true, T>(call, row, codes) : quantize_row<false, T>(call, row, codes);
  }
}

void int4_quantize(const QuantizeCall& call) {
  if (call.group % F32::width) return scalar::quantize.int4_quantize(call);  // half a vector is not worth a kernel
  parallel_for(call.threads, blocks_of(call.rows, rows_of_block), [&](int64_t block) {
    const int64_t first = block * rows_of_block, last = smaller(first + rows_of_block, call.rows);
    call.is_bf16 ? quantize_rows<bf16>(call, first, last) : quantize_rows<float>(call, first, last);
  });
}

}  // namespace

namespace GLM5_ISA {
const QuantizeKernels quantize = {int4_quantize};
}
}  // namespace glm5
