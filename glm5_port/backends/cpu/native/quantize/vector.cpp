// The quantiser in vectors. A quotient is a product with the reciprocal, rounded to the grid 2^-12 and then to a whole number:
// quant/int4.py says why no rounding on the way can show.
#include <cmath>

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

// -- codes q, a byte each, as canonical words --------------------------------------------------------------------------

constexpr uint32_t offset = 0x88888888;  // adds 8 to the four low bits of each of eight codes, which is what q + 8 leaves of them

inline uint32_t word_of(const int8_t* codes) {
  uint64_t bytes;
  std::memcpy(&bytes, codes, 8);
  return static_cast<uint32_t>(_pext_u64(bytes, 0x0F0F0F0F0F0F0F0F)) ^ offset;
}

// A product with 1 and 16 and a sum make one byte of two codes.
#if defined(__AVX512F__)
constexpr int64_t codes_together = 64;
inline void store_words(const int8_t* codes, uint32_t* words) {
  const __m512i nibbles = _mm512_and_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(15));
  const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(nibbles, _mm512_set1_epi16(0x1001)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_xor_si256(bytes, _mm256_set1_epi32(static_cast<int32_t>(offset))));
}
inline int limits_among(const int8_t* codes) {
  return __builtin_popcountll(_mm512_cmpeq_epi8_mask(_mm512_abs_epi8(_mm512_loadu_si512(codes)), _mm512_set1_epi8(7)));
}
#else
constexpr int64_t codes_together = 32;
inline void store_words(const int8_t* codes, uint32_t* words) {
  const __m256i nibbles = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm_xor_si128(bytes, _mm_set1_epi32(static_cast<int32_t>(offset))));
}
inline int limits_among(const int8_t* codes) {
  const __m256i sizes = _mm256_abs_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  return __builtin_popcount(_mm256_movemask_epi8(_mm256_cmpeq_epi8(sizes, _mm256_set1_epi8(7))));
}
#endif

// `count` is a multiple of 8.
inline void pack_codes(const int8_t* codes, int64_t count, uint32_t* words) {
  int64_t i = 0;
  for (; i + codes_together <= count; i += codes_together) store_words(codes + i, words + i / 8);
  for (; i < count; i += 8) words[i / 8] = word_of(codes + i);
}

// Codes of magnitude 7.
inline int64_t limits_of(const int8_t* codes, int64_t count) {
  int64_t limits = 0, i = 0;
  for (; i + codes_together <= count; i += codes_together) limits += limits_among(codes + i);
  for (; i < count; ++i) limits += codes[i] == 7 || codes[i] == -7;
  return limits;
}

// -- some groups together ----------------------------------------------------------------------------------------------

// Lane g: the largest lane of vector g.
#if defined(__AVX512F__)
inline __m512i of_four(const I32* x) {  // of each quarter of four vectors
  const __m512i first = _mm512_max_epi32(_mm512_unpacklo_epi32(x[0].v, x[1].v), _mm512_unpackhi_epi32(x[0].v, x[1].v));
  const __m512i second = _mm512_max_epi32(_mm512_unpacklo_epi32(x[2].v, x[3].v), _mm512_unpackhi_epi32(x[2].v, x[3].v));
  return _mm512_max_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}
inline __m512i of_quarters(__m512i a, __m512i b) { return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD)); }
inline I32 largest_of_each(const I32 (&x)[I32::width]) {
  return {of_quarters(of_quarters(of_four(x), of_four(x + 4)), of_quarters(of_four(x + 8), of_four(x + 12)))};
}
#else
inline __m256i of_four(const I32* x) {  // of each half of four vectors
  const __m256i first = _mm256_max_epi32(_mm256_unpacklo_epi32(x[0].v, x[1].v), _mm256_unpackhi_epi32(x[0].v, x[1].v));
  const __m256i second = _mm256_max_epi32(_mm256_unpacklo_epi32(x[2].v, x[3].v), _mm256_unpackhi_epi32(x[2].v, x[3].v));
  return _mm256_max_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
}
inline I32 largest_of_each(const I32 (&x)[I32::width]) {
  const __m256i a = of_four(x), b = of_four(x + 4);
  return {_mm256_max_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31))};
}
#endif

