// Products of many rows that are quantised to 8 bits, a scale each, by INT8 weights, by the tile unit: as int8_kernel.h.
//
// Weights stand on the left: sixteen rows of them are a tile as they lie in memory. Rows of activations are laid out once, four
// inputs of each of sixteen rows, so that they are tiles of the right side. Sums are exact in any order, and become numbers by the
// expression of int8_kernel.h: the bits are the same. Up to few_rows go there, since half of every tile would be empty.
//
// What can be expected: of each 64 inputs two tiles of weights by two of rows take the unit 64 cycles and four loads of 8 each, the
// weights' from the first-level cache and the rows' from the second, 32 bytes a cycle; every 512 inputs sums come and go (4 x 8 loads
// and 4 x 16 stores beside 512 cycles of products). Nothing but the unit limits it by this count, which no machine has confirmed.
#pragma once

#include "matmul/matmul.h"
#include "matmul/panels.h"
#include "matmul/quantised.h"
#include "tiles.h"

namespace glm5 {
namespace {

constexpr int64_t step_inputs = tile_row_bytes, chunk_steps = 8, chunk_codes = chunk_steps * tile_bytes;

// Codes in tiles, [tiles of sixteen rows][steps][16][16 rows][4 inputs], zeros behind the last input and the last row.
struct TiledRows {
  int64_t rows, steps, tiles;
  Buffer<int8_t> codes;
  Buffer<float> scales;

  TiledRows(int64_t rows, int64_t width)
      : rows(rows), steps(blocks_of(width, step_inputs)), tiles(blocks_of(rows, tile_side)), codes(tiles * steps * tile_bytes),
        scales(tiles * tile_side) {}

  template <class T>
  void fill(int64_t tile, const T* x, int64_t stride, int64_t width) const {
    const Buffer<int8_t> row(steps * step_inputs);
    for (int64_t r = 0; r < tile_side; ++r) {
      const int64_t index = tile * tile_side + r;
      std::memset(row, 0, steps * step_inputs);
      if (index < rows) {
        scales[index] = row_scale(x + index * stride, width);
        quantise(x + index * stride, width, scales[index], row);
      }
      int8_t* to = codes + tile * steps * tile_bytes + 4 * r;
      for (int64_t i = 0; i < steps * step_inputs; i += 4, to += tile_row_bytes) std::memcpy(to, row + i, 4);
    }
  }
};

// Some steps of sixteen rows of weights, or what is there of them, as tiles; zeros behind the last input and the last row.
inline void gather(const Int8Weight& weight, int64_t panel, int64_t first, int64_t steps, int8_t* to) {
  const int64_t start = first * step_inputs, bytes = smaller(steps * step_inputs, weight.width - start);
  const int64_t rows = smaller(panel_rows, weight.rows - panel * panel_rows);
  if (rows < panel_rows || bytes < steps * step_inputs) std::memset(to, 0, steps * tile_bytes);
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* from = weight.codes + (panel * panel_rows + r) * weight.row_bytes + start;
    for (int64_t i = 0; i < bytes; i += step_inputs) {
      std::memcpy(to + i / step_inputs * tile_bytes + r * tile_row_bytes, from + i, smaller(step_inputs, bytes - i));
    }
  }
}

// One or two tiles of rows by one or two panels, some steps long, added to sums [tiles of rows][2 panels][16 outputs][16 rows].
template <int panels, int tiles>
inline void add_steps(TileUnit& unit, const int8_t* weights, const int8_t* rows, int64_t row_tile, int64_t steps, int32_t* sums, bool begin) {
  constexpr int64_t tile_sums = tile_side * tile_side;
  if (begin) {
    unit.zero<0>();
    unit.zero<1>();
    unit.zero<2>();
    unit.zero<3>();
  } else {
    unit.load<0>(sums, tile_row_bytes);
    if (panels > 1) unit.load<1>(sums + tile_sums, tile_row_bytes);
    if (tiles > 1) unit.load<2>(sums + 2 * tile_sums, tile_row_bytes);
    if (panels > 1 && tiles > 1) unit.load<3>(sums + 3 * tile_sums, tile_row_bytes);
  }
  for (int64_t i = 0; i < steps; ++i, weights += tile_bytes, rows += tile_bytes) {
    unit.load<4>(weights, tile_row_bytes);
    unit.load<6>(rows, tile_row_bytes);
    unit.add_byte_products<0, 4, 6>();
    if (panels > 1) {
      unit.load<5>(weights + chunk_codes, tile_row_bytes);
      unit.add_byte_products<1, 5, 6>();
    }
    if (tiles > 1) {
      unit.load<7>(rows + row_tile, tile_row_bytes);
      unit.add_byte_products<2, 4, 7>();
      if (panels > 1) unit.add_byte_products<3, 5, 7>();
    }
  }
  unit.store<0>(sums, tile_row_bytes);
  if (panels > 1) unit.store<1>(sums + tile_sums, tile_row_bytes);
  if (tiles > 1) unit.store<2>(sums + 2 * tile_sums, tile_row_bytes);
  if (panels > 1 && tiles > 1) unit.store<3>(sums + 3 * tile_sums, tile_row_bytes);
}

// Sixteen vectors of sixteen, to those of their first numbers, their second, ...
inline void transpose(const int32_t* from, int32_t* to) {
  __m512i lanes[4][4];  // [i][q]: lane l holds number 4l + i of vectors 4q ... 4q + 3
  for (int q = 0; q < 4; ++q) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(from + (4 * q + i) * tile_side);
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    lanes[0][q] = _mm512_unpacklo_epi64(low01, low23);
    lanes[1][q] = _mm512_unpackhi_epi64(low01, low23);
    lanes[2][q] = _mm512_unpacklo_epi64(high01, high23);
    lanes[3][q] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low01 = _mm512_shuffle_i64x2(lanes[i][0], lanes[i][1], 0x44), high01 = _mm512_shuffle_i64x2(lanes[i][0], lanes[i][1], 0xEE);
    const __m512i low23 = _mm512_shuffle_i64x2(lanes[i][2], lanes[i][3], 0x44), high23 = _mm512_shuffle_i64x2(lanes[i][2], lanes[i][3], 0xEE);
    _mm512_storeu_si512(to + i * tile_side, _mm512_shuffle_i64x2(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + i) * tile_side, _mm512_shuffle_i64x2(low01, low23, 0xDD));
    _mm512_storeu_si512(to + (8 + i) * tile_side, _mm512_shuffle_i64x2(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + i) * tile_side, _mm512_shuffle_i64x2(high01, high23, 0xDD));
  }
}

