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
  return {lanes, padded(cache.latent_width) / Unit::depth, padded(cache.rope_width) / Unit::depth, cache.latent_width,
          keeps_scales<Unit>(cache.format) ? quantised_groups : 1};
}

// Whether rows are multiplied where they lie: they are made of the unit's own numbers, and of whole vectors.
template <class Unit>
bool reads_in_place(const LatentCache& cache) {
  return cache.format == (Unit::depth == 2 ? RowFormat::bfloat16 : RowFormat::float32) && cache.latent_width % F32::width == 0 &&
         cache.rope_width % F32::width == 0;
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

// Makes the words of one key from its row.
template <class Unit, RowFormat format, bool multiplied>
void copy_row(const LatentCache& cache, const LatentRow& row, const BlockShape<Unit>& shape, typename Unit::Word* to) {
  for (int64_t c = 0; c < cache.latent_width; c += F32::width)
    Unit::store_numbers(load_latent<Unit, format, multiplied>(cache, row, c), to, c);
  for (int64_t r = 0; r < cache.rope_width; r += F32::width)
    Unit::store_numbers(load_row<Unit, typename Stored<format>::Rope>(row.rope, r, cache.rope_width), to + shape.content_words,
                        r);
}

// Values of key k, and of the next in a pair, from their words; nothing comes after the last.
template <class Unit>
void stage_values(const BlockShape<Unit>& shape, int64_t k, KeyBlock<Unit>& block) {
  constexpr int64_t depth = Unit::depth;
  for (int64_t c = 0; c < shape.value_width; c += F32::width) {
    typename Unit::Numbers numbers[depth];
    for (int64_t i = 0; i < depth; ++i)
      numbers[i] = k + i < block.count ? Unit::load_numbers(block.content[k + i], c) : Unit::numbers(F32::zero());
    Unit::store_words(numbers, block.values + c / panel * shape.value_panel_words() + k / depth * panel + c % panel);
  }
}

template <class Unit, RowFormat format>
void stage_rows(const LatentCache& cache, const LatentRow* rows, int64_t count, float scale, const BlockShape<Unit>& shape,
                KeyBlock<Unit>& block) {
  constexpr int64_t depth = Unit::depth, keys = BlockShape<Unit>::keys;
  constexpr bool multiplied = has_scales(format) && depth == 1;
  const bool in_place = reads_in_place<Unit>(cache);
  block.count = count;
  for (int64_t k = 0; k < count; ++k) {
    if (in_place) {
      block.content[k] = reinterpret_cast<const typename Unit::Word*>(rows[k].latent);
      block.rope[k] = reinterpret_cast<const typename Unit::Word*>(rows[k].rope);
    } else {
      copy_row<Unit, format, multiplied>(cache, rows[k], shape, block.memory + k * shape.key_words());
    }
    if (k % depth == depth - 1 || k == count - 1) stage_values(shape, k / depth * depth, block);
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

// A vector of words of a row that has `count` numbers left, zeros behind them.
template <class Unit, class T>
F32 load_words(const T* from, int64_t count) {
  constexpr int64_t step = F32::width * Unit::depth;
  if (count >= step) return Unit::words(from);
  T numbers[step] = {};
  std::memcpy(numbers, from, count * sizeof(T));
  return Unit::words(numbers);
}

// Rows of numbers as one panel operand: row r, `row_stride` numbers apart, becomes lane r; zeros beyond `width`, and beyond
// `rows` as far as vectors reach.
template <class Unit, class T>
void pack_panel(const T* numbers, int64_t row_stride, int64_t rows, int64_t width, typename Unit::Word* to) {
  const int64_t words = padded(width) / Unit::depth;
  for (int64_t first = 0; first < rows; first += F32::width) {
    for (int64_t word = 0; word < words; word += F32::width) {
      const T* from = numbers + first * row_stride + word * Unit::depth;
      F32 square[F32::width];
#pragma GCC unroll 16
      for (int64_t row = 0; row < F32::width; ++row)
        square[row] = first + row < rows ? load_words<Unit>(from + row * row_stride, width - word * Unit::depth) : F32::zero();
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < F32::width; ++i)
        if (word + i < words) std::memcpy(to + (word + i) * panel + first, &square[i], sizeof(F32));
    }
  }
}

template <class Unit>
void pack_panel(const void* numbers, bool is_bf16, int64_t first, int64_t row_stride, int64_t rows, int64_t width,
                typename Unit::Word* to) {
  if (is_bf16) return pack_panel<Unit>(static_cast<const bf16*>(numbers) + first, row_stride, rows, width, to);
  if constexpr (Unit::depth == 1)  // pairs are of bfloat16 alone
    pack_panel<Unit>(static_cast<const float*>(numbers) + first, row_stride, rows, width, to);
}

}  // namespace
}  // namespace glm5
