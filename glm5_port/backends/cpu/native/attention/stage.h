// Brings operands into the layouts of tile.h: rows of the cache in any format, queries, and weights.
#pragma once

#include "attention/attention.h"
#include "attention/block.h"

namespace glm5 {
namespace {

inline int64_t padded(int64_t width) { return blocks_of(width, F32::width) * F32::width; }

// Numbers first .. first + F32::width - 1 of a row of `width`, zeros beyond its end.
template <class Unit, class T>
typename Unit::Numbers load_row(const uint8_t* row, int64_t first, int64_t width) {
  const uint8_t* from = row + first * sizeof(T);
  if (first + F32::width <= width) return Unit::numbers(reinterpret_cast<const T*>(from));
  float whole[F32::width] = {};
  for (int64_t i = 0; first + i < width; ++i) {
    T number;
    std::memcpy(&number, from + i * sizeof(T), sizeof number);
    whole[i] = widen(number);
  }
  return Unit::numbers(F32::load(whole));
}

// The opposite: into a row of `width`, no number beyond its end.
template <class T>
void store_row(F32 numbers, T* to, int64_t first, int64_t width) {
  if (first + F32::width <= width) numbers.store(to + first);
  else store_first(numbers, to + first, width - first);
}

constexpr bool has_scales(RowFormat format) { return format == RowFormat::fp8 || format == RowFormat::int8; }
template <RowFormat format>
struct Stored;
template <>
struct Stored<RowFormat::float32> {
  using Latent = float;
  using Rope = float;
};
template <>
struct Stored<RowFormat::bfloat16> {
  using Latent = bf16;
  using Rope = bf16;
};
template <>
struct Stored<RowFormat::fp8> {
  using Latent = e4m3;
  using Rope = bf16;
};
template <>
struct Stored<RowFormat::int8> {
  using Latent = int8_t;
  using Rope = bf16;
};

// Whether scales stay beside the numbers: codes are exact in bfloat16, their products with a scale are not.
template <class Unit>
bool keeps_scales(RowFormat format) {
  return Unit::depth == 2 && has_scales(format);
}

// The shape of a block whose keys and values are cached rows themselves.
template <class Unit>
BlockShape<Unit> latent_shape(const LatentCache& cache, int64_t lanes) {
  const int64_t words = (padded(cache.latent_width) + padded(cache.rope_width)) / Unit::depth;
  return {lanes, words, cache.latent_width, keeps_scales<Unit>(cache.format) ? quantised_groups : 1};
}

// What products count in a score when rows bear no scale.
template <class Unit>
void fill_score_factors(const BlockShape<Unit>& shape, float scale, KeyBlock<Unit>& block) {
  for (int64_t i = 0; i < shape.segments() * BlockShape<Unit>::keys; ++i) block.score_factors[i] = scale;
}

// A vector of a row's latent; with `multiplied`, of what its codes stand for.
template <class Unit, RowFormat format, bool multiplied>
typename Unit::Numbers load_latent(const LatentCache& cache, const LatentRow& row, int64_t first) {
  const auto numbers = load_row<Unit, typename Stored<format>::Latent>(row.latent, first, cache.latent_width);
  if constexpr (multiplied) return numbers * F32::broadcast(scale_of(row, first / quantised_group));
  return numbers;
}

template <class Unit, RowFormat format>
void stage_rows(const LatentCache& cache, const LatentRow* rows, int64_t count, float scale, const BlockShape<Unit>& shape,
                KeyBlock<Unit>& block) {
  constexpr int64_t depth = Unit::depth, keys = BlockShape<Unit>::keys;
  constexpr bool multiplied = has_scales(format) && depth == 1;
  block.count = count;
  for (int64_t k = 0; k < count; k += depth) {
    const int64_t last = smaller(count, k + depth);
    for (int64_t c = 0; c < cache.latent_width; c += F32::width) {
      typename Unit::Numbers numbers[depth];
      for (auto& row : numbers) row = Unit::numbers(F32::zero());
      for (int64_t row = k; row < last; ++row) {
        numbers[row - k] = load_latent<Unit, format, multiplied>(cache, rows[row], c);
        Unit::store_numbers(numbers[row - k], block.rows + row * shape.key_words, c);
      }
      if (shape.value_width)
        Unit::store_words(numbers, block.values + c / panel * shape.value_panel_words() + k / depth * panel + c % panel);
    }
    for (int64_t row = k; row < last; ++row)
      for (int64_t r = 0; r < cache.rope_width; r += F32::width)
        Unit::store_numbers(load_row<Unit, typename Stored<format>::Rope>(rows[row].rope, r, cache.rope_width),
                            block.rows + row * shape.key_words, padded(cache.latent_width) + r);
  }
  if (has_scales(format) && !multiplied) {
    for (int64_t group = 0; group < quantised_groups; ++group) {  // a segment is a group
      for (int64_t k = 0; k < count; ++k) {
        block.value_scales[group * keys + k] = scale_of(rows[k], group);
        block.score_factors[group * keys + k] = scale_of(rows[k], group) * scale;
      }
      if (count < keys) block.value_scales[group * keys + count] = 0;  // beside a zero weight, in a pair
    }
  }
}

template <class Unit>
void stage(const LatentCache& cache, const LatentRow* rows, int64_t count, float scale, const BlockShape<Unit>& shape,
           KeyBlock<Unit>& block) {
  switch (cache.format) {
    case RowFormat::float32: return stage_rows<Unit, RowFormat::float32>(cache, rows, count, scale, shape, block);
    case RowFormat::bfloat16: return stage_rows<Unit, RowFormat::bfloat16>(cache, rows, count, scale, shape, block);
    case RowFormat::fp8: return stage_rows<Unit, RowFormat::fp8>(cache, rows, count, scale, shape, block);
    case RowFormat::int8: return stage_rows<Unit, RowFormat::int8>(cache, rows, count, scale, shape, block);
  }
}

// Rows of numbers as one panel operand: row r, `row_stride` numbers apart, becomes lane r; zeros beyond `width`, and beyond
// `rows` as far as vectors reach.
template <class Unit, class T>
void pack_panel(const T* numbers, int64_t row_stride, int64_t rows, int64_t width, typename Unit::Word* to) {
  constexpr int64_t depth = Unit::depth, chunk = 16;  // words: a line of each row at a time
  const int64_t words = padded(width) / depth, whole = width / depth;
  for (int64_t first = 0; first < words; first += chunk) {
    const int64_t last = smaller(words, first + chunk), full = smaller(whole, last);
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = numbers + row * row_stride;
      for (int64_t word = first; word < full; ++word) to[word * panel + row] = Unit::word(from + word * depth, depth);
      for (int64_t word = larger(first, full); word < last; ++word)
        to[word * panel + row] =
            word * depth < width ? Unit::word(from + word * depth, width - word * depth) : typename Unit::Word{};
    }
    for (int64_t word = first; word < last; ++word)
      for (int64_t row = rows; row < padded(rows); ++row) to[word * panel + row] = typename Unit::Word{};
  }
}

template <class Unit>
void pack_panel(const void* numbers, bool is_bf16, int64_t first, int64_t row_stride, int64_t rows, int64_t width,
                typename Unit::Word* to) {
  if (is_bf16) pack_panel<Unit>(static_cast<const bf16*>(numbers) + first, row_stride, rows, width, to);
  else pack_panel<Unit>(static_cast<const float*>(numbers) + first, row_stride, rows, width, to);
}

}  // namespace
}  // namespace glm5
