// Products of bfloat16 pairs by the tile unit. A unit of a panel is one tile of weights; up to four tiles of rows pass by it.
#pragma once

#include "matmul/bf16_kernel.h"
#include "tiles.h"

namespace glm5 {
namespace {

// `Pairs` decodes weights and packs rows (bf16_kernel.h).
template <class Pairs>
struct ByTiles : Pairs {
  static constexpr bool by_tiles = true;
  static constexpr int64_t unit_words = unit_inputs * panel_rows, chunk_inputs = Pairs::chunk_units * unit_inputs;
  static constexpr int64_t tiles_at_once = 4;

  template <class Weight>
  static void multiply(const Weight& weight, int64_t panel, int64_t panels, const bf16* const* x, int64_t count, float* sums, int64_t stride) {
    const int64_t row_tiles = blocks_of(count, tile_side), width = panels * panel_rows, units = weight.units();
    const Buffer<bf16> rows(row_tiles * tile_side * chunk_inputs), decoded(chunk_inputs * panel_rows), pairs(chunk_inputs * panel_rows);
    const Buffer<float> totals(row_tiles * tile_side * width);
    std::memset(rows + count * chunk_inputs, 0, (row_tiles * tile_side - count) * chunk_inputs * sizeof(bf16));
    TileUnit unit;
    for (int64_t first = 0; first < units; first += Pairs::chunk_units) {
      const int64_t length = smaller(Pairs::chunk_units, units - first);
      for (int64_t row = 0; row < count; ++row) {
        std::memcpy(rows + row * chunk_inputs, x[row] + first * unit_inputs, length * unit_inputs * sizeof(bf16));
      }
      for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* next = p + 1 < panels ? weight.at(panel + p + 1, first) : weight.at(panel, first + Pairs::chunk_units);
        Pairs::decode(weight, panel + p, first, length, decoded, next);
        for (int64_t i = 0; i < length * Pairs::unit_steps; ++i) arrange(decoded + i * 8 * panel_rows, pairs + i * 8 * panel_rows);
        for (int64_t tile = 0; tile < row_tiles; tile += tiles_at_once) {
          const bf16* from = rows + tile * tile_side * chunk_inputs;
          float* to = totals + tile * tile_side * width + p * panel_rows;
          switch (smaller(tiles_at_once, row_tiles - tile)) {
            case 1: add<1>(unit, from, pairs, length, to, width, first == 0); break;
            case 2: add<2>(unit, from, pairs, length, to, width, first == 0); break;
            case 3: add<3>(unit, from, pairs, length, to, width, first == 0); break;
            default: add<4>(unit, from, pairs, length, to, width, first == 0);
          }
        }
      }
    }
    for (int64_t row = 0; row < count; ++row) std::memcpy(sums + row * stride, totals + row * width, width * sizeof(float));
  }

 private:
  // A step as Pairs decodes it, pair d of output 4q + r in number 4r + d of vector q, to one tile row for each pair.
  static void arrange(const bf16* step, bf16* to) {
    __m512i quad[4];
    for (int q = 0; q < 4; ++q) quad[q] = _mm512_loadu_si512(step + 32 * q);
    const __m512i low01 = _mm512_unpacklo_epi32(quad[0], quad[1]), high01 = _mm512_unpackhi_epi32(quad[0], quad[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(quad[2], quad[3]), high23 = _mm512_unpackhi_epi32(quad[2], quad[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_unpacklo_epi64(low01, low23)));
    _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi32(order, _mm512_unpackhi_epi64(low01, low23)));
    _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi32(order, _mm512_unpacklo_epi64(high01, high23)));
    _mm512_storeu_si512(to + 96, _mm512_permutexvar_epi32(order, _mm512_unpackhi_epi64(high01, high23)));
  }

  // Tiles 0 .. 3 are sums, 4 and 5 rows, 6 the weights.
  template <int tiles>
  static void add(TileUnit& unit, const bf16* rows, const bf16* pairs, int64_t length, float* to, int64_t width, bool begin) {
    constexpr int64_t row_stride = chunk_inputs * sizeof(bf16), row_tile = tile_side * chunk_inputs;
    const int64_t stride = width * sizeof(float), sum_tile = tile_side * width;
    if (begin) {
      unit.zero<0>();
      if (tiles > 1) unit.zero<1>();
      if (tiles > 2) unit.zero<2>();
      if (tiles > 3) unit.zero<3>();
    } else {
      unit.load<0>(to, stride);
      if (tiles > 1) unit.load<1>(to + sum_tile, stride);
      if (tiles > 2) unit.load<2>(to + 2 * sum_tile, stride);
      if (tiles > 3) unit.load<3>(to + 3 * sum_tile, stride);
    }
    for (int64_t i = 0; i < length; ++i, rows += unit_inputs, pairs += unit_words) {
      unit.load<6>(pairs, tile_row_bytes);
      unit.load<4>(rows, row_stride);
      unit.add_products<0, 4, 6>();
      if (tiles > 1) {
        unit.load<5>(rows + row_tile, row_stride);
        unit.add_products<1, 5, 6>();
      }
      if (tiles > 2) {
        unit.load<4>(rows + 2 * row_tile, row_stride);
        unit.add_products<2, 4, 6>();
      }
      if (tiles > 3) {
        unit.load<5>(rows + 3 * row_tile, row_stride);
        unit.add_products<3, 5, 6>();
      }
    }
    unit.store<0>(to, stride);
    if (tiles > 1) unit.store<1>(to + sum_tile, stride);
    if (tiles > 2) unit.store<2>(to + 2 * sum_tile, stride);
    if (tiles > 3) unit.store<3>(to + 3 * sum_tile, stride);
  }
};

}  // namespace
}  // namespace glm5
