// Products in float, for AVX2 and AVX-512 without products of bfloat16, and for float activations everywhere.
#pragma once

#include "matmul/panels.h"

namespace glm5 {
namespace {

struct FloatTile {
  using Packed = float;
  using Decoded = float;
  static constexpr bool by_tiles = false;
  static constexpr int64_t chunk_units = 8, unit_steps = 8, direct_rows = 0, direct_passes = 0;
  static constexpr int tile_rows = F32::width == 16 ? 6 : 3;
  static constexpr int vectors = panel_sums / F32::width;  // of a step: four inputs of each output

  template <int rows>
  static void tile(const float* decoded, int64_t steps, const float* const* x, int64_t offset, float* sums, bool begin) {
    for (int first = 0; first < vectors; first += 4) {
      F32 sum[rows][4];
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < 4; ++v) sum[r][v] = begin ? F32::zero() : F32::load(sums + r * panel_sums + (first + v) * F32::width);
      }
      const float* weights = decoded + first * F32::width;
      for (int64_t step = 0; step < steps; ++step, weights += panel_sums) {
        F32 four[rows];
        for (int r = 0; r < rows; ++r) four[r] = F32::broadcast_four(x[r] + offset + 4 * step);
        for (int v = 0; v < 4; ++v) {
          const F32 weight = F32::load(weights + v * F32::width);
          for (int r = 0; r < rows; ++r) sum[r][v] = multiply_add(weight, four[r], sum[r][v]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < 4; ++v) sum[r][v].store(sums + r * panel_sums + (first + v) * F32::width);
      }
    }
  }
};

struct Int4ByFloats : FloatTile {
  // Nibble j of dword d is input 8d + j; step j takes the four dwords of a row.
  static int64_t place(int64_t input) { return input % 8 * 4 + input / 8; }

  template <class T>
  static void pack(const T* x, int64_t count, float* to) {
    for (int64_t i = 0; i < unit_inputs; ++i) to[place(i)] = i < count ? widen(x[i]) : 0;
  }

  static void decode(const Int4Weight& weight, int64_t panel, int64_t unit, int64_t units, float* to, const uint8_t* next) {
    const uint8_t* codes = weight.at(panel, unit);
    for (int64_t i = 0; i < units; ++i, codes += unit_bytes, to += unit_steps * panel_sums) {
      const bf16* scales = weight.scales_of(panel) + (unit + i) / weight.units_of_group() * panel_rows;
      float spread[panel_sums];
      for (int64_t s = 0; s < panel_sums; ++s) spread[s] = widen(scales[s / 4]);
      for (int64_t line = 0; line < unit_bytes; line += 64) _mm_prefetch(next + i * unit_bytes + line, _MM_HINT_T1);
      for (int v = 0; v < vectors; ++v) {
        const F32 scale = F32::load(spread + v * F32::width);
        I32 words = I32::load(reinterpret_cast<const int32_t*>(codes) + v * I32::width);
        for (int64_t step = 0; step < unit_steps; ++step, words = shift_right<4>(words)) {
          const F32 q = to_float((words & I32::broadcast(15)) - I32::broadcast(8));
          rounded_to_bf16(q * scale).store(to + step * panel_sums + v * F32::width);
        }
      }
    }
  }
};

// Weights of type T.
template <class T>
struct DenseByFloats : FloatTile {
  static int64_t place(int64_t input) { return input; }

  template <class X>
  static void pack(const X* x, int64_t count, float* to) {
    for (int64_t i = 0; i < unit_inputs; ++i) to[i] = i < count ? widen(x[i]) : 0;
  }

  static void decode(const DenseWeight& weight, int64_t panel, int64_t unit, int64_t units, float* to, const uint8_t* next) {
    const uint8_t* from = weight.at(panel, unit);
    const int64_t rows = smaller(panel_rows, weight.rows - panel * panel_rows);
    const int64_t inputs = smaller(units * unit_inputs, weight.width - unit * unit_inputs);
    if (rows < panel_rows || inputs < units * unit_inputs) std::memset(to, 0, units * unit_inputs * panel_rows * sizeof(float));
    for (int64_t row = 0; row < rows; ++row) {
      const T* numbers = reinterpret_cast<const T*>(from + row * weight.row_bytes);
      for (int64_t byte = 0; byte < inputs * weight.element_bytes; byte += 64) {
        _mm_prefetch(next + row * weight.row_bytes + byte, _MM_HINT_T1);
      }
      float* four = to + 4 * row;
      int64_t i = 0;
      for (; i + 4 <= inputs; i += 4, four += panel_sums) {
        for (int j = 0; j < 4; ++j) four[j] = widen(numbers[i + j]);
      }
      for (int j = 0; i + j < inputs; ++j) four[j] = widen(numbers[i + j]);
    }
  }
};

}  // namespace
}  // namespace glm5
