// The quantiser in vectors. A quotient is a product with the reciprocal, rounded to the grid 2^-12 and then to a whole number:
// quant/int4.py says why no rounding on the way can show.
#include <cmath>

#include "parallel.h"
#include "quantize/quantize.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr float snap = 1.5f * 2048.0f;  // adding it rounds to multiples of 2^-12
constexpr float whole = 1.5f * 8388608.0f + 8.0f;  // what adding rounds to whole numbers and adds 8 to the low bits, exactly
constexpr int64_t rows_of_block = 16;
constexpr int64_t pairs = 2 * F32::width;  // weights of a vector of pairs

// -- vectors of pairs: the even ones of some weights in the lower halves of lanes, the odd ones in the upper halves ----------

inline I32 load_pairs(const bf16* from) { return I32::load(reinterpret_cast<const int32_t*>(from)); }
inline F32 even_of(I32 both) { return float_of(shift_left<16>(both)); }
inline F32 odd_of(I32 both) { return float_of(both & I32::broadcast(static_cast<int32_t>(0xFFFF0000))); }

#if defined(__AVX512F__)
using Whole = __m512i;
inline Whole largest_lanes(Whole a, Whole b) { return _mm512_max_epi32(a, b); }
inline Whole largest_halves(Whole a, Whole b) { return _mm512_max_epi16(a, b); }

// Lane g: the largest lane of vector g, or the largest of each half.
template <Whole (*larger_of)(Whole, Whole)>
inline I32 largest_of_each(const I32 (&x)[I32::width]) {
  Whole fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // of each quarter of four vectors
    const I32* four = x + 4 * i;
    const Whole first = larger_of(_mm512_unpacklo_epi32(four[0].v, four[1].v), _mm512_unpackhi_epi32(four[0].v, four[1].v));
    const Whole second = larger_of(_mm512_unpacklo_epi32(four[2].v, four[3].v), _mm512_unpackhi_epi32(four[2].v, four[3].v));
    fours[i] = larger_of(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  const auto of_quarters = [](Whole a, Whole b) {
    return larger_of(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  return {of_quarters(of_quarters(fours[0], fours[1]), of_quarters(fours[2], fours[3]))};
}

// A byte for each lane: the low four bits of `even`, and above them those of `odd`.
inline void store_nibbles(I32 even, I32 odd, void* to) {
  constexpr int first_chooses = 0xCA;
  const Whole both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(15), even.v, _mm512_slli_epi32(odd.v, 4), first_chooses);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(both));
}

// bf16(q * s) of every q.
struct Values {
  explicit Values(float scale) {
    const F32 codes = {_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)};
    table = rounded_to_bf16(codes * F32::broadcast(scale));
  }
  // Of codes q + 8 in the low four bits.
  F32 of(I32 codes) const { return {_mm512_permutexvar_ps(codes.v, table.v)}; }

  F32 table;
};

// Sums of each eight bytes that a table has for the nibbles of a vector.
inline I32 look_up_nibbles(I32 nibbles, __m128i table) {
  const Whole all = _mm512_broadcast_i32x4(table), low = _mm512_set1_epi8(15);
  const Whole counts = _mm512_add_epi8(_mm512_shuffle_epi8(all, _mm512_and_si512(nibbles.v, low)),
                                       _mm512_shuffle_epi8(all, _mm512_and_si512(_mm512_srli_epi16(nibbles.v, 4), low)));
  return {_mm512_sad_epu8(counts, _mm512_setzero_si512())};
}
#else
using Whole = __m256i;
inline Whole largest_lanes(Whole a, Whole b) { return _mm256_max_epi32(a, b); }
inline Whole largest_halves(Whole a, Whole b) { return _mm256_max_epi16(a, b); }

