// Rows of activations as 8-bit codes, made as they come: one scale for a whole row, or one for each group of the weights.
#pragma once

#include "matmul/layout.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr float smallest_row = 0x1p-100f;  // rows and groups below count as zeros

// s = amax / 127 of a row or group; 1 below smallest_row, NaN where something is not finite.
template <class T>
inline float row_scale(const T* x, int64_t width) {
  I32 largest = I32::broadcast(0);
  const I32 magnitude = I32::broadcast(INT32_MAX);
  int64_t i = 0;
  for (; i + F32::width <= width; i += F32::width) largest = maximum(largest, bits_of(F32::load(x + i)) & magnitude);
  largest = maximum(largest, bits_of(load_first(x + i, width - i)) & magnitude);
  const float amax = float_of(static_cast<uint32_t>(largest.largest()));  // NaN is above infinity in this order
  if (!(amax <= 0x1.fffffep127f)) return float_of(0x7FC00000u);
  return amax < smallest_row ? 1 : amax / 127;
}

// q = x / s, rounded half to even; zeros in a row without a scale.
template <class T>
inline void quantise(const T* x, int64_t count, float scale, int8_t* codes) {
  if (scale != scale) {
    std::memset(codes, 0, count);
    return;
  }
  const F32 step = F32::broadcast(scale);
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) to_int(F32::load(x + i) / step).store(codes + i);
  int8_t rest[F32::width];
  to_int(load_first(x + i, count - i) / step).store(rest);
  for (int64_t j = 0; i + j < count; ++j) codes[i + j] = rest[j];
}

// Integer sums by INT4 weights are those of a piece: a group, or at most so many units of one.
constexpr int64_t piece_units = 8;

struct Pieces {
  int64_t units_of_group, of_group, count;

  explicit Pieces(const Shape& weight)
      : units_of_group(weight.units_of_group()), of_group(blocks_of(units_of_group, piece_units)), count(weight.groups() * of_group) {}
};

// Rows for products by INT4 weights: bytes 0 .. 15 of a unit are its even inputs, bytes 16 .. 31 the odd ones.
struct QuantisedRows {
  Pieces pieces;
  bool by_groups;
  int64_t width, scales_of_row;
  Buffer<int8_t> codes;          // [rows][width], width padded
  Buffer<int32_t> corrections;   // [rows][pieces]: codes of weights are stored as q + 8, and -8 times a piece's sum takes that back
  Buffer<float> scales;          // [rows], or [rows][pieces]

  QuantisedRows(int64_t rows, const Shape& weight, bool by_groups)
      : pieces(weight), by_groups(by_groups), width(weight.padded_width() + 64), scales_of_row(by_groups ? pieces.count : 1),
        codes(rows * width), corrections(rows * pieces.count), scales(rows * scales_of_row) {}

  template <class T>
  void fill(int64_t row, const T* x, const Shape& weight) const {
    int8_t* to = codes + row * width;
    int32_t* correction = corrections + row * pieces.count;
    float* const steps = scales + row * scales_of_row;
    if (!by_groups) steps[0] = row_scale(x, weight.width);
    for (int64_t group = 0; group < weight.groups(); ++group, x += weight.group) {
      const float step = by_groups ? row_scale(x, weight.group) : steps[0];
      for (int64_t unit = 0; unit < pieces.units_of_group; ++unit, to += unit_inputs) {
        const int64_t piece = group * pieces.of_group + unit / piece_units;
        if (unit % piece_units == 0) correction[piece] = 0;
        if (by_groups) steps[piece] = step;
        correction[piece] -= 8 * fill_unit(x + unit * unit_inputs, smaller(unit_inputs, weight.group - unit * unit_inputs), step, to);
      }
    }
  }

 private:
  // The sum of the codes.
  template <class T>
  static int32_t fill_unit(const T* x, int64_t count, float step, int8_t* to) {
    int8_t unit[unit_inputs] = {};
    quantise(x, count, step, unit);
    int32_t sum = 0;
    for (int64_t i = 0; i < unit_inputs; ++i) {
      to[i % 2 * (unit_inputs / 2) + i / 2] = unit[i];
      sum += unit[i];
    }
    return sum;
  }
};

}  // namespace
}  // namespace glm5
