// Products of small matrices in registers, and the layouts of their operands. A Unit says what one step of a dot product is: a
// float of each side, or a pair of bfloat16 numbers. Everything is counted in words, the operand of one step.
//
//     row operand      [rows][words]: one word is broadcast to all lanes
//     panel operand    [words][panel]: lanes side by side, `panel` columns of the product; a wider one is several panels
//
// A sum runs over its words in order, in one lane, whatever the size of the tile: the bits do not depend on the other rows or
// lanes.
#pragma once

#include "attention/upcoming.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr int64_t panel = 4 * F32::width;

// Registers: 24 sums and 5 operands of 32, or 12 and 3 of 16.
constexpr int tile_rows = 6, tile_vectors = F32::width == 16 ? 4 : 2;

inline F32 load_numbers(const float* from) { return F32::load(from); }
inline F32 load_numbers(const bf16* from) { return F32::load(from); }
inline F32 load_numbers(const int8_t* from) { return load_codes(from); }
inline F32 load_numbers(const e4m3* from) { return load_codes(from); }

struct FloatUnit {
  using Word = float;
  static constexpr int64_t depth = 1;
  struct Operand {
    F32 v;
  };
  static Operand broadcast(Word word) { return {F32::broadcast(word)}; }
  static Operand load(const Word* from) { return {F32::load(from)}; }
  static F32 multiply_add(Operand a, Operand b, F32 sum) { return glm5::multiply_add(a.v, b.v, sum); }
  // Neighbouring numbers of a row, those of `depth` in each lane.
  template <class T>
  static Operand load_row(const T* numbers) {
    return {load_numbers(numbers)};
  }

  // Word of the numbers of one row that are multiplied in one step.
  static Word word(const float* numbers, int64_t) { return *numbers; }
  static Word word(const bf16* numbers, int64_t) { return widen(*numbers); }

  // F32::width numbers of one row as a row operand holds them; and words made of those of `depth` rows, a lane each.
  using Numbers = F32;
  static Numbers numbers(F32 x) { return x; }
  template <class T>
  static Numbers numbers(const T* from) {
    return load_numbers(from);
  }
  static void store_numbers(Numbers numbers, Word* row, int64_t first) { numbers.store(row + first); }
  static void store_words(const Numbers* rows, Word* to) { rows[0].store(to); }
};

// sums[row][column] = sums * keep[row] + (rows of a . columns of b) * add[row].
template <class Unit, int rows, int vectors>
void multiply_tile(const typename Unit::Word* a, int64_t a_row, int64_t a_step, const typename Unit::Word* b, int64_t words,
                   float* sums, const float* keep, const float* add) {
  F32 sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = F32::zero();
  for (int64_t k = 0; k < words; ++k) {
    typename Unit::Operand column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = Unit::load(b + k * panel + v * F32::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename Unit::Operand row = Unit::broadcast(a[r * a_row + k * a_step]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = Unit::multiply_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = sums + r * panel + v * F32::width;
      multiply_add(F32::load(to), F32::broadcast(keep[r]), sum[r][v] * F32::broadcast(add[r])).store(to);
    }
}

template <class Unit, int vectors>
void multiply_rows(int64_t rows, const typename Unit::Word* a, int64_t a_row, int64_t a_step, const typename Unit::Word* b,
                   int64_t words, float* sums, const float* keep, const float* add, Upcoming& upcoming) {
  using Tile = void (*)(const typename Unit::Word*, int64_t, int64_t, const typename Unit::Word*, int64_t, float*, const float*,
                        const float*);
  static constexpr Tile last[tile_rows] = {nullptr,
                                           multiply_tile<Unit, 1, vectors>,
                                           multiply_tile<Unit, 2, vectors>,
                                           multiply_tile<Unit, 3, vectors>,
                                           multiply_tile<Unit, 4, vectors>,
                                           multiply_tile<Unit, 5, vectors>};
  int64_t row = 0;
  for (; row + tile_rows <= rows; row += tile_rows) {
    multiply_tile<Unit, tile_rows, vectors>(a + row * a_row, a_row, a_step, b, words, sums + row * panel, keep + row, add + row);
    upcoming.fetch();
  }
  if (row < rows) last[rows - row](a + row * a_row, a_row, a_step, b, words, sums + row * panel, keep + row, add + row);
}

// One panel of sums [rows][panel]; of its columns, at least the first `columns` are computed.
template <class Unit>
void multiply(int64_t rows, int64_t columns, const typename Unit::Word* a, int64_t a_row, int64_t a_step,
              const typename Unit::Word* b, int64_t words, float* sums, const float* keep, const float* add, Upcoming& upcoming) {
  for (int64_t column = 0; column < columns; column += tile_vectors * F32::width) {
    switch (smaller(blocks_of(columns - column, F32::width), tile_vectors)) {
      case 1: multiply_rows<Unit, 1>(rows, a, a_row, a_step, b + column, words, sums + column, keep, add, upcoming); break;
      case 2: multiply_rows<Unit, 2>(rows, a, a_row, a_step, b + column, words, sums + column, keep, add, upcoming); break;
      case 3:
        multiply_rows<Unit, tile_vectors == 4 ? 3 : 2>(rows, a, a_row, a_step, b + column, words, sums + column, keep, add,
                                                       upcoming);
        break;
      default: multiply_rows<Unit, tile_vectors>(rows, a, a_row, a_step, b + column, words, sums + column, keep, add, upcoming);
    }
  }
}

}  // namespace
}  // namespace glm5