template <Whole (*larger_of)(Whole, Whole)>
inline I32 largest_of_each(const I32 (&x)[I32::width]) {
  Whole fours[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // of each half of four vectors
    const I32* four = x + 4 * i;
    const Whole first = larger_of(_mm256_unpacklo_epi32(four[0].v, four[1].v), _mm256_unpackhi_epi32(four[0].v, four[1].v));
    const Whole second = larger_of(_mm256_unpacklo_epi32(four[2].v, four[3].v), _mm256_unpackhi_epi32(four[2].v, four[3].v));
    fours[i] = larger_of(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
  }
  return {larger_of(_mm256_permute2x128_si256(fours[0], fours[1], 0x20), _mm256_permute2x128_si256(fours[0], fours[1], 0x31))};
}

inline void store_nibbles(I32 even, I32 odd, void* to) {
  const I32 low = I32::broadcast(15);
  const Whole both = ((even & low) | shift_left<4>(odd & low)).v;
  const Whole bytes = _mm256_shuffle_epi8(both, _mm256_set1_epi32(0x0C080400));  // of each half, in all its lanes
  const __m128i low_bytes = _mm256_castsi256_si128(bytes), high_bytes = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_unpacklo_epi32(low_bytes, high_bytes));
}

struct Values {
  explicit Values(float scale) {
    const F32 codes = {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)};
    table = rounded_to_bf16(codes * F32::broadcast(scale));
  }
  F32 of(I32 codes) const {
    const I32 q = (codes & I32::broadcast(15)) - I32::broadcast(8);
    return float_of(bits_of(lane_of_eight(table, absolute(q))) | (q & I32::broadcast(INT32_MIN)));
  }

  F32 table;
};

inline I32 look_up_nibbles(I32 nibbles, __m128i table) {
  const Whole all = _mm256_broadcastsi128_si256(table), low = _mm256_set1_epi8(15);
  const Whole counts = _mm256_add_epi8(_mm256_shuffle_epi8(all, _mm256_and_si256(nibbles.v, low)),
                                       _mm256_shuffle_epi8(all, _mm256_and_si256(_mm256_srli_epi16(nibbles.v, 4), low)));
  return {_mm256_sad_epu8(counts, _mm256_setzero_si256())};
}
#endif

// -- scales ------------------------------------------------------------------------------------------------------------------

// seventh_bits of quantize.h in each lane.
inline I32 seventh_bits(I32 amax) {
  const I32 mantissa = I32::broadcast(128) + (amax & I32::broadcast(127)), limit = I32::broadcast(224);
  const I32 scaled = choose_greater(limit, mantissa, shift_left<4>(mantissa), shift_left<3>(mantissa));
  const I32 rounded = shift_right<16>((scaled + I32::broadcast(7)) * I32::broadcast(4682));
  return amax - mantissa + rounded - choose_greater(limit, mantissa, I32::broadcast(3 << 7), I32::broadcast(2 << 7));
}

// The bits of the scales that the bits of amax have: scale_of of quantize.h in each lane.
inline I32 scales_of(I32 amax) {
  const I32 held = choose_greater(amax, I32::broadcast(largest_amax), I32::broadcast(0x7FC0), seventh_bits(amax));
  return choose_greater(I32::broadcast(smallest_amax), amax, I32::broadcast(127 << 7), held);
}

// Of scales in lanes, stored from `scales` on.
inline int64_t scales_beyond_fp16(I32 bits, const bf16* scales, int64_t count) {
  const I32 low = I32::broadcast((127 - 14 - 3) << 7), high = I32::broadcast((127 + 16) << 7);  // three bits of eleven are free
  const I32 zero = I32::broadcast(0), one = I32::broadcast(1);
  if (choose_greater(low, bits, one, choose_greater(high, bits, zero, one)).largest() == 0) return 0;
  int64_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond += !fits_fp16(scales[i]);
  return beyond;
}

// -- codes -------------------------------------------------------------------------------------------------------------------

constexpr uint32_t zeros = 0x88888888;  // eight codes q = 0

// q + 8 in the low bits of each lane, and the bits of `whole` above; q is rounded half to even.
inline I32 codes_of(F32 weights, F32 reciprocal) {
  return bits_of(multiply_add(weights, reciprocal, F32::broadcast(snap)) + F32::broadcast(whole - snap));
}

// What rounding costs, summed in lanes.
struct Cost {
  F32 errors = F32::zero(), sizes = F32::zero();
  F32 worst = F32::zero();  // of a group