// Sums of one panel and one tile of rows as numbers, into their places.
template <class T>
void store_outputs(const MatmulCall<Int8Weight>& call, const TiledRows& x, int64_t panel, int64_t tile, const int32_t* sums) {
  const Int8Weight& weight = call.weight;
  const int64_t column = panel * panel_rows, columns = smaller(panel_rows, weight.rows - column), first = tile * tile_side;
  const F32 scales = load_first(weight.scales + column, columns);
  alignas(64) int32_t by_rows[tile_side * panel_rows];
  transpose(sums, by_rows);
  for (int64_t r = 0; r < smaller(tile_side, call.rows - first); ++r) {
    const F32 numbers = to_float(I32::load(by_rows + r * panel_rows)) * (F32::broadcast(x.scales[first + r]) * scales);
    T* y = static_cast<T*>(call.y) + (first + r) * weight.rows + column;
    columns == panel_rows ? numbers.store(y) : store_first(numbers, y, columns);
  }
}

template <class T>
void multiply_quantised_by_tiles(const MatmulCall<Int8Weight>& call) {
  constexpr int64_t panels_at_once = 2, tiles_of_block = row_block / tile_side;
  const Int8Weight& weight = call.weight;
  const int threads = threads_for(call.rows * weight.rows * weight.width, call.threads);
  const TiledRows x(call.rows, weight.width);
  parallel_for(threads, x.tiles, [&](int64_t tile) { x.fill(tile, static_cast<const T*>(call.x), call.stride, weight.width); });
  const int64_t pairs = blocks_of(weight.panels(), panels_at_once), row_tile = x.steps * tile_bytes;
  parallel_for(threads, pairs * blocks_of(x.tiles, tiles_of_block), [&](int64_t task) {
    const int64_t panel = task % pairs * panels_at_once, panels = smaller(panels_at_once, weight.panels() - panel);
    const int64_t first = task / pairs * tiles_of_block, tiles = smaller(tiles_of_block, x.tiles - first);
    const Buffer<int8_t> weights(panels_at_once * chunk_codes);
    const Buffer<int32_t> sums(tiles * panels_at_once * tile_side * tile_side);
    const auto sums_at = [&](int64_t tile, int64_t p) { return sums + (tile * panels_at_once + p) * tile_side * tile_side; };
    TileUnit unit;
    for (int64_t step = 0; step < x.steps; step += chunk_steps) {
      const int64_t steps = smaller(chunk_steps, x.steps - step);
      for (int64_t p = 0; p < panels; ++p) gather(weight, panel + p, step, steps, weights + p * chunk_codes);
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int8_t* rows = x.codes + (first + tile) * row_tile + step * tile_bytes;
        const bool two = tiles - tile > 1;
        if (panels == 1) {
          (two ? add_steps<1, 2> : add_steps<1, 1>)(unit, weights, rows, row_tile, steps, sums_at(tile, 0), step == 0);
        } else {
          (two ? add_steps<2, 2> : add_steps<2, 1>)(unit, weights, rows, row_tile, steps, sums_at(tile, 0), step == 0);
        }
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t p = 0; p < panels; ++p) store_outputs<T>(call, x, panel + p, first + tile, sums_at(tile, p));
    }
  });
}

}  // namespace
}  // namespace glm5
