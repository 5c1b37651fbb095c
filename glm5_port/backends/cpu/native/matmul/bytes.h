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
  void store(void* to) const { _mm512_storeu_si512(to, v); }
  // Four bytes, or sixteen, again and again.
  static Bytes broadcast_four(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return {_mm512_set1_epi32(four)};
  }
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
// Four vectors, lane by lane: word q of a lane of `turned[i]` is word i of that lane of vector q.
inline void turn_lanes(Bytes a, Bytes b, Bytes c, Bytes d, Bytes* turned) {
  const __m512i low01 = _mm512_unpacklo_epi32(a.v, b.v), high01 = _mm512_unpackhi_epi32(a.v, b.v);
  const __m512i low23 = _mm512_unpacklo_epi32(c.v, d.v), high23 = _mm512_unpackhi_epi32(c.v, d.v);
  turned[0].v = _mm512_unpacklo_epi64(low01, low23);
  turned[1].v = _mm512_unpackhi_epi64(low01, low23);
  turned[2].v = _mm512_unpacklo_epi64(high01, high23);
  turned[3].v = _mm512_unpackhi_epi64(high01, high23);
}
// Numbers of outputs in their order to the order of turned lanes, where number 4r + q is that of row r of vector q; and back.
inline F32 to_strip_order(F32 a) {
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a.v)};
}
inline F32 to_output_order(F32 a) { return to_strip_order(a); }

#else

struct Bytes {
  static constexpr int width = 32;
  __m256i v;
  static Bytes load(const void* from) { return {_mm256_loadu_si256(static_cast<const __m256i*>(from))}; }
  static Bytes broadcast(int8_t x) { return {_mm256_set1_epi8(x)}; }
  void store(void* to) const { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
  static Bytes broadcast_four(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return {_mm256_set1_epi32(four)};
  }
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
inline void turn_lanes(Bytes a, Bytes b, Bytes c, Bytes d, Bytes* turned) {
  const __m256i low01 = _mm256_unpacklo_epi32(a.v, b.v), high01 = _mm256_unpackhi_epi32(a.v, b.v);
  const __m256i low23 = _mm256_unpacklo_epi32(c.v, d.v), high23 = _mm256_unpackhi_epi32(c.v, d.v);
  turned[0].v = _mm256_unpacklo_epi64(low01, low23);
  turned[1].v = _mm256_unpackhi_epi64(low01, low23);
  turned[2].v = _mm256_unpacklo_epi64(high01, high23);
  turned[3].v = _mm256_unpackhi_epi64(high01, high23);
}
inline F32 to_strip_order(F32 a) { return {_mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))}; }
inline F32 to_output_order(F32 a) { return {_mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))}; }

#endif

}  // namespace
}  // namespace glm5
