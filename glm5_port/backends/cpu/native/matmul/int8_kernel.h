// Products of rows that are quantised to 8 bits, a scale each, by INT8 weights: integer sums over whole rows, in any order.
//
// For a few rows the weight is read once, as it lies. For many, sixteen of its rows are put side by side, a chunk in the first-level
// cache, and met by tiles of rows. Sums are exact, so that a row has the same bits either way.
#pragma once

#include "matmul/bytes.h"
#include "matmul/matmul.h"
#include "matmul/panels.h"
#include "matmul/quantised.h"

namespace glm5 {
namespace {

constexpr int direct_int8_rows = F32::width == 16 ? 4 : 1;  // at once
constexpr int64_t few_int8_rows = 4 * direct_int8_rows;     // in passes over a panel that the second-level cache holds
constexpr int int8_tile_rows = F32::width == 16 ? 5 : 2;
constexpr int panel_vectors = panel_sums / F32::width;

constexpr int64_t byte_step = 16;  // inputs of a lane
constexpr int64_t int8_chunk = 64;  // steps: 16 KiB of a panel

// -- a few rows ---------------------------------------------------------------------------------------------------------------

// Rows by four rows of the weight from `row` on, [rows][16] sums; behind the last row of the weight it is taken again.
template <int rows>
inline void int8_direct(const Int8Weight& weight, int64_t row, const int8_t* x, int64_t stride, int32_t* to) {
  const int8_t* from[4];
  I32 sum[rows][4], added[4];
  for (int k = 0; k < 4; ++k) {
    from[k] = weight.codes + smaller(row + k, weight.rows - 1) * weight.row_bytes;
    added[k] = I32::broadcast(0);
    for (int r = 0; r < rows; ++r) sum[r][k] = I32::broadcast(0);
  }
  const auto meet = [&](int k, Bytes codes, int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < rows; ++r) sum[r][k] = add_stored_products(sum[r][k], Bytes::load(x + r * stride + i), codes);
    if (stored_flip) added[k] = add_stored_products(added[k], Bytes::broadcast(stored_flip), codes);
  };
  int64_t i = 0;
  for (; i + Bytes::width <= weight.width; i += Bytes::width) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      _mm_prefetch(from[k] + 4 * weight.row_bytes + i, _MM_HINT_T1);
      meet(k, Bytes::load(from[k] + i), i);
    }
  }
  if (i < weight.width) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      int8_t last[Bytes::width] = {};
      std::memcpy(last, from[k] + i, weight.width - i);
      meet(k, Bytes::load(last), i);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < 4; ++k) to[r * panel_rows + k] = (sum[r][k] - added[k]).total();
  }
}

template <int rows>
inline void int8_direct_of(int64_t count, const Int8Weight& weight, int64_t row, const int8_t* x, int64_t stride, int32_t* to) {
  if constexpr (rows > 0) {
    if (count == rows) return int8_direct<rows>(weight, row, x, stride, to);
    int8_direct_of<rows - 1>(count, weight, row, x, stride, to);
  }
}

// -- many rows ----------------------------------------------------------------------------------------------------------------

// Sixteen rows of the weight, or what is there of them, side by side: [steps][16 rows][16 inputs], zeros behind the last input and
// the last row. `added` is what their products with stored bytes have too much, four to an output.
struct Int8Chunk {
  alignas(64) int8_t codes[int8_chunk * panel_rows * byte_step];
  alignas(64) int32_t added[panel_sums];

  void fill(const Int8Weight& weight, int64_t panel, int64_t step, int64_t steps) {
    const int64_t rows = smaller(panel_rows, weight.rows - panel * panel_rows), inputs = smaller(steps * byte_step, weight.width - step * byte_step);
    const int64_t whole = inputs / byte_step;
    if (rows < panel_rows || whole < steps) std::memset(codes, 0, steps * panel_rows * byte_step);
    for (int64_t row = 0; row < rows; ++row) {
      const int8_t* from = weight.codes + (panel * panel_rows + row) * weight.row_bytes + step * byte_step;
      int8_t* place = codes + row * byte_step;
      for (int64_t i = 0; i < whole; ++i) std::memcpy(place + i * panel_rows * byte_step, from + i * byte_step, byte_step);
      if (whole < steps) std::memcpy(place + whole * panel_rows * byte_step, from + whole * byte_step, inputs - whole * byte_step);
    }
    for (int v = 0; v < panel_vectors; ++v) {
      I32 sum = I32::broadcast(0);
      for (int64_t i = 0; stored_flip && i < steps; ++i) {
        sum = add_stored_products(sum, Bytes::broadcast(stored_flip), Bytes::load(codes + i * panel_rows * byte_step + v * Bytes::width));
      }
      sum.store(added + v * I32::width);
    }
  }
};

