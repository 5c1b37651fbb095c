// Products of small matrices in registers, and the layouts of their operands. A Unit says what one step of a dot product is: a
// float of each side, or a pair of bfloat16 numbers. Everything is counted in words, the operand of one step.
//
//     row operand      one word of each row is broadcast to all lanes; rows lie anywhere, or are the columns of a panel
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

// Of a tile, between which upcoming rows are asked for: a few lines at a time, since the products wait behind many.
constexpr int64_t words_of_fetch = 16;

// Registers: 24 sums and 5 operands of 32, or 12 and 3 of 16.
constexpr int tile_rows = 6, tile_vectors = F32::width == 16 ? 4 : 2;

// Rows of words that lie anywhere and begin at any byte, from their word `first` on.
template <class Word>
struct ScatteredRows {
  static constexpr int64_t step = 1;  // from one word to the next
  const Word* const* rows;
  int64_t first;

  ScatteredRows from(int64_t row) const { return {rows + row, first}; }
  const Word* operator[](int64_t row) const { return rows[row] + first; }
};

template <class Word>
struct PanelColumns {
  static constexpr int64_t step = panel;
  const Word* words;

  PanelColumns from(int64_t column) const { return {words + column}; }
  const Word* operator[](int64_t column) const { return words + column; }
};

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
  static Operand broadcast(const Word* from) {
    Word word;
    std::memcpy(&word, from, sizeof word);
    return {F32::broadcast(word)};
  }
  static Operand load(const Word* from) { return {F32::load(from)}; }
  static F32 multiply_add(Operand a, Operand b, F32 sum) { return glm5::multiply_add(a.v, b.v, sum); }
  // Neighbouring numbers of a row, those of `depth` in each lane.
  template <class T>
  static Operand load_row(const T* numbers) {
    return {glm5::load_numbers(numbers)};
  }

  // Neighbouring words of a row, as they are.
  template <class T>
  static F32 words(const T* numbers) {
    return glm5::load_numbers(numbers);
  }

  // F32::width numbers of one row as a row operand holds them; and words made of those of `depth` rows, a lane each.
  using Numbers = F32;
  static Numbers numbers(F32 x) { return x; }
  template <class T>
  static Numbers numbers(const T* from) {
    return glm5::load_numbers(from);
  }
  static Numbers load_numbers(const Word* row, int64_t first) { return F32::load(row + first); }
  static void store_numbers(Numbers numbers, Word* row, int64_t first) { numbers.store(row + first); }
  static void store_words(const Numbers* rows, Word* to) { rows[0].store(to); }
};

// sums[row][column] = sums * keep[row] + (rows of a . columns of b) * add[row]; without `keep`, there are no sums yet.
template <class Unit, int rows, int vectors, class Rows>
void multiply_tile(Rows a, const typename Unit::Word* b, int64_t words, float* sums, const float* keep, const float* add,
                   Upcoming& upcoming) {
  const typename Unit::Word* from[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) from[r] = a[r];
  F32 sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = F32::zero();
  for (int64_t first = 0; first < words; first += words_of_fetch) {
    upcoming.fetch();
    for (int64_t k = first; k < smaller(words, first + words_of_fetch); ++k) {
      typename Unit::Operand column[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) column[v] = Unit::load(b + k * panel + v * F32::width);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const typename Unit::Operand row = Unit::broadcast(from[r] + k * Rows::step);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = Unit::multiply_add(row, column[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = sums + r * panel + v * F32::width;
      const F32 added = sum[r][v] * F32::broadcast(add[r]);
      (keep ? multiply_add(F32::load(to), F32::broadcast(keep[r]), added) : added).store(to);
    }
}

template <class Unit, int vectors, class Rows>
void multiply_rows(int64_t rows, Rows a, const typename Unit::Word* b, int64_t words, float* sums, const float* keep,
                   const float* add, Upcoming& upcoming) {
  using Tile = void (*)(Rows, const typename Unit::Word*, int64_t, float*, const float*, const float*, Upcoming&);
  static constexpr Tile last[tile_rows] = {nullptr,
                                           multiply_tile<Unit, 1, vectors, Rows>,
                                           multiply_tile<Unit, 2, vectors, Rows>,
                                           multiply_tile<Unit, 3, vectors, Rows>,
                                           multiply_tile<Unit, 4, vectors, Rows>,
                                           multiply_tile<Unit, 5, vectors, Rows>};
  const auto at = [&](int64_t row, Tile tile) {
    tile(a.from(row), b, words, sums + row * panel, keep ? keep + row : nullptr, add + row, upcoming);
  };
  int64_t row = 0;
  for (; row + tile_rows <= rows; row += tile_rows) at(row, multiply_tile<Unit, tile_rows, vectors, Rows>);
  if (row < rows) at(row, last[rows - row]);
}

// One panel of sums [rows][panel]; of its columns, at least the first `columns` are computed.
template <class Unit, class Rows>
void multiply(int64_t rows, int64_t columns, Rows a, const typename Unit::Word* b, int64_t words, float* sums, const float* keep,
              const float* add, Upcoming& upcoming) {
  for (int64_t column = 0; column < columns; column += tile_vectors * F32::width) {
    switch (smaller(blocks_of(columns - column, F32::width), tile_vectors)) {
      case 1: multiply_rows<Unit, 1>(rows, a, b + column, words, sums + column, keep, add, upcoming); break;
      case 2: multiply_rows<Unit, 2>(rows, a, b + column, words, sums + column, keep, add, upcoming); break;
      case 3:
        multiply_rows<Unit, tile_vectors == 4 ? 3 : 2>(rows, a, b + column, words, sums + column, keep, add, upcoming);
        break;
      default: multiply_rows<Unit, tile_vectors>(rows, a, b + column, words, sums + column, keep, add, upcoming);
    }
  }
}

}  // namespace
}  // namespace glm5