// seventh_bits of quantize.h in each lane.
inline I32 seventh_bits(I32 amax) {
  const I32 mantissa = I32::broadcast(128) + (amax & I32::broadcast(127)), limit = I32::broadcast(224);
  const I32 scaled = choose_greater(limit, mantissa, shift_left<4>(mantissa), shift_left<3>(mantissa));
  const I32 rounded = shift_right<16>((scaled + I32::broadcast(7)) * I32::broadcast(4682));
  return amax - mantissa + rounded - choose_greater(limit, mantissa, I32::broadcast(3 << 7), I32::broadcast(2 << 7));
}

// What rounding costs, summed in lanes.
struct Cost {
  F32 errors = F32::zero(), sizes = F32::zero(), worst = F32::zero();

  void join(QuantizeStatistics& statistics) const {
    statistics.error_sum += errors.sum();
    statistics.magnitude_sum += sizes.sum();
  }
};

constexpr float magnitudes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};

// Codes q of a group, a byte each; with `measured`, what they cost. A reciprocal of 0 makes all codes 0.
template <bool measured, class T>
inline void quantize_group(const T* members, int64_t size, F32 reciprocal, F32 scale, int8_t* codes, Cost& cost) {
  const F32 grid = F32::broadcast(snap), values = rounded_to_bf16(F32::load(magnitudes) * scale);
  for (int64_t i = 0; i < size; i += F32::width) {
    const F32 w = weights(members + i);
    const I32 q = to_int(multiply_add(w, reciprocal, grid) - grid);  // rounds half to even
    q.store(codes + i);
    if (measured) {  // a code has the sign of its weight, or is 0
      const F32 magnitude = absolute(w), error = absolute(magnitude - lane_of_eight(values, absolute(q)));
      cost.errors = cost.errors + error;
      cost.sizes = cost.sizes + magnitude;
      cost.worst = maximum(cost.worst, error);
    }
  }
}

inline int64_t scales_beyond_fp16(const bf16* scales, int64_t count) {
  int64_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond += !fits_fp16(scales[i]);
  return beyond;
}

// As many groups as a vector has lanes; false, with nothing done, if one of them cannot be held.
template <bool measured, class T>
bool quantize_groups(const T* members, int64_t size, int8_t* codes, bf16* scales, QuantizeStatistics& statistics) {
  I32 largest[I32::width];
#pragma GCC unroll 4
  for (int group = 0; group < I32::width; ++group) {
    const T* own = members + group * size;
    largest[group] = magnitude(own);
    for (int64_t i = I32::width; i < size; i += I32::width) largest[group] = maximum(largest[group], magnitude(own + i));
  }
  const I32 amax = shift_right<16>(largest_of_each(largest)), least = I32::broadcast(smallest_amax), zero = I32::broadcast(0);
  if (amax.largest() > largest_amax) return false;
  const F32 scale = float_of(shift_left<16>(choose_greater(least, amax, I32::broadcast(127 << 7), seventh_bits(amax))));
  scale.store(scales);
  float reciprocals[F32::width], factors[F32::width];
  scale.store(factors);
  float_of(choose_greater(least, amax, zero, bits_of(F32::broadcast(1.0f) / scale))).store(reciprocals);
  Cost cost;
#pragma GCC unroll 4
  for (int group = 0; group < I32::width; ++group) {
    cost.worst = F32::zero();
    const F32 reciprocal = F32::broadcast(reciprocals[group]), factor = F32::broadcast(factors[group]);
    quantize_group<measured>(members + group * size, size, reciprocal, factor, codes + group * size, cost);
    largest[group] = bits_of(cost.worst);  // floats that are not negative stand in the order of their bits
  }
  if (measured) {
    cost.join(statistics);
    const I32 ones = I32::broadcast(1), zeros = choose_greater(ones, amax, ones, zero);
    statistics.zero_groups += static_cast<int64_t>(to_float(zeros).sum());
    statistics.tiny_groups += static_cast<int64_t>(to_float(choose_greater(least, amax, ones, zero) - zeros).sum());
    const F32 share = float_of(largest_of_each(largest)) / float_of(shift_left<16>(maximum(amax, least)));
    statistics.max_error = std::fmax(statistics.max_error, float_of(choose_greater(least, amax, zero, bits_of(share))).largest());
  }
  return true;
}