// Adds the products of some rows by a chunk to integer sums, four to an output.
template <int rows>
inline void int8_tile(const Int8Chunk& chunk, int64_t steps, const int8_t* x, int64_t stride, int32_t* to, bool begin) {
  for (int first = 0; first < panel_vectors; first += 4) {
    I32 sum[rows][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const I32 added = I32::load(chunk.added + (first + v) * I32::width);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r][v] = (begin ? I32::broadcast(0) : I32::load(to + r * panel_sums + (first + v) * I32::width)) - added;
      }
    }
    const int8_t* place = chunk.codes + first * Bytes::width;
    for (int64_t step = 0; step < steps; ++step, place += panel_rows * byte_step) {
      Bytes weights[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) weights[v] = Bytes::load(place + v * Bytes::width);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Bytes inputs = Bytes::broadcast_sixteen(x + r * stride + step * byte_step);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = add_stored_products(sum[r][v], inputs, weights[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v].store(to + r * panel_sums + (first + v) * I32::width);
    }
  }
}

template <int rows>
inline void int8_tile_of(int64_t count, const Int8Chunk& chunk, int64_t steps, const int8_t* x, int64_t stride, int32_t* to, bool begin) {
  if constexpr (rows > 0) {
    if (count == rows) return int8_tile<rows>(chunk, steps, x, stride, to, begin);
    int8_tile_of<rows - 1>(count, chunk, steps, x, stride, to, begin);
  }
}

// Sums [count][16] of rows and a panel.
inline void multiply_int8(const Int8Weight& weight, int64_t panel, const int8_t* x, int64_t stride, int64_t count, int32_t* sums) {
  if (count <= few_int8_rows) {
    const int64_t part = blocks_of(count, blocks_of(count, direct_int8_rows));
    for (int64_t row = 0; row < count; row += part) {
      const int64_t rows = smaller(part, count - row);
      for (int64_t i = 0; i < panel_rows; i += 4) {
        int8_direct_of<direct_int8_rows>(rows, weight, panel * panel_rows + i, x + row * stride, stride, sums + row * panel_rows + i);
      }
    }
    return;
  }
  const int64_t steps = blocks_of(weight.width, byte_step);
  const Buffer<int32_t> fours(count * panel_sums);
  Int8Chunk chunk;
  for (int64_t step = 0; step < steps; step += int8_chunk) {
    const int64_t some = smaller(int8_chunk, steps - step);
    chunk.fill(weight, panel, step, some);
    for (int64_t row = 0; row < count; row += int8_tile_rows) {
      int8_tile_of<int8_tile_rows>(smaller(int8_tile_rows, count - row), chunk, some, x + row * stride + step * byte_step, stride,
                                   fours + row * panel_sums, step == 0);
    }
  }
  for (int64_t i = 0; i < count * panel_rows; ++i) sums[i] = fours[4 * i] + fours[4 * i + 1] + fours[4 * i + 2] + fours[4 * i + 3];
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
    std::memset(codes + row * stride + (steps - 1) * byte_step, 0, byte_step + 64);
    quantise(x, weight.width, scales[row], codes + row * stride);
    for (int64_t i = 0; i < steps * byte_step; ++i) codes[row * stride + i] ^= stored_flip;
  });
  parallel_for(threads, weight.panels(), [&](int64_t panel) {
    const int64_t columns = smaller(panel_rows, weight.rows - panel * panel_rows);
    const Buffer<int32_t> sums(smaller(call.rows, row_block) * panel_rows);
    for (int64_t first = 0; first < call.rows; first += row_block) {
      const int64_t count = smaller(row_block, call.rows - first);
      multiply_int8(weight, panel, codes + first * stride, stride, count, sums);
      for (int64_t r = 0; r < count; ++r) {
        T* y = static_cast<T*>(call.y) + (first + r) * weight.rows + panel * panel_rows;
        for (int64_t i = 0; i < columns; ++i) {
          narrow(static_cast<float>(sums[r * panel_rows + i]) * (scales[first + r] * weight.scales[panel * panel_rows + i]), y + i);
        }
      }
    }
  });
}

}  // namespace
}  // namespace glm5
