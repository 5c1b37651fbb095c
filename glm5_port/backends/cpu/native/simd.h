// One name for the vectors of each instruction set. A kernel written with them is compiled once for each; F32 holds
// F32::width numbers, I32 as many integers. Everything is in an unnamed namespace: a function compiled for one instruction set must never
// be merged with the same function of another.
//
// Sums across a vector are taken in a fixed order, which is the same for every instruction set of the same width.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "numbers.h"

namespace glm5 {
namespace {

#if defined(__AVX512F__)

struct I32 {
  static constexpr int width = 16;
  __m512i v;
  static I32 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32 load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  static I32 load(const int8_t* from) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  static I32 load(const uint8_t* from) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  void store(int32_t* to) const { _mm512_storeu_si512(to, v); }
  // Of numbers from -128 to 127.
  void store(int8_t* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v)); }
  int32_t largest() const { return _mm512_reduce_max_epi32(v); }
  int32_t total() const { return _mm512_reduce_add_epi32(v); }
};
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32 maximum(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I32 minimum(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
template <int n> I32 shift_left(I32 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> I32 shift_right(I32 a) { return {_mm512_srli_epi32(a.v, n)}; }
// `yes` where a > b, `no` elsewhere.
inline I32 choose_greater(I32 a, I32 b, I32 yes, I32 no) { return {_mm512_mask_mov_epi32(no.v, _mm512_cmpgt_epi32_mask(a.v, b.v), yes.v)}; }

struct F32 {
  static constexpr int width = 16;
  __m512 v;
  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  // Four numbers, again and again.
  static F32 broadcast_four(const float* from) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(from))}; }
  static F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static F32 load(const bf16* from) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(bf16* to) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
  }
  float sum() const {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  float largest() const { return _mm512_reduce_max_ps(v); }
};
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 maximum(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 minimum(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 square_root(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
// To the nearest whole number, half to even.
inline F32 round_to_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The sums (x0 + x1) + (x2 + x3) of every four neighbours of a, then those of b, c and d.
inline F32 sums_of_fours(F32 a, F32 b, F32 c, F32 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x88), _mm512_shuffle_ps(a.v, b.v, 0xDD));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(c.v, d.v, 0x88), _mm512_shuffle_ps(c.v, d.v, 0xDD));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xDD));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(order, sums)};
}
// Lane j of vector i goes to lane i of vector j.
inline void transpose(F32 (&rows)[F32::width]) {
  __m512 pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // fours[4 b + j]: of rows 4 b to 4 b + 3, lanes j, j + 4, j + 8 and j + 12
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    const __m512d a = _mm512_castps_pd(pairs[from]), b = _mm512_castps_pd(pairs[from + 2]);
    fours[to] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    fours[to + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // eights[8 b + j]: lanes j and j + 8 of rows 8 b to 8 b + 7; with j + 4, the others
    const int from = i / 4 * 8 + i % 4;
    eights[from] = _mm512_shuffle_f32x4(fours[from], fours[from + 4], 0x88);
    eights[from + 4] = _mm512_shuffle_f32x4(fours[from], fours[from + 4], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = {_mm512_shuffle_f32x4(eights[i], eights[i + 8], 0x88)};
    rows[i + 8] = {_mm512_shuffle_f32x4(eights[i], eights[i + 8], 0xDD)};
  }
}
// Lane i: that lane of a of which i is the number, from 0 to 7; of sixteen lanes, the upper eight must repeat the lower.
inline F32 lane_of_eight(F32 a, I32 i) { return {_mm512_permutexvar_ps(i.v, a.v)}; }
// a 2^n for a whole number n, rounded once, even where 2^n itself is no normal float.
inline F32 times_power_of_two(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline I32 absolute(I32 a) { return {_mm512_abs_epi32(a.v)}; }
inline I32 to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline F32 float_of(I32 a) { return {_mm512_castsi512_ps(a.v)}; }

#elif defined(__AVX2__)

struct I32 {
  static constexpr int width = 8;
  __m256i v;
  static I32 broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static I32 load(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static I32 load(const int8_t* from) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))}; }
  static I32 load(const uint8_t* from) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))}; }
  void store(int32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  // Of numbers from -128 to 127.
  void store(int8_t* to) const {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  int32_t largest() const {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
  int32_t total() const {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
};
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I32 maximum(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline I32 minimum(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
template <int n> I32 shift_left(I32 a) { return {_mm256_slli_epi32(a.v, n)}; }
template <int n> I32 shift_right(I32 a) { return {_mm256_srli_epi32(a.v, n)}; }
// `yes` where a > b, `no` elsewhere.
inline I32 choose_greater(I32 a, I32 b, I32 yes, I32 no) { return {_mm256_blendv_epi8(no.v, yes.v, _mm256_cmpgt_epi32(a.v, b.v))}; }

struct F32 {
  static constexpr int width = 8;
  __m256 v;
  static F32 zero() { return {_mm256_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static F32 broadcast_four(const float* from) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from))}; }
  static F32 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static F32 load(const bf16* from) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(bf16* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
  }
  float sum() const {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
  }
  float largest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 maximum(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 minimum(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 square_root(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
// To the nearest whole number, half to even.
inline F32 round_to_even(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 sums_of_fours(F32 a, F32 b, F32 c, F32 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  return {_mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))};
}
inline void transpose(F32 (&rows)[F32::width]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // fours[4 b + j]: of rows 4 b to 4 b + 3, lanes j and j + 4
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    const __m256d a = _mm256_castps_pd(pairs[from]), b = _mm256_castps_pd(pairs[from + 2]);
    fours[to] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    fours[to + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = {_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20)};
    rows[i + 4] = {_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31)};
  }
}
inline F32 lane_of_eight(F32 a, I32 i) { return {_mm256_permutevar8x32_ps(a.v, i.v)}; }
inline I32 absolute(I32 a) { return {_mm256_abs_epi32(a.v)}; }
inline I32 to_int(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 bits_of(F32 a) { return {_mm256_castps_si256(a.v)}; }
inline F32 float_of(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
// In two parts, for n from -252 to 254: 2^n may lie beyond the exponents of normal floats.
inline F32 times_power_of_two(F32 a, F32 n) {
  const I32 whole = to_int(n), half = shift_right<1>(whole + I32::broadcast(256)) - I32::broadcast(128);
  const I32 bias = I32::broadcast(127);
  return a * float_of(shift_left<23>(half + bias)) * float_of(shift_left<23>(whole - half + bias));
}

#else
#error "simd.h is for files that are compiled for a vector instruction set"
#endif

inline F32 operator-(F32 a) { return float_of(bits_of(a) - I32::broadcast(INT32_MIN)); }
inline F32 absolute(F32 a) { return float_of(bits_of(a) & I32::broadcast(INT32_MAX)); }
// The nearest bfloat16 numbers, as floats; of numbers that are not NaN.
inline F32 rounded_to_bf16(F32 a) {
  const I32 bits = bits_of(a);
  const I32 odd = shift_right<16>(bits) & I32::broadcast(1);
  return float_of((bits + I32::broadcast(0x7FFF) + odd) & I32::broadcast(static_cast<int32_t>(0xFFFF0000)));
}

// Codes as floats, exactly; see widen in numbers.h.
inline F32 load_codes(const int8_t* from) { return to_float(I32::load(from)); }
inline F32 load_codes(const e4m3* from) {
  const I32 codes = I32::load(reinterpret_cast<const uint8_t*>(from)), magnitude = codes & I32::broadcast(0x7F);
  const I32 small = bits_of(to_float(magnitude) * F32::broadcast(0x1p-9f));
  const I32 normal = shift_left<20>(magnitude) + I32::broadcast(120 << 23);
  const I32 number = choose_greater(magnitude, I32::broadcast(7), normal, small);
  const I32 sign = shift_left<24>(codes & I32::broadcast(0x80));
  return float_of(sign | choose_greater(magnitude, I32::broadcast(0x7E), I32::broadcast(0x7FC00000), number));
}

// The first `count` numbers of a vector (count <= width), zeros behind them; no byte beyond is touched.
template <class T>
inline F32 load_first(const T* from, int64_t count) {
  T whole[F32::width] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = from[i];
  return F32::load(whole);
}
template <class T>
inline void store_first(F32 x, T* to, int64_t count) {
  T whole[F32::width];
  x.store(whole);
  for (int64_t i = 0; i < count; ++i) to[i] = whole[i];
}

}  // namespace
}  // namespace glm5
