// Products of bfloat16 pairs (AVX-512 BF16), accumulated in float.
#pragma once

#include "matmul/panels.h"

namespace glm5 {
namespace {

struct PairTile {
  using Packed = bf16;
  using Decoded = bf16;
  static constexpr bool by_tiles = false;
  static constexpr int64_t chunk_units = 16, unit_steps = 4, direct_rows = 4, direct_passes = 1;
  static constexpr int tile_rows = 6;
  static constexpr int quads = 4;  // vectors of a step: eight inputs of each of four outputs

  template <int rows>
  struct Sums {
    __m512 of[rows][quads];

    // Unrolled from the start, or the compiler would keep the sums in memory.
    void clear() {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < quads; ++q) of[r][q] = _mm512_setzero_ps();
    }
    void load(const float* from) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < quads; ++q) of[r][q] = _mm512_loadu_ps(from + r * panel_sums + 16 * q);
    }
    void store(float* to) const {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int q = 0; q < quads; ++q) _mm512_storeu_ps(to + r * panel_sums + 16 * q, of[r][q]);
    }
    void add(int r, int q, __m512i weights, __m512i eight) { of[r][q] = _mm512_dpbf16_ps(of[r][q], (__m512bh)weights, (__m512bh)eight); }
  };

  // Eight inputs of a row, for each of four outputs.
  static __m512i inputs(const bf16* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }

  template <int rows>
  static void tile(const bf16* decoded, int64_t steps, const bf16* const* x, int64_t offset, float* to, bool begin) {
    Sums<rows> sums;
    begin ? sums.clear() : sums.load(to);
    const bf16* from[rows];
    for (int r = 0; r < rows; ++r) from[r] = x[r] + offset;
    for (int64_t step = 0; step < steps; ++step, decoded += 8 * panel_rows) {
      __m512i weights[quads];
      for (int q = 0; q < quads; ++q) weights[q] = _mm512_loadu_si512(decoded + 32 * q);
      for (int r = 0; r < rows; ++r) {
        const __m512i eight = inputs(from[r] + 8 * step);
        for (int q = 0; q < quads; ++q) sums.add(r, q, weights[q], eight);
      }
    }
    sums.store(to);
  }
};

// The sixteen weights bf16(q * s) of a group and a row are computed once, for four rows at a time: 64 words in two registers. A
// weight is then one shift, one insertion of its row's number and one look-up, for 32 weights together.
struct Int4ByPairs : PairTile {
  static constexpr int64_t ahead = 2048;  // bytes
  static constexpr int64_t groups_together = 8;  // whose scales are widened at once, long enough before they are read

  // Nibble j of word i is input 4i + j; step j takes the eight words of a row.
  static int64_t place(int64_t input) { return input % 4 * 8 + input / 4; }

