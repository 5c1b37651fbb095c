// Products of rows that are quantised to 8 bits as they come, a scale each, in integers.
//
// Integer sums are exact, so that their order is free. By INT4 weights they are sums of one group, which enter a float sum with the
// group's scale, groups in their order; by INT8 weights they run over the whole row.
#pragma once

#include "matmul/bytes.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"

namespace glm5 {
namespace {

constexpr float smallest_row = 0x1p-100f;  // rows below count as zeros

// s = amax / 127, 1 for rows below smallest_row, NaN for rows that hold what is not finite.
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

// -- by INT4 weights ----------------------------------------------------------------------------------------------------------

// Rows for Int4ByBytes: bytes 0 .. 15 of a unit are its even inputs, bytes 16 .. 31 the odd ones.
struct QuantisedRows {
  int64_t width, groups;
  Buffer<int8_t> codes;          // [rows][width], width padded
  Buffer<int32_t> corrections;   // [rows][groups]: codes of weights are stored as q + 8, and -8 times a group's sum takes that back
  Buffer<float> scales;

  QuantisedRows(int64_t rows, const Shape& weight)
      : width(weight.padded_width() + 64), groups(weight.groups()), codes(rows * width), corrections(rows * groups), scales(rows) {}

  template <class T>
  void fill(int64_t row, const T* x, const Shape& weight) const {
    scales[row] = row_scale(x, weight.width);
    int8_t* to = codes + row * width;
    for (int64_t group = 0; group < groups; ++group) {
      int32_t sum = 0;
      for (int64_t i = 0; i < weight.group; i += unit_inputs, to += unit_inputs) {
        int8_t unit[unit_inputs] = {};
        quantise(x + group * weight.group + i, smaller(unit_inputs, weight.group - i), scales[row], unit);
        for (int64_t j = 0; j < unit_inputs; ++j) {
          to[j % 2 * (unit_inputs / 2) + j / 2] = unit[j];
          sum += unit[j];
        }
      }
      corrections[row * groups + group] = -8 * sum;
    }
  }
};

constexpr int int8_tile_rows = F32::width == 16 ? 3 : 2;
constexpr int panel_vectors = panel_sums / F32::width;
constexpr int64_t prefetch_ahead = 2048;  // bytes

// Sums of some rows by four vectors of a panel.
template <int rows>
struct ByteSums {
  F32 of[rows][4];

  // A group of one unit: its codes are held while all rows pass.
  void add_unit(const uint8_t* codes, const F32* scales, const int8_t* const* x, const int32_t* const* corrections) {
    Bytes even[4], odd[4];
    for (int v = 0; v < 4; ++v) {
      const Bytes both = Bytes::load(codes + v * Bytes::width);
      even[v] = low_nibbles(both);
      odd[v] = high_nibbles(both);
    }
    for (int r = 0; r < rows; ++r) {
      const Bytes x_even = Bytes::broadcast_sixteen(x[r]), x_odd = Bytes::broadcast_sixteen(x[r] + unit_inputs / 2);
      const I32 correction = in_first(*corrections[r]);
      for (int v = 0; v < 4; ++v) {
        const I32 products = add_products(add_products(correction, even[v], x_even), odd[v], x_odd);
        of[r][v] = multiply_add(to_float(products), scales[v], of[r][v]);
      }
    }
  }

  void add_group(const uint8_t* codes, int64_t units, const F32* scales, const int8_t* const* x, const int32_t* const* corrections) {
    for (int v = 0; v < 4; ++v) {
      I32 products[rows];
      for (int r = 0; r < rows; ++r) products[r] = in_first(*corrections[r]);
      for (int64_t unit = 0; unit < units; ++unit) {
        const Bytes both = Bytes::load(codes + unit * unit_bytes + v * Bytes::width), even = low_nibbles(both), odd = high_nibbles(both);
        for (int r = 0; r < rows; ++r) {
          const int8_t* from = x[r] + unit * unit_inputs;
          products[r] = add_products(products[r], even, Bytes::broadcast_sixteen(from));
          products[r] = add_products(products[r], odd, Bytes::broadcast_sixteen(from + unit_inputs / 2));
        }
      }
      for (int r = 0; r < rows; ++r) of[r][v] = multiply_add(to_float(products[r]), scales[v], of[r][v]);
    }
  }
};

// Sums of rows by a panel, four to an output as in panels.h.
template <int rows>
inline void int4_tile(const Int4Weight& weight, int64_t panel, const QuantisedRows& x, const int64_t* row, float* to) {
  constexpr int lanes = F32::width / 4;
  const int64_t groups = weight.groups(), units = weight.units_of_group();
  for (int first = 0; first < panel_vectors; first += 4) {
    ByteSums<rows> sums;
    const int8_t* codes_of_row[rows];
    const int32_t* corrections[rows];
    for (int r = 0; r < rows; ++r) {
      codes_of_row[r] = x.codes + row[r] * x.width;
      corrections[r] = x.corrections + row[r] * groups;
      for (int v = 0; v < 4; ++v) sums.of[r][v] = F32::zero();
    }
    const uint8_t* codes = weight.at(panel, 0) + first * Bytes::width;
    const bf16* scales = weight.scales_of(panel) + first * lanes;
    for (int64_t group = 0; group < groups; ++group, scales += panel_rows, codes += units * unit_bytes) {
      F32 steps[4];
      for (int v = 0; v < 4; ++v) {
        steps[v] = spread(scales + v * lanes);
        _mm_prefetch(codes + v * Bytes::width + prefetch_ahead, _MM_HINT_T0);
      }
      if (units == 1) {
        sums.add_unit(codes, steps, codes_of_row, corrections);
      } else {
        sums.add_group(codes, units, steps, codes_of_row, corrections);
      }
      for (int r = 0; r < rows; ++r) {
        codes_of_row[r] += units * unit_inputs;
        ++corrections[r];
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < 4; ++v) sums.of[r][v].store(to + r * panel_sums + (first + v) * F32::width);
    }
  }
}

template <int rows>
inline void int4_tile_of(int64_t count, const Int4Weight& weight, int64_t panel, const QuantisedRows& x, const int64_t* row, float* to) {
  if constexpr (rows > 0) {
    if (count == rows) return int4_tile<rows>(weight, panel, x, row, to);
    int4_tile_of<rows - 1>(count, weight, panel, x, row, to);
  }
}

// As `multiply` of panels.h, for rows number `row[0]` ... of x.
inline void multiply_int4(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                          float* sums, int64_t stride) {
  float partial[int8_tile_rows * panel_sums];
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t first = 0; first < count; first += int8_tile_rows) {
      const int64_t rows = smaller(int8_tile_rows, count - first);
      int4_tile_of<int8_tile_rows>(rows, weight, panel + p, x, row + first, partial);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = sums + (first + r) * stride + p * panel_rows;
        finish(partial + r * panel_sums, to);
        const F32 scale = F32::broadcast(x.scales[row[first + r]]);
        for (int64_t i = 0; i < panel_rows; i += F32::width) (F32::load(to + i) * scale).store(to + i);
      }
    }
  }
}

