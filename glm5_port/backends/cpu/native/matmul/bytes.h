// Vectors of bytes and their products, summed four by four into 32-bit lanes.
#pragma once

#include "simd.h"

namespace glm5 {
namespace {

#if defined(__AVX512F__)

struct Bytes {
  static constexpr int width = 64;
  __m512i v;
  static Bytes load(const void* from) { return {_mm512_loadu_si512(from)}; }
  static Bytes broadcast(int8_t x) { return {_mm512_set1_epi8(x)}; }
  // Sixteen bytes, again and again.
  static Bytes broadcast_sixteen(const void* from) { return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)))}; }
};
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Of bytes without sign, none above 15 by bytes with sign.
inline I32 add_products(I32 sum, Bytes small, Bytes b) { return {_mm512_dpbusd_epi32(sum.v, small.v, b.v)}; }
// Of bytes with sign. The instruction takes one side without: what is stored of it is the byte with its highest bit flipped, 128
// more, and 128 times the other side must be taken back.
constexpr int8_t stored_flip = -128;
inline I32 add_stored_products(I32 sum, Bytes stored, Bytes b) { return {_mm512_dpbusd_epi32(sum.v, stored.v, b.v)}; }
// Scale r in each number of lane r.
inline F32 spread(const bf16* scales) {
  const __m512i four = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 0x10001, 0x10001, 0x10001, 0x10001, 0x20002, 0x20002, 0x20002, 0x20002, 0x30003,
                                         0x30003, 0x30003, 0x30003);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, lane, four))};
}
// x in the first number of every lane, zeros behind.
inline I32 in_first(int32_t x) { return {_mm512_maskz_set1_epi32(0x1111, x)}; }

#else

struct Bytes {
  static constexpr int width = 32;
  __m256i v;
  static Bytes load(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
  static Bytes broadcast(int8_t x) { return {_mm256_set1_epi8(x)}; }
  static Bytes broadcast_sixteen(const void* from) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)))};
  }
};
inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))}; }
// Two products fit 16 bits: 2 * 15 * 128 < 2^15.
inline I32 add_products(I32 sum, Bytes small, Bytes b) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(small.v, b.v), _mm256_set1_epi16(1)))};
}
// By 16 bits, since two products of eight do not fit them: even and odd bytes apart.
constexpr int8_t stored_flip = 0;
inline I32 add_stored_products(I32 sum, Bytes a, Bytes b) {
  const auto even = [](__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); };
  const auto odd = [](__m256i x) { return _mm256_srai_epi16(x, 8); };
  const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even(a.v), even(b.v)), _mm256_madd_epi16(odd(a.v), odd(b.v)));
  return {_mm256_add_epi32(sum.v, both)};
}
inline F32 spread(const bf16* scales) { return {_mm256_set_m128(_mm_set1_ps(widen(scales[1])), _mm_set1_ps(widen(scales[0])))}; }
inline I32 in_first(int32_t x) { return {_mm256_setr_epi32(x, 0, 0, 0, x, 0, 0, 0)}; }

#endif

}  // namespace
}  // namespace glm5
