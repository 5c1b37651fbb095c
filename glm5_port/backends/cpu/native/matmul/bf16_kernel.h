// Products of bfloat16 pairs (AVX-512 BF16), accumulated in float.
//
// The sixteen weights bf16(q * s) of a group and a row are computed once, for four rows at a time: 64 words in two registers. A
// weight is then one shift, one insertion of its row's number and one look-up, for 32 weights together.
#pragma once

#include "matmul/panels.h"

namespace glm5 {
namespace {

struct Bf16Kernel {
  using Packed = bf16;
  using Decoded = bf16;
  static constexpr int64_t chunk_units = 16, unit_steps = 4, direct_rows = 4, ahead = 2048;
  static constexpr int tile_rows = 6;
  static constexpr int quads = 4;  // vectors of a step: eight inputs of each of four outputs

  // Nibble j of word i is input 4i + j; step j takes the eight words of a row.
  static int64_t place(int64_t input) { return input % 4 * 8 + input / 4; }

  static void pack(const bf16* x, int64_t count, bf16* to) {
    if (count < unit_inputs) {
      for (int64_t i = 0; i < unit_inputs; ++i) to[place(i)] = i < count ? x[i] : bf16{0};
      return;
    }
    const __m512i column = _mm512_srli_epi16(_mm512_loadu_si512(numbered), 3);  // word w is input w % 8 * 4 + w / 8
    const __m512i order = _mm512_or_si512(_mm512_slli_epi16(_mm512_and_si512(_mm512_loadu_si512(numbered), _mm512_set1_epi16(7)), 2), column);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x)));
  }

  // bf16(q * s) of rows 0 and 1, and of rows 2 and 3.
  struct Table {
    __m512i low, high;
    explicit Table(const bf16* scales) {
      const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      low = pair(scales, codes);
      high = pair(scales + 2, codes);
    }
    static __m512i pair(const bf16* scales, __m512 codes) {
      int32_t both;
      std::memcpy(&both, scales, sizeof both);
      const __m512i words = _mm512_set1_epi32(both);
      const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
      return bits(_mm512_cvtne2ps_pbh(_mm512_mul_ps(codes, second), _mm512_mul_ps(codes, first)));
    }
    // The weights whose codes are the lowest four bits of the words.
    __m512i operator()(__m512i words) const {
      const __m512i row = _mm512_slli_epi16(_mm512_srli_epi16(_mm512_loadu_si512(numbered), 3), 4);
      constexpr int and_or = 0xEA;
      return _mm512_permutex2var_epi16(low, _mm512_ternarylogic_epi64(words, _mm512_set1_epi16(15), row, and_or), high);
    }
  };

  static void decode(const Int4Weight& weight, int64_t panel, int64_t unit, int64_t units, bf16* to, const uint8_t* next) {
    const uint8_t* codes = weight.codes_of(panel) + unit * unit_bytes;
    const int64_t of_group = weight.units_of_group();
    const bf16* scales = weight.scales_of(panel) + unit / of_group * panel_rows;
    int64_t left = of_group - unit % of_group;  // units of this group
    for (int64_t i = 0; i < units; ++i, codes += unit_bytes, next += unit_bytes, to += unit_inputs * panel_rows) {
      for (int q = 0; q < quads; ++q) {
        const Table table(scales + 4 * q);
        const __m512i words = _mm512_loadu_si512(codes + 64 * q);
        _mm_prefetch(next + 64 * q, _MM_HINT_T1);
        _mm512_storeu_si512(to + 32 * q, table(words));
        _mm512_storeu_si512(to + 32 * (q + quads), table(_mm512_srli_epi16(words, 4)));
        _mm512_storeu_si512(to + 32 * (q + 2 * quads), table(_mm512_srli_epi16(words, 8)));
        _mm512_storeu_si512(to + 32 * (q + 3 * quads), table(_mm512_srli_epi16(words, 12)));
      }
      if (--left == 0) {
        left = of_group;
        scales += panel_rows;
      }
    }
  }

  template <int rows>
  static void tile(const bf16* decoded, int64_t steps, const bf16* const* x, int64_t offset, float* sums, bool begin) {
    __m512 sum[rows][quads];
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < quads; ++q) sum[r][q] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * panel_sums + 16 * q);
    }
    const bf16* from[rows];
    for (int r = 0; r < rows; ++r) from[r] = x[r] + offset;
    for (int64_t step = 0; step < steps; ++step, decoded += 8 * panel_rows) {
      __m512i weights[quads];
      for (int q = 0; q < quads; ++q) weights[q] = _mm512_loadu_si512(decoded + 32 * q);
      for (int r = 0; r < rows; ++r) {
        const __m512i eight = inputs(from[r] + 8 * step);
        for (int q = 0; q < quads; ++q) sum[r][q] = add_products(sum[r][q], weights[q], eight);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < quads; ++q) _mm512_storeu_ps(sums + r * panel_sums + 16 * q, sum[r][q]);
    }
  }

  template <int rows>
  static void direct(const Int4Weight& weight, int64_t panel, const bf16* const* x, float* sums) {
    __m512 sum[rows][quads];
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < quads; ++q) sum[r][q] = _mm512_setzero_ps();
    }
    const uint8_t* codes = weight.codes_of(panel);
    const bf16* scales = weight.scales_of(panel);
    const int64_t groups = weight.groups(), units = weight.units_of_group();
    int64_t offset = 0;
    for (int64_t group = 0; group < groups; ++group, scales += panel_rows) {
      for (int64_t unit = 0; unit < units; ++unit, codes += unit_bytes, offset += unit_inputs) {
#pragma GCC unroll 4
        for (int q = 0; q < quads; ++q) {
          const Table table(scales + 4 * q);
          const __m512i words = _mm512_loadu_si512(codes + 64 * q);
          _mm_prefetch(codes + 64 * q + ahead, _MM_HINT_T0);
          const __m512i weights[unit_steps] = {table(words), table(_mm512_srli_epi16(words, 4)), table(_mm512_srli_epi16(words, 8)),
                                               table(_mm512_srli_epi16(words, 12))};
#pragma GCC unroll 4
          for (int step = 0; step < unit_steps; ++step) {
            for (int r = 0; r < rows; ++r) sum[r][q] = add_products(sum[r][q], weights[step], inputs(x[r] + offset + 8 * step));
          }
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < quads; ++q) _mm512_storeu_ps(sums + r * panel_sums + 16 * q, sum[r][q]);
    }
  }

 private:
  static inline const uint16_t numbered[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

  static __m512i bits(__m512bh x) { return (__m512i)x; }
  static __m512i inputs(const bf16* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  static __m512 add_products(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

}  // namespace
}  // namespace glm5
