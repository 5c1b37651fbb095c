// Products of rows that are quantised to 8 bits by INT4 weights, by the tile unit: as int4_bytes.h, for many rows.
//
// Codes of a chunk of a panel are turned once, with their sign, into tiles of 64 inputs (32 at the end of a piece of an odd number of
// units), which stay in the first-level cache; up to four tiles of sums take two rows' tiles, or two pieces, by two panels. Sums of a
// piece are whole and exact; they leave the tiles and enter float sums as in int4_bytes.h, by the same expressions in the same order:
// the bits of a row are those of the vector kernels, and so nothing depends on which of the two a row takes. Up to few_rows go there:
// half of every tile would be empty, and reading weights takes longer than multiplying.
//
// What can be expected, in cycles of 16 rows by 16 outputs of one piece of u units, where products alone take 8u at the unit's peak.
// The unit works 16 for each 64 inputs or part of them. Two loads a cycle: 4u to 8u for tiles of both sides (u = 1: 8), 8 for the
// sums that left, 1 for float sums, and 4 for scales of rows' groups. One store a cycle of 64 bytes: 16 for sums, 1 for float sums, 2
// to 4 for gathering rows. Two vector operations a cycle: 16, or 24 with scales of rows' groups. So
//
//     groups of 32    u = 1   at most 8 / 21 = 38 % of the peak with one scale for a row, 8 / 24 = 33 % with one for each group
//     groups of 128   u = 4   32 / 42 = 76 %, 32 / 46 = 70 %
//     a whole row     u = 8   64 / 77 = 83 %  (pieces of 256 inputs)
//
// Counted, never measured: no machine with the unit has run this.
#pragma once

#include "matmul/int4_bytes.h"
#include "tiles.h"

namespace glm5 {
namespace {

constexpr int64_t few_rows = tile_side / 2;

struct Int4ByByteTiles {
  // As `multiply_int4`.
  static void multiply(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                       float* sums, int64_t stride) {
    if (count <= few_rows) return multiply_int4(weight, panel, panels, x, row, count, sums, stride);
    x.by_groups ? multiply_tiles<true>(weight, panel, panels, x, row, count, sums, stride)
                : multiply_tiles<false>(weight, panel, panels, x, row, count, sums, stride);
  }

 private:
  static constexpr int64_t panels_at_once = 2, chunk_inputs = piece_units * unit_inputs, unit_codes = unit_inputs * panel_rows;
  static constexpr int64_t panel_codes = piece_units * unit_codes, tile_sums = tile_side * panel_rows;

  // Tiles 0 .. 3 are sums; 4 and 5 rows and weights of 64 inputs, 6 and 7 those of 32.
  static TileShapes shapes() {
    TileShapes made;
    made.of[6].row_bytes = unit_inputs;
    made.of[7].rows = unit_inputs / 4;
    return made;
  }

  // A chunk of one panel: tiles of weights, one behind the other, and its scales in the order of their outputs.
  struct Panel {
    alignas(64) int8_t codes[panel_codes];
    alignas(64) float scales[piece_units * panel_rows];

    void fill(const Int4Weight& weight, int64_t panel, const Chunk& chunk, int64_t pieces_of_group) {
      const uint8_t* from = weight.at(panel, chunk.unit);
      const bf16* steps = weight.scales_of(panel);
      for (int64_t unit = 0; unit < chunk.units(); ++unit, from += unit_bytes) {
        Bytes turned[unit_steps];
        turn(from, turned);
        for (int64_t i = 0; i < unit_steps; ++i) {
          const Bytes with_sign = {_mm512_sub_epi8(turned[i].v, _mm512_set1_epi8(8))};
          with_sign.store(codes + unit * unit_codes + i * Bytes::width);
        }
      }
      for (int64_t piece = 0; piece < chunk.pieces; ++piece) {
        scales_of_strip(steps + (chunk.piece + piece) / pieces_of_group * panel_rows).store(scales + piece * panel_rows);
      }
    }
  };

  // A chunk of the rows, in whole tiles with zeros behind the last row.
  struct ChunkOfRows {
    Buffer<int8_t> codes;   // [rows][chunk_inputs]
    Buffer<float> scales;   // [rows][piece_units], where they are of groups

    explicit ChunkOfRows(int64_t rows) : codes(rows * chunk_inputs), scales(rows * piece_units) {
      std::memset(codes, 0, rows * chunk_inputs);
      std::memset(scales, 0, rows * piece_units * sizeof(float));
    }
    void fill(const QuantisedRows& x, const int64_t* row, int64_t count, const Chunk& chunk) const {
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(codes + r * chunk_inputs, x.codes + row[r] * x.width + chunk.unit * unit_inputs, chunk.units() * unit_inputs);
        if (x.by_groups) {
          std::memcpy(scales + r * piece_units, x.scales + row[r] * x.scales_of_row + chunk.piece, chunk.pieces * sizeof(float));
        }
      }
    }
  };