  static void pack(const bf16* x, int64_t count, bf16* to) {
    if (count < unit_inputs) {
      for (int64_t i = 0; i < unit_inputs; ++i) to[place(i)] = i < count ? x[i] : bf16{0};
      return;
    }
    const __m512i words = _mm512_loadu_si512(numbered);  // word w is input w % 8 * 4 + w / 8
    const __m512i order = _mm512_or_si512(_mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(7)), 2), _mm512_srli_epi16(words, 3));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x)));
  }

  static void decode(const Int4Weight& weight, int64_t panel, int64_t unit, int64_t units, bf16* to, const uint8_t* next) {
    const uint8_t* codes = weight.at(panel, unit);
    const int64_t of_group = weight.units_of_group(), first = unit / of_group;
    alignas(64) float wide[chunk_units * panel_rows];
    widen_scales(weight.scales_of(panel) + first * panel_rows, (unit + units - 1) / of_group - first + 1, wide);
    const float* scales = wide;
    int64_t left = of_group - unit % of_group;  // units of this group
    for (int64_t i = 0; i < units; ++i, codes += unit_bytes, next += unit_bytes, to += unit_inputs * panel_rows) {
      for (int q = 0; q < quads; ++q) {
        __m512i steps[unit_steps];
        four_rows(scales + 4 * q, codes + 64 * q, steps);
        _mm_prefetch(next + 64 * q, _MM_HINT_T1);
        for (int step = 0; step < unit_steps; ++step) _mm512_storeu_si512(to + 32 * (q + step * quads), steps[step]);
      }
      if (--left == 0) {
        left = of_group;
        scales += panel_rows;
      }
    }
  }

  template <int rows>
  static void direct(const Int4Weight& weight, int64_t panel, const bf16* const* x, float* to) {
    Sums<rows> sums;
    sums.clear();
    const uint8_t* codes = weight.at(panel, 0);
    const bf16* scales = weight.scales_of(panel);
    const int64_t groups = weight.groups(), units = weight.units_of_group();
    alignas(64) float wide[groups_together * panel_rows];
    int64_t offset = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t inside = group % groups_together;
      if (inside == 0) widen_scales(scales + group * panel_rows, smaller(groups_together, groups - group), wide);
      for (int64_t unit = 0; unit < units; ++unit, codes += unit_bytes, offset += unit_inputs) {
        __m512i steps[quads][unit_steps];
#pragma GCC unroll 4
        for (int q = 0; q < quads; ++q) {
          four_rows(wide + inside * panel_rows + 4 * q, codes + 64 * q, steps[q]);
          _mm_prefetch(codes + 64 * q + ahead, _MM_HINT_T0);
        }
        // A product waits for the one before in its sum: those of four sums take turns.
#pragma GCC unroll 4
        for (int step = 0; step < unit_steps; ++step)
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) {
            const __m512i eight = inputs(x[r] + offset + 8 * step);
#pragma GCC unroll 4
            for (int q = 0; q < quads; ++q) sums.add(r, q, steps[q][step], eight);
          }
      }
    }
    sums.store(to);
  }

 private:
  static inline const uint16_t numbered[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

  static void widen_scales(const bf16* scales, int64_t groups, float* to) {
    for (int64_t group = 0; group < groups; ++group) F32::load(scales + group * panel_rows).store(to + group * panel_rows);
  }

  // A unit of four rows.
  static void four_rows(const float* scales, const uint8_t* codes, __m512i* steps) {
    const __m512i low = two_tables(scales), high = two_tables(scales + 2), words = _mm512_loadu_si512(codes);
    steps[0] = look_up(low, high, words);
    steps[1] = look_up(low, high, _mm512_srli_epi16(words, 4));
    steps[2] = look_up(low, high, _mm512_srli_epi16(words, 8));
    steps[3] = look_up(low, high, _mm512_srli_epi16(words, 12));
  }

  // bf16(q * s) of all q, for two neighbouring scales.
  static __m512i two_tables(const float* scales) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 first = _mm512_mul_ps(codes, _mm512_set1_ps(scales[0]));
    const __m512 second = _mm512_mul_ps(codes, _mm512_set1_ps(scales[1]));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }

  // The weights whose codes are the lowest four bits of the words.
  static __m512i look_up(__m512i low, __m512i high, __m512i words) {
    const __m512i row = _mm512_slli_epi16(_mm512_srli_epi16(_mm512_loadu_si512(numbered), 3), 4);
    constexpr int and_or = 0xEA;
    return _mm512_permutex2var_epi16(low, _mm512_ternarylogic_epi64(words, _mm512_set1_epi16(15), row, and_or), high);
  }
};

// Rows of bfloat16 as they are: lane r of a vector holds eight neighbours of row r.
struct DenseByPairs : PairTile {
  static constexpr int64_t direct_rows = 10, direct_passes = 2;
  static constexpr int64_t ahead = 2048, unit_bytes_of_row = unit_inputs * sizeof(bf16);  // bytes

  static int64_t place(int64_t input) { return input; }

  static void pack(const bf16* x, int64_t count, bf16* to) {
    std::memcpy(to, x, count * sizeof(bf16));
    std::memset(to + count, 0, (unit_inputs - count) * sizeof(bf16));
  }