  void add(F32 weights, I32 codes, const Values& values) {
    const F32 error = absolute(weights - values.of(codes));
    errors = errors + error;
    sizes = sizes + absolute(weights);
    worst = maximum(worst, error);
  }
};

// The codes of a group, and with `measured` what they cost. A reciprocal of 0 makes all codes 0.
template <bool measured>
inline void quantize_group(const bf16* members, int64_t size, F32 reciprocal, float scale, uint8_t* codes, Cost& cost) {
  const Values values(measured ? scale : 0);
  for (int64_t i = 0; i < size; i += pairs, codes += pairs / 2) {
    const I32 both = load_pairs(members + i);
    const F32 even = even_of(both), odd = odd_of(both);
    const I32 even_codes = codes_of(even, reciprocal), odd_codes = codes_of(odd, reciprocal);
    store_nibbles(even_codes, odd_codes, codes);
    if (measured) {
      cost.add(even, even_codes, values);
      cost.add(odd, odd_codes, values);
    }
  }
}

// Bits of the largest magnitude of each of `count` groups, in lanes; zeros in the others.
inline I32 magnitudes_of(const bf16* members, int64_t size, int64_t count) {
  const I32 positive = I32::broadcast(0x7FFF7FFF);
  I32 largest[I32::width];
#pragma GCC unroll 4
  for (int64_t group = 0; group < I32::width; ++group) {
    if (group >= count) {
      largest[group] = I32::broadcast(0);
      continue;
    }
    const bf16* own = members + group * size;
    largest[group] = load_pairs(own) & positive;
    for (int64_t i = pairs; i < size; i += pairs) {
      largest[group] = {largest_halves(largest[group].v, (load_pairs(own + i) & positive).v)};
    }
  }
  const I32 halves = largest_of_each<largest_halves>(largest);
  return maximum(halves & I32::broadcast(0xFFFF), shift_right<16>(halves));
}

// Neighbouring groups of a row. All scales are found before the first code, so that the processor need not wait for each.
constexpr int64_t groups_of_run = 64;
struct Run {
  int32_t largest[groups_of_run];  // bits of magnitudes
  float scales[groups_of_run], reciprocals[groups_of_run];
};

// false, if a group cannot be held.
inline bool find_scales(const bf16* members, int64_t size, int64_t count, Run& run, bf16* scales) {
  I32 most = I32::broadcast(0);
  for (int64_t group = 0; group < count; group += I32::width) {
    const int64_t here = smaller(I32::width, count - group);
    const I32 amax = magnitudes_of(members + group * size, size, here);
    const F32 scale = float_of(shift_left<16>(scales_of(amax)));
    const I32 least = I32::broadcast(smallest_amax), reciprocal = bits_of(F32::broadcast(1.0f) / scale);
    amax.store(run.largest + group);
    scale.store(run.scales + group);
    float_of(choose_greater(least, amax, I32::broadcast(0), reciprocal)).store(run.reciprocals + group);
    here == I32::width ? scale.store(scales + group) : store_first(scale, scales + group, here);
    most = maximum(most, amax);
  }
  return most.largest() <= largest_amax;
}

// What is counted of up to a vector of groups whose codes were found, with the largest errors of each in lanes.
inline void count_groups(const int32_t* largest, const bf16* scales, int64_t count, const I32 (&worst)[I32::width],
                         QuantizeStatistics& statistics) {
  const I32 amax = I32::load(largest), least = I32::broadcast(smallest_amax), zero = I32::broadcast(0), one = I32::broadcast(1);
  const I32 empty = choose_greater(one, amax, one, zero);
  statistics.zero_groups += static_cast<int64_t>(to_float(empty).sum()) - (I32::width - count);
  statistics.tiny_groups += static_cast<int64_t>(to_float(choose_greater(least, amax, one, zero) - empty).sum());
  statistics.fp16_unsafe_scales += scales_beyond_fp16(scales_of(amax), scales, count);
  const F32 share = float_of(largest_of_each<largest_lanes>(worst)) / float_of(shift_left<16>(maximum(amax, least)));
  statistics.max_error = std::fmax(statistics.max_error, float_of(choose_greater(least, amax, zero, bits_of(share))).largest());
}

