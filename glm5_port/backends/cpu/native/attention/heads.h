// Products of each head's rows by that head's own matrix: y[t, h] = weight[h] x[t, h]. Both sides are read as they lie in memory:
// a vector holds neighbouring numbers of a row, and its lanes are added up at the end of every span.
#pragma once

#include "attention/stage.h"
#include "parallel.h"

namespace glm5 {
namespace {

constexpr int64_t rows_of_task = 48;  // of a weight
constexpr int64_t numbers_of_span = 4096;  // of a row: the rows of a task and some tokens stay in the second-level cache
constexpr int row_tile = 6, token_tile = F32::width == 16 ? 4 : 2;

// Rows of numbers of type T, `stride` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;

  Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

// A vector of the last numbers of a row, with zeros behind them.
template <class Unit, class T>
typename Unit::Operand load_last(const T* from, int64_t count) {
  T numbers[F32::width * Unit::depth] = {};
  std::memcpy(numbers, from, count * sizeof(T));
  return Unit::load_row(numbers);
}

// sums[row][token] += row of weight . token of x, over `width` numbers.
template <class Unit, class T, int rows, int tokens>
void dot_tile(Matrix<T> weight, Matrix<T> x, int64_t width, float* sums, int64_t tokens_in_all) {
  constexpr int64_t step = F32::width * Unit::depth;
  F32 sum[rows][tokens];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sum[r][t] = F32::zero();
  for (int64_t k = 0; k < width; k += step) {
    const bool whole = k + step <= width;
    typename Unit::Operand column[tokens];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const T* from = x.data + t * x.stride + k;
      column[t] = whole ? Unit::load_row(from) : load_last<Unit>(from, width - k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const T* from = weight.data + r * weight.stride + k;
      const typename Unit::Operand row = whole ? Unit::load_row(from) : load_last<Unit>(from, width - k);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) sum[r][t] = Unit::multiply_add(row, column[t], sum[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sums[r * tokens_in_all + t] += sum[r][t].sum();
}

template <class Unit, class T, int tokens>
void dot_rows(int64_t rows, Matrix<T> weight, Matrix<T> x, int64_t width, float* sums, int64_t tokens_in_all) {
  for (int64_t row = 0; row < rows; row += row_tile) {
    const auto part = weight.at(row, 0);
    float* to = sums + row * tokens_in_all;
    switch (smaller(row_tile, rows - row)) {
      case 1: dot_tile<Unit, T, 1, tokens>(part, x, width, to, tokens_in_all); break;
      case 2: dot_tile<Unit, T, 2, tokens>(part, x, width, to, tokens_in_all); break;
      case 3: dot_tile<Unit, T, 3, tokens>(part, x, width, to, tokens_in_all); break;
      case 4: dot_tile<Unit, T, 4, tokens>(part, x, width, to, tokens_in_all); break;
      case 5: dot_tile<Unit, T, 5, tokens>(part, x, width, to, tokens_in_all); break;
      default: dot_tile<Unit, T, row_tile, tokens>(part, x, width, to, tokens_in_all);
    }
  }
}

template <class Unit, class T>
void dot_block(int64_t rows, int64_t tokens, Matrix<T> weight, Matrix<T> x, int64_t width, float* sums) {
  for (int64_t token = 0; token < tokens; token += token_tile) {
    const auto part = x.at(token, 0);
    switch (smaller(token_tile, tokens - token)) {
      case 1: dot_rows<Unit, T, 1>(rows, weight, part, width, sums + token, tokens); break;
      case 2: dot_rows<Unit, T, 2>(rows, weight, part, width, sums + token, tokens); break;
      case 3: dot_rows<Unit, T, token_tile == 4 ? 3 : 2>(rows, weight, part, width, sums + token, tokens); break;
      default: dot_rows<Unit, T, token_tile>(rows, weight, part, width, sums + token, tokens);
    }
  }
}

// Some rows of one head's weight against all tokens.
template <class Unit, class T>
void multiply_rows_of_head(const HeadsCall& call, int64_t head, int64_t first) {
  constexpr int64_t tokens_of_block = 256;
  const int64_t rows = smaller(rows_of_task, call.width_out - first);
  const Matrix<T> weight = {static_cast<const T*>(call.weight) + head * call.weight_head_stride + first * call.weight_row_stride,
                            call.weight_row_stride};
  const Matrix<T> x = {static_cast<const T*>(call.x) + head * call.head_stride, call.token_stride};
  const Buffer<float> sums(rows * tokens_of_block);
  for (int64_t token = 0; token < call.tokens; token += tokens_of_block) {
    const int64_t tokens = smaller(tokens_of_block, call.tokens - token);
    std::memset(sums, 0, rows * tokens * sizeof(float));
    for (int64_t k = 0; k < call.width_in; k += numbers_of_span)
      dot_block<Unit>(rows, tokens, weight.at(0, k), x.at(token, k), smaller(numbers_of_span, call.width_in - k), sums);
    for (int64_t t = 0; t < tokens; ++t) {
      T* to = static_cast<T*>(call.y) + ((token + t) * call.heads + head) * call.width_out + first;
      for (int64_t row = 0; row < rows; ++row) narrow(sums[row * tokens + t], to + row);
    }
  }
}

template <class Unit, class T>
void multiply_heads(const HeadsCall& call) {
  const int64_t blocks = blocks_of(call.width_out, rows_of_task);
  parallel_for(call.threads, call.heads * blocks,
               [&](int64_t task) { multiply_rows_of_head<Unit, T>(call, task / blocks, task % blocks * rows_of_task); });
}

}  // namespace
}  // namespace glm5
