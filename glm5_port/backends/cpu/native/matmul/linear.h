// One product, for kernels of any instruction set (panels.h).
#pragma once

#include "matmul/matmul.h"
#include "matmul/panels.h"

namespace glm5 {
namespace {

constexpr int64_t linear_panels = 4;  // a task's columns

template <class Kernel, class T, class Weight>
void multiply_rows(const MatmulCall<Weight>& call) {
  using Packed = typename Kernel::Packed;
  const Weight& weight = call.weight;
  const int64_t stride = packed_stride<Kernel>(weight.padded_width());
  const int threads = threads_for(call.rows * weight.rows * weight.width, call.threads);
  const Buffer<Packed> packed(call.rows * stride);
  const Buffer<const Packed*> x(call.rows);
  parallel_for(threads, blocks_of(call.rows, row_block), [&](int64_t block) {
    for (int64_t row = block * row_block; row < smaller((block + 1) * row_block, call.rows); ++row) {
      x[row] = packed + row * stride;
      pack_row<Kernel>(static_cast<const T*>(call.x) + row * call.stride, weight, packed + row * stride);
    }
  });
  const int64_t column_blocks = blocks_of(weight.panels(), linear_panels);
  parallel_for(threads, column_blocks * blocks_of(call.rows, row_block), [&](int64_t task) {
    const int64_t panel = task % column_blocks * linear_panels, panels = smaller(linear_panels, weight.panels() - panel);
    const int64_t first = task / column_blocks * row_block, count = smaller(row_block, call.rows - first);
    const int64_t column = panel * panel_rows, columns = smaller(panels * panel_rows, weight.rows - column);
    const Buffer<float> sums(count * panels * panel_rows);
    multiply<Kernel>(weight, panel, panels, x + first, count, sums, panels * panel_rows);
    for (int64_t row = 0; row < count; ++row) {
      store_row(sums + row * panels * panel_rows, columns, static_cast<T*>(call.y) + (first + row) * weight.rows + column);
    }
  });
}

}  // namespace
}  // namespace glm5