template <bool measured>
void quantize_run(const bf16* members, int64_t size, int64_t count, uint32_t* words, bf16* scales,
                  QuantizeStatistics& statistics) {
  Run run;
  const bool held = find_scales(members, size, count, run, scales);
  Cost cost;
  for (int64_t first = 0; first < count; first += I32::width) {
    const int64_t last = smaller(first + I32::width, count);
    I32 worst[I32::width];
    if (measured && last - first < I32::width)
      for (I32& lanes : worst) lanes = I32::broadcast(0);
    for (int64_t group = first; group < last; ++group) {
      uint8_t* codes = reinterpret_cast<uint8_t*>(words) + group * size / 2;
      cost.worst = F32::zero();
      const F32 reciprocal = F32::broadcast(run.reciprocals[group]);
      quantize_group<measured>(members + group * size, size, reciprocal, run.scales[group], codes, cost);
      worst[group - first] = bits_of(cost.worst);  // floats that are not negative stand in the order of their bits
    }
    if (measured) count_groups(run.largest + first, scales + first, last - first, worst, statistics);
  }
  statistics.error_sum += cost.errors.sum();
  statistics.magnitude_sum += cost.sizes.sum();
  if (held) return;
  statistics.refused = true;
  for (int64_t group = 0; group < count; ++group)
    for (int64_t i = 0; run.largest[group] > largest_amax && i < size / 8; ++i) words[group * size / 8 + i] = zeros;
}

// Codes of magnitude 7 in `count` words.
inline int64_t limits_of(const uint32_t* words, int64_t count) {
  const __m128i limits = _mm_setr_epi8(0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1);
  I32 counts = I32::broadcast(0);
  int64_t i = 0;
  for (; i + I32::width <= count; i += I32::width)
    counts = counts + look_up_nibbles(I32::load(reinterpret_cast<const int32_t*>(words + i)), limits);
  int64_t total = 0;
  int32_t lanes[I32::width];
  counts.store(lanes);
  for (const int32_t lane : lanes) total += lane;
  for (; i < count; ++i)
    for (int shift = 0; shift < 32; shift += 4) total += (words[i] >> shift & 15) == 1 || (words[i] >> shift & 15) == 15;
  return total;
}

inline const bf16* in_bf16(const bf16* weights, int64_t, bf16*) { return weights; }
inline const bf16* in_bf16(const float* weights, int64_t count, bf16* room) {
  for (int64_t i = 0; i < count; i += F32::width) F32::load(weights + i).store(room + i);
  return room;
}

template <bool measured, class T>
void quantize_row(const QuantizeCall& call, int64_t row, bf16* room) {
  const T* weight = static_cast<const T*>(call.weight) + row * call.stride;
  const int64_t size = call.group, groups = call.width / size, row_words = call.width / 8;
  uint32_t* words = call.packed + row * row_words;
  bf16* scales = call.scales + row * groups;
  QuantizeStatistics statistics;
  for (int64_t group = 0; group < groups; group += groups_of_run) {
    const int64_t count = smaller(groups_of_run, groups - group);
    const bf16* members = in_bf16(weight + group * size, count * size, room);
    quantize_run<measured>(members, size, count, words + group * size / 8, scales + group, statistics);
  }
  if (measured) {
    statistics.at_limit = limits_of(words, row_words);
    statistics.store(call.statistics + row * statistics_count);
  }
}

template <class T>
void quantize_rows(const QuantizeCall& call, int64_t first, int64_t last) {
  const Buffer<bf16> room(sizeof(T) == sizeof(bf16) ? 0 : call.group * smaller(groups_of_run, call.width / call.group));
  for (int64_t row = first; row < last; ++row) {
    call.statistics ? quantize_row<true, T>(call, row, room) : quantize_row<false, T>(call, row, room);
  }
}

#if defined(__AVX512F__)
const QuantizeKernels& narrower = avx2::quantize;
#else
const QuantizeKernels& narrower = scalar::quantize;
#endif

void int4_quantize(const QuantizeCall& call) {
  if (call.group % pairs) return narrower.int4_quantize(call);
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
