// Products of rows that are quantised to 8 bits, a scale each, by INT8 weights: integer sums over whole rows, in any order.
#pragma once

#include "matmul/bytes.h"
#include "matmul/matmul.h"
#include "matmul/panels.h"
#include "matmul/quantised.h"

namespace glm5 {
namespace {

constexpr int int8_tile_rows = F32::width == 16 ? 3 : 2;
constexpr int panel_vectors = panel_sums / F32::width;

constexpr int64_t byte_step = 16;  // inputs of a lane

// Rows [first, first + count) by sixteen rows of the weight, which lie in `weights` as [steps][16 rows][16 inputs]: integer sums,
// four to an output.
template <int rows>
inline void int8_tile(const int8_t* weights, int64_t steps, const int8_t* x, int64_t stride, int32_t* to) {
  for (int first = 0; first < panel_vectors; first += 4) {
    I32 sum[rows][4], added[4];
    for (int v = 0; v < 4; ++v) {
      added[v] = I32::broadcast(0);
      for (int r = 0; r < rows; ++r) sum[r][v] = I32::broadcast(0);
    }
    for (int64_t step = 0; step < steps; ++step) {
      const int8_t* place = weights + step * panel_rows * byte_step + first * Bytes::width;
      Bytes inputs[rows];
      for (int r = 0; r < rows; ++r) inputs[r] = Bytes::broadcast_sixteen(x + r * stride + step * byte_step);
      for (int v = 0; v < 4; ++v) {
        const Bytes weight = Bytes::load(place + v * Bytes::width);
        for (int r = 0; r < rows; ++r) sum[r][v] = add_stored_products(sum[r][v], inputs[r], weight);
        if (stored_flip) added[v] = add_stored_products(added[v], Bytes::broadcast(stored_flip), weight);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < 4; ++v) (sum[r][v] - added[v]).store(to + r * panel_sums + (first + v) * I32::width);
    }
  }
}

template <int rows>
inline void int8_tile_of(int64_t count, const int8_t* weights, int64_t steps, const int8_t* x, int64_t stride, int32_t* to) {
  if constexpr (rows > 0) {
    if (count == rows) return int8_tile<rows>(weights, steps, x, stride, to);
    int8_tile_of<rows - 1>(count, weights, steps, x, stride, to);
  }
}

// Sixteen rows, or what is there of them, side by side; zeros behind the last input and the last row.
inline void interleave(const Int8Weight& weight, int64_t panel, int64_t steps, int8_t* to) {
  const int64_t rows = smaller(panel_rows, weight.rows - panel * panel_rows), whole = weight.width / byte_step;
  if (rows < panel_rows || whole < steps) std::memset(to, 0, steps * panel_rows * byte_step);
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* from = weight.codes + (panel * panel_rows + row) * weight.row_bytes;
    int8_t* place = to + row * byte_step;
    for (int64_t step = 0; step < whole; ++step) std::memcpy(place + step * panel_rows * byte_step, from + step * byte_step, byte_step);
    if (whole < steps) std::memcpy(place + whole * panel_rows * byte_step, from + whole * byte_step, weight.width - whole * byte_step);
  }
}

template <class T>
void multiply_quantised(const MatmulCall<Int8Weight>& call) {
  const Int8Weight& weight = call.weight;
  const int threads = threads_for(call.rows * weight.rows * weight.width, call.threads);
  const int64_t steps = blocks_of(weight.width, byte_step), stride = steps * byte_step + 64;
  const Buffer<int8_t> codes(call.rows * stride);
  const Buffer<float> scales(call.rows);
  parallel_for(threads, call.rows, [&](int64_t row) {
    const T* x = static_cast<const T*>(call.x) + row * call.stride;
    scales[row] = row_scale(x, weight.width);
    std::memset(codes + row * stride + (steps - 1) * byte_step, 0, byte_step);
    quantise(x, weight.width, scales[row], codes + row * stride);
    for (int64_t i = 0; i < steps * byte_step; ++i) codes[row * stride + i] ^= stored_flip;
  });
  parallel_for(threads, weight.panels(), [&](int64_t panel) {
    const Buffer<int8_t> weights(steps * panel_rows * byte_step);
    interleave(weight, panel, steps, weights);
    const int64_t columns = smaller(panel_rows, weight.rows - panel * panel_rows);
    int32_t sums[int8_tile_rows * panel_sums];
    for (int64_t first = 0; first < call.rows; first += int8_tile_rows) {
      const int64_t rows = smaller(int8_tile_rows, call.rows - first);
      int8_tile_of<int8_tile_rows>(rows, weights, steps, codes + first * stride, stride, sums);
      for (int64_t r = 0; r < rows; ++r) {
        T* y = static_cast<T*>(call.y) + (first + r) * weight.rows + panel * panel_rows;
        for (int64_t i = 0; i < columns; ++i) {
          const int32_t* four = sums + r * panel_sums + 4 * i;
          narrow(static_cast<float>(four[0] + four[1] + four[2] + four[3]) * (scales[first + r] * weight.scales[panel * panel_rows + i]), y + i);
        }
      }
    }
  });
}

}  // namespace
}  // namespace glm5
