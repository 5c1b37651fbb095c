// Rows by panels of a weight, for kernels of any instruction set. A kernel (struct Kernel) brings
//
//     Packed        the type of packed activations, and Decoded, that of decoded weights
//     place(i)      where input i of a unit lies in a packed row
//     decode        units of a panel as vectors of four lanes: lane r of vector q holds inputs of output row 4q + r; on the way
//                   the cache is told what will be decoded next
//     tile<rows>    adds their products with some rows to sums that are kept four to an output
//     direct<rows>  both at once for a few rows, or direct_rows = 0; for direct_passes times as many, panel by panel
//
// or, where by_tiles is true, its own `multiply` in place of tile and direct.
//
// Every sum of an output is taken in the same order by tile and direct and for any number of rows: a row alone has the bits that
// it has in a batch. Weights are decoded in pieces that stay in the first-level cache, never as a whole.
#pragma once

#include "matmul/layout.h"
#include "parallel.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr int64_t row_block = 256;  // rows whose sums and activations stay in the second-level cache
constexpr int64_t panel_sums = 4 * panel_rows;

// Waking threads takes as long as some hundred thousand products.
inline int threads_for(int64_t products, int threads) { return products < 1 << 17 ? 1 : threads; }

template <class Kernel, int rows>
inline void tile_of(int64_t count, const typename Kernel::Decoded* decoded, int64_t steps, const typename Kernel::Packed* const* x,
                    int64_t offset, float* sums, bool begin) {
  if constexpr (rows == 1) {
    Kernel::template tile<1>(decoded, steps, x, offset, sums, begin);
  } else {
    if (count == rows) return Kernel::template tile<rows>(decoded, steps, x, offset, sums, begin);
    tile_of<Kernel, rows - 1>(count, decoded, steps, x, offset, sums, begin);
  }
}

template <class Kernel, int rows, class Weight>
inline void direct_of(int64_t count, const Weight& weight, int64_t panel, const typename Kernel::Packed* const* x, float* sums) {
  if constexpr (rows > 0) {
    if (count == rows) return Kernel::template direct<rows>(weight, panel, x, sums);
    direct_of<Kernel, rows - 1>(count, weight, panel, x, sums);
  }
}

// The four partial sums of each output of a panel, added.
inline void finish(const float* partial, float* sums) {
  constexpr int64_t width = F32::width;
  for (int64_t i = 0; i < panel_sums; i += 4 * width) {
    const float* from = partial + i;
    sums_of_fours(F32::load(from), F32::load(from + width), F32::load(from + 2 * width), F32::load(from + 3 * width)).store(sums + i / 4);
  }
}

// Sums [count][columns] of `count` packed rows by `panels` panels, where columns = panels * 16 and sums are `stride` apart.
template <class Kernel, class Weight>
void multiply(const Weight& weight, int64_t panel, int64_t panels, const typename Kernel::Packed* const* x, int64_t count, float* sums,
              int64_t stride) {
  if constexpr (Kernel::by_tiles) return Kernel::multiply(weight, panel, panels, x, count, sums, stride);
  const Buffer<float> partial(panels * count * panel_sums);
  if (count <= Kernel::direct_rows * Kernel::direct_passes) {
    const int64_t part = blocks_of(count, blocks_of(count, larger(1, Kernel::direct_rows)));
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t row = 0; row < count; row += part) {
        direct_of<Kernel, Kernel::direct_rows>(smaller(part, count - row), weight, panel + p, x + row, partial + (p * count + row) * panel_sums);
      }
    }
  } else {
    const Buffer<typename Kernel::Decoded> decoded(Kernel::chunk_units * unit_inputs * panel_rows);
    const int64_t units = weight.units();
    for (int64_t unit = 0; unit < units; unit += Kernel::chunk_units) {
      const int64_t length = smaller(Kernel::chunk_units, units - unit);
      for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* next = p + 1 < panels ? weight.at(panel + p + 1, unit) : weight.at(panel, unit + Kernel::chunk_units);
        Kernel::decode(weight, panel + p, unit, length, decoded, next);
        for (int64_t row = 0; row < count; row += Kernel::tile_rows) {
          tile_of<Kernel, Kernel::tile_rows>(smaller(Kernel::tile_rows, count - row), decoded, length * Kernel::unit_steps, x + row,
                                             unit * unit_inputs, partial + (p * count + row) * panel_sums, unit == 0);
        }
      }
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t row = 0; row < count; ++row) finish(partial + (p * count + row) * panel_sums, sums + row * stride + p * panel_rows);
  }
}

// Elements from one packed row to the next. Rows a multiple of 4096 bytes apart would fall on the same lines of the first-level cache.
template <class Kernel>
inline int64_t packed_stride(int64_t width) {
  return width + static_cast<int64_t>(64 / sizeof(typename Kernel::Packed));
}

// A row in the order of the kernel, units padded with zeros.
template <class Kernel, class T>
void pack_row(const T* x, const Shape& weight, typename Kernel::Packed* to) {
  for (int64_t start = 0; start < weight.width; start += weight.group) {
    for (int64_t i = 0; i < weight.group; i += unit_inputs, to += unit_inputs) {
      Kernel::pack(x + start + i, smaller(unit_inputs, weight.group - i), to);
    }
  }
}

// Where column `input` lies in a packed row.
template <class Kernel>
inline int64_t packed_place(const Shape& weight, int64_t input) {
  const int64_t inside = input % weight.group;
  return (input / weight.group * weight.units_of_group() + inside / unit_inputs) * unit_inputs + Kernel::place(inside % unit_inputs);
}

template <class T>
inline void store_row(const float* sums, int64_t columns, T* to) {
  int64_t i = 0;
  for (; i + F32::width <= columns; i += F32::width) F32::load(sums + i).store(to + i);
  for (; i < columns; ++i) narrow(sums[i], to + i);
}

}  // namespace
}  // namespace glm5