// silu(gate) * up of some rows and columns, rounded as the operator does.
template <class T>
void fill_plain_between(const ExpertsCall<Int4Weight>& call, const Rows& rows, int64_t panel, const QuantisedRows& hidden,
                        const int64_t* tokens, T* between) {
  const Int4Weight gate = call.gate.of_expert(rows.expert), up = call.up.of_expert(rows.expert);
  const int64_t panels = smaller(between_panels, gate.panels() - panel), width = panels * panel_rows;
  const int64_t column = panel * panel_rows, columns = smaller(width, gate.rows - column);
  const Buffer<float> gates(rows.count * width), ups(rows.count * width);
  multiply_int4(gate, panel, panels, hidden, tokens + rows.first, rows.count, gates, width);
  multiply_int4(up, panel, panels, hidden, tokens + rows.first, rows.count, ups, width);
  const auto rounded = [](const float* from) {
    T numbers[F32::width];
    F32::load(from).store(numbers);
    return F32::load(numbers);
  };
  for (int64_t row = 0; row < rows.count; ++row) {
    float values[between_panels * panel_rows];
    for (int64_t i = 0; i < width; i += F32::width) {
      silu_times(rounded(gates + row * width + i), rounded(ups + row * width + i)).store(values + i);
    }
    store_row(values, columns, between + (rows.first + row) * call.down.width + column);
  }
}

template <class T>
void mix_quantised_tokens(const ExpertsCall<Int4Weight>& call) {
  const Routing routing(call.ids, call.tokens * call.choices, call.experts);
  const int threads = threads_for(3 * routing.used * call.gate.width * call.down.width, call.threads);
  const QuantisedRows hidden(call.tokens, call.gate), between(routing.used, call.down);
  const Buffer<T> plain(routing.used * call.down.width);
  const Buffer<int64_t> tokens(routing.used), rows(routing.used);
  for (int64_t row = 0; row < routing.used; ++row) {
    tokens[row] = routing.order[row] / call.choices;
    rows[row] = row;
  }
  constexpr int64_t few = 8;
  parallel_for(threads, blocks_of(call.tokens, few), [&](int64_t block) {
    for (int64_t token = block * few; token < smaller((block + 1) * few, call.tokens); ++token) {
      hidden.fill(token, static_cast<const T*>(call.hidden) + token * call.stride, call.gate);
    }
  });
  const int64_t tasks = blocks_of(call.gate.panels(), between_panels);
  parallel_for(threads, routing.count * tasks, [&](int64_t task) {
    fill_plain_between<T>(call, routing.blocks[task / tasks], task % tasks * between_panels, hidden, tokens, plain);
  });
  parallel_for(threads, blocks_of(routing.used, few), [&](int64_t block) {
    for (int64_t row = block * few; row < smaller((block + 1) * few, routing.used); ++row) {
      between.fill(row, plain + row * call.down.width, call.down);
    }
  });
  parallel_for(threads, blocks_of(call.down.panels(), result_panels), [&](int64_t task) {
    const int64_t panel = task * result_panels;
    mix_columns<T>(call, routing, panel, [&](const Rows& block, int64_t panels, float* results) {
      const Int4Weight down = call.down.of_expert(block.expert);
      multiply_int4(down, panel, panels, between, rows + block.first, block.count, results, panels * panel_rows);
    });
  });
}

template <class T>
void mix_quantised(const ExpertsCall<Int4Weight>& call) {
  const int64_t token_bytes = call.gate.padded_width() + call.choices * (call.down.padded_width() + call.down.width * sizeof(T));
  in_chunks<T>(call, token_bytes, mix_quantised_tokens<T>);
}

// -- by INT8 weights ----------------------------------------------------------------------------------------------------------

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