// Groups that are too small or cannot be held: every code is 0, and what is lost is the weight itself.
template <bool measured, class T>
void zero_group(const T* members, int64_t size, int32_t amax, int8_t* codes, QuantizeStatistics& statistics) {
  std::memset(codes, 0, size);
  if (!measured) return;
  statistics.zero_groups += amax == 0;
  statistics.tiny_groups += amax > 0 && amax < smallest_amax;
  statistics.refused |= amax > largest_amax;
  Cost cost;
  for (int64_t i = 0; i < size; i += F32::width) cost.sizes = cost.sizes + absolute(weights(members + i));
  cost.errors = cost.sizes;
  cost.join(statistics);
}

template <bool measured, class T>
bf16 quantize_one(const T* members, int64_t size, int8_t* codes, QuantizeStatistics& statistics) {
  I32 largest = I32::broadcast(0);
  for (int64_t i = 0; i < size; i += F32::width) largest = maximum(largest, magnitude(members + i));
  const int32_t amax = largest.largest() >> 16;
  const bf16 scale = scale_of(amax);
  if (amax < smallest_amax || amax > largest_amax) {
    zero_group<measured>(members, size, amax, codes, statistics);
    return scale;
  }
  Cost cost;
  quantize_group<measured>(members, size, F32::broadcast(1.0f / widen(scale)), F32::broadcast(widen(scale)), codes, cost);
  if (measured) {
    cost.join(statistics);
    statistics.max_error = std::fmax(statistics.max_error, cost.worst.largest() / float_of(static_cast<uint32_t>(amax) << 16));
  }
  return scale;
}

template <bool measured, class T>
void quantize_row(const QuantizeCall& call, int64_t row, int8_t* codes) {
  const T* weight = static_cast<const T*>(call.weight) + row * call.stride;
  const int64_t size = call.group, groups = call.width / size;
  uint32_t* words = call.packed + row * (call.width / 8);
  bf16* scales = call.scales + row * groups;
  QuantizeStatistics statistics;
  for (int64_t group = 0; group < groups;) {
    const T* members = weight + group * size;
    const int64_t together = group + I32::width > groups ? 1 : I32::width;
    if (together == 1 || !quantize_groups<measured>(members, size, codes, scales + group, statistics)) {
      for (int64_t i = 0; i < together; ++i) scales[group + i] = quantize_one<measured>(members + i * size, size, codes + i * size, statistics);
    }
    pack_codes(codes, together * size, words + group * size / 8);
    if (measured) {
      statistics.at_limit += limits_of(codes, together * size);
      statistics.fp16_unsafe_scales += scales_beyond_fp16(scales + group, together);
    }
    group += together;
  }
  if (measured) statistics.store(call.statistics + row * statistics_count);
}

template <class T>
void quantize_rows(const QuantizeCall& call, int64_t first, int64_t last) {
  const Buffer<int8_t> codes(call.group * smaller(I32::width, call.width / call.group));
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

void dequantize_row(const DequantizeCall& call, int64_t row) {
  const uint32_t* words = call.packed + row * call.packed_stride;
  const bf16* scales = call.scales + row * call.scale_stride;
  bf16* values = call.values + row * call.width;
  int8_t codes[F32::width] = {};
  for (int64_t group = 0; group < call.width / call.group; ++group) {
    const F32 scale = F32::broadcast(widen(scales[group]));
    for (int64_t left = call.group; left > 0; left -= F32::width, values += F32::width) {
      for (int64_t i = 0; i < smaller(left, F32::width); i += 8) {
        const uint64_t bytes = _pdep_u64(*words++, 0x0F0F0F0F0F0F0F0F);
        std::memcpy(codes + i, &bytes, 8);
      }
      const F32 product = to_float(I32::load(codes) - I32::broadcast(8)) * scale;
      if (left >= F32::width) {
        product.store(values);
      } else {
        store_first(product, values, left);
        values += left - F32::width;
      }
    }
  }
}

void int4_dequantize(const DequantizeCall& call) {
  parallel_for(call.threads, blocks_of(call.rows, rows_of_block), [&](int64_t block) {
    const int64_t first = block * rows_of_block, last = smaller(first + rows_of_block, call.rows);
    for (int64_t row = first; row < last; ++row) dequantize_row(call, row);
  });
}

}  // namespace

namespace GLM5_ISA {
const QuantizeKernels quantize = {int4_quantize, int4_dequantize};
}
}  // namespace glm5