  static void decode(const DenseWeight& weight, int64_t panel, int64_t unit, int64_t units, bf16* to, const uint8_t* next) {
    for (int64_t i = 0; i < units; ++i, to += unit_inputs * panel_rows) {
      for (int q = 0; q < quads; ++q) {
        __m512i steps[unit_steps];
        four_rows(weight, panel, unit + i, q, steps);
        for (int r = 0; r < 4; ++r) _mm_prefetch(next + (4 * q + r) * weight.row_bytes + 64 * i, _MM_HINT_T1);
        for (int step = 0; step < unit_steps; ++step) _mm512_storeu_si512(to + 32 * (q + step * quads), steps[step]);
      }
    }
  }

  // Four or eight rows of the weight from beginning to end, then the next: one stream of memory where rows lie side by side.
  template <int rows>
  static void direct(const DenseWeight& weight, int64_t panel, const bf16* const* x, float* to) {
    constexpr int together = rows < 5 ? 1 : 2;  // quads: every one more is a use of the inputs more, and fours more streams
    const int64_t units = weight.units(), whole = weight.width / unit_inputs, row_end = units * unit_bytes_of_row;
    for (int q = 0; q < quads; q += together) {
      __m512 sums[rows][together];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < together; ++i) sums[r][i] = _mm512_setzero_ps();
      const uint8_t* from = weight.at(panel, 0) + 4 * q * weight.row_bytes;
      const bool inside = panel * panel_rows + 4 * (q + together) <= weight.rows;
      for (int64_t unit = 0; unit < units; ++unit) {
        __m512i steps[together][unit_steps];
        const int64_t place = unit * unit_bytes_of_row, next = place + ahead;
        const uint8_t* later = next < row_end ? from + next : from + 4 * together * weight.row_bytes + next - row_end;
#pragma GCC unroll 2
        for (int i = 0; i < together; ++i) {
          inside && unit < whole ? four_whole_rows(from + 4 * i * weight.row_bytes + place, weight.row_bytes, steps[i])
                                 : four_rows(weight, panel, unit, q + i, steps[i]);
          for (int r = 0; r < 4; ++r) _mm_prefetch(later + (4 * i + r) * weight.row_bytes, _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int step = 0; step < unit_steps; ++step) {
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            const __m512i eight = inputs(x[r] + unit * unit_inputs + 8 * step);
#pragma GCC unroll 2
            for (int i = 0; i < together; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)steps[i][step], (__m512bh)eight);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < together; ++i) _mm512_storeu_ps(to + r * panel_sums + 16 * (q + i), sums[r][i]);
    }
  }

 private:
  // A unit of four rows; what lies beyond the weight is zero and not read.
  static void four_rows(const DenseWeight& weight, int64_t panel, int64_t unit, int q, __m512i* steps) {
    const int64_t left = weight.width - unit * unit_inputs, rows = weight.rows - panel * panel_rows - 4 * q;
    const __mmask32 inside = left >= unit_inputs ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const uint8_t* from = weight.at(panel, unit) + 4 * q * weight.row_bytes;
    __m512i row[4];
    for (int r = 0; r < 4; ++r) row[r] = _mm512_maskz_loadu_epi16(r < rows ? inside : 0, from + r * weight.row_bytes);
    transpose(row, steps);
  }

  static void four_whole_rows(const uint8_t* from, int64_t row_bytes, __m512i* steps) {
    __m512i row[4];
    for (int r = 0; r < 4; ++r) row[r] = _mm512_loadu_si512(from + r * row_bytes);
    transpose(row, steps);
  }

  // Four rows of four steps into four steps of four rows.
  static void transpose(const __m512i* row, __m512i* steps) {
    const __m512i low01 = _mm512_shuffle_i64x2(row[0], row[1], 0x44), high01 = _mm512_shuffle_i64x2(row[0], row[1], 0xEE);
    const __m512i low23 = _mm512_shuffle_i64x2(row[2], row[3], 0x44), high23 = _mm512_shuffle_i64x2(row[2], row[3], 0xEE);
    steps[0] = _mm512_shuffle_i64x2(low01, low23, 0x88);
    steps[1] = _mm512_shuffle_i64x2(low01, low23, 0xDD);
    steps[2] = _mm512_shuffle_i64x2(high01, high23, 0x88);
    steps[3] = _mm512_shuffle_i64x2(high01, high23, 0xDD);
  }
};

}  // namespace
}  // namespace glm5