  template <bool by_groups>
  static void multiply_tiles(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row,
                             int64_t count, float* sums, int64_t stride) {
    const int64_t row_tiles = blocks_of(count, tile_side), width = panels * panel_rows;
    const ChunkOfRows rows(row_tiles * tile_side);
    const Buffer<float> totals(row_tiles * tile_side * width);
    Panel turned[panels_at_once];
    TileUnit unit(shapes());
    for (int64_t piece = 0; piece < x.pieces.count;) {
      const Chunk chunk = chunk_at(x.pieces, piece);
      piece += chunk.pieces;
      rows.fill(x, row, count, chunk);
      for (int64_t p = 0; p < panels; p += panels_at_once) {
        const int64_t some = smaller(panels_at_once, panels - p);
        for (int64_t i = 0; i < some; ++i) turned[i].fill(weight, panel + p + i, chunk, x.pieces.of_group);
        float* to = totals + p * panel_rows;
        some == 2 ? add_chunk<by_groups, 2>(unit, rows, turned, chunk, row_tiles, to, width)
                  : add_chunk<by_groups, 1>(unit, rows, turned, chunk, row_tiles, to, width);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(sums + r * stride, totals + r * width, width * sizeof(float));
      finish_row(by_groups ? 1.0f : x.scales[row[r]], sums + r * stride, width);
    }
  }

  // Two pieces at a time where a chunk has several, two tiles of rows where it has one: no two products wait for each other.
  template <bool by_groups, int panels>
  static void add_chunk(TileUnit& unit, const ChunkOfRows& rows, const Panel* turned, const Chunk& chunk, int64_t row_tiles, float* to,
                        int64_t width) {
    const int64_t row_tile = tile_side * chunk_inputs, scale_tile = tile_side * piece_units, units = chunk.units_of_piece;
    const auto at = [&](int64_t tile, int64_t first) { return Operands{rows.codes + tile * row_tile + first * unit_inputs, first}; };
    alignas(64) int32_t products[piece_units * panels_at_once * tile_sums];
    if (chunk.pieces == 1) {
      for (int64_t tile = 0; tile < row_tiles; tile += 2) {
        const int64_t some = smaller(2, row_tiles - tile);
        multiply_pieces<panels>(unit, some, at(tile, 0), at(tile + some - 1, 0), turned, units, products);
        for (int64_t t = tile; t < tile + some; ++t) {
          add_to_sums<by_groups, panels>(products + (t - tile) * panels * tile_sums, rows.scales + t * scale_tile, turned, chunk,
                                          to + t * tile_side * width, width);
        }
      }
      return;
    }
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      for (int64_t piece = 0; piece < chunk.pieces; piece += 2) {
        const int64_t some = smaller(2, chunk.pieces - piece);
        multiply_pieces<panels>(unit, some, at(tile, piece * units), at(tile, (piece + some - 1) * units), turned, units,
                                products + piece * panels * tile_sums);
      }
      add_to_sums<by_groups, panels>(products, rows.scales + tile * scale_tile, turned, chunk, to + tile * tile_side * width, width);
    }
  }

  // Tiles of rows and units of the chunk where they begin.
  struct Operands {
    const int8_t* rows;
    int64_t first;
  };

  // Whole sums of one or two pieces, [pieces][panels][16][16].
  template <int panels>
  static void multiply_pieces(TileUnit& unit, int64_t count, Operands a, Operands b, const Panel* turned, int64_t units, int32_t* products) {
    unit.zero<0>();
    unit.zero<1>();
    unit.zero<2>();
    unit.zero<3>();
    int64_t i = 0;
    for (; i + 2 <= units; i += 2) {
      add_wide<0, panels>(unit, a, i, turned);
      if (count > 1) add_wide<2, panels>(unit, b, i, turned);
    }
    if (i < units) {
      add_narrow<0, panels>(unit, a, i, turned);
      if (count > 1) add_narrow<2, panels>(unit, b, i, turned);
    }
    unit.store<0>(products, tile_row_bytes);
    if (panels > 1) unit.store<1>(products + tile_sums, tile_row_bytes);
    if (count > 1) {
      unit.store<2>(products + panels * tile_sums, tile_row_bytes);
      if (panels > 1) unit.store<3>(products + (panels + 1) * tile_sums, tile_row_bytes);
    }
  }

  template <int sum, int panels>
  static void add_wide(TileUnit& unit, const Operands& from, int64_t i, const Panel* turned) {
    unit.load<4>(from.rows + i * unit_inputs, chunk_inputs);
    unit.load<5>(turned[0].codes + (from.first + i) * unit_codes, tile_row_bytes);
    unit.add_byte_products<sum, 4, 5>();
    if (panels > 1) {
      unit.load<5>(turned[1].codes + (from.first + i) * unit_codes, tile_row_bytes);
      unit.add_byte_products<sum + 1, 4, 5>();
    }
  }

  template <int sum, int panels>
  static void add_narrow(TileUnit& unit, const Operands& from, int64_t i, const Panel* turned) {
    unit.load<6>(from.rows + i * unit_inputs, chunk_inputs);
    unit.load<7>(turned[0].codes + (from.first + i) * unit_codes, tile_row_bytes);
    unit.add_byte_products<sum, 6, 7>();
    if (panels > 1) {
      unit.load<7>(turned[1].codes + (from.first + i) * unit_codes, tile_row_bytes);
      unit.add_byte_products<sum + 1, 6, 7>();
    }
  }

  // What the pieces of a chunk add to the float sums of a tile of rows.
  template <bool by_groups, int panels>
  static void add_to_sums(const int32_t* products, const float* steps, const Panel* turned, const Chunk& chunk, float* to, int64_t width) {
    for (int64_t r = 0; r < tile_side; ++r, products += panel_rows, steps += piece_units, to += width) {
      F32 sum[panels];
      for (int p = 0; p < panels; ++p) sum[p] = chunk.piece == 0 ? F32::zero() : F32::load(to + p * panel_rows);
      for (int64_t piece = 0; piece < chunk.pieces; ++piece) {
        for (int p = 0; p < panels; ++p) {
          sum[p] = add_piece<by_groups>(sum[p], I32::load(products + (piece * panels + p) * tile_sums),
                                        F32::load(turned[p].scales + piece * panel_rows), steps + piece);
        }
      }
      for (int p = 0; p < panels; ++p) sum[p].store(to + p * panel_rows);
    }
  }
};

}  // namespace
}  // namespace glm5
