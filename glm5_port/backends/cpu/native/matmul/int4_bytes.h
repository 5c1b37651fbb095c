// Products of rows that are quantised to 8 bits by INT4 weights, in integers.
//
// Codes of weights are turned so that a vector holds four inputs of as many outputs as it has numbers, a strip of a panel: a sum of
// integers is then whole in its number. Sums of a piece (quantised.h) are exact, so that their order is free; each enters a float sum
// with its group's scale, pieces in their order. For a few rows codes are turned in registers and used at once, for many they are
// turned once and kept, a chunk in the first-level cache: the bits of a row are the same.
#pragma once

#include "matmul/bytes.h"
#include "matmul/mixture.h"
#include "matmul/quantised.h"

namespace glm5 {
namespace {

constexpr int strips_of_panel = panel_rows / F32::width;
constexpr int strips_at_once = 2;
constexpr int turned_rows = F32::width == 16 ? 6 : 2;  // of a tile: what sums there are registers for
constexpr int direct_rows = F32::width == 16 ? 8 : 2;  // turned in registers and used at once; up to twice as many in two goes
constexpr int64_t unit_steps = unit_inputs / 4;
constexpr int64_t prefetch_ahead = 2048;  // bytes

// Number 4r + q of a strip is output lanes * q + r, in vectors of `lanes` lanes.
inline F32 scales_of_strip(const bf16* scales) { return to_strip_order(F32::load(scales)); }

// A unit of a strip, four vectors from `codes` on: step i is inputs 8i, 8i + 2, ... of all outputs, step 4 + i
// inputs 8i + 1, 8i + 3, ...
inline void turn(const uint8_t* codes, Bytes* steps) {
  Bytes words[4];
  turn_lanes(Bytes::load(codes), Bytes::load(codes + Bytes::width), Bytes::load(codes + 2 * Bytes::width),
             Bytes::load(codes + 3 * Bytes::width), words);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    steps[i] = low_nibbles(words[i]);
    steps[4 + i] = high_nibbles(words[i]);
  }
}

constexpr int64_t strip_bytes = 4 * Bytes::width;  // of a unit, both as stored and, with twice as many, turned

// What a strip adds in one piece, at the weight's and, where they have them, the rows' scales.
template <bool by_groups>
inline F32 add_piece(F32 sum, I32 products, F32 scale, const float* step) {
  return multiply_add(to_float(products), by_groups ? scale * F32::broadcast(*step) : scale, sum);
}

// Where a row's codes, corrections and scales of a piece lie.
template <int rows>
struct Cursors {
  const int8_t* codes[rows];
  const int32_t* corrections[rows];
  const float* scales[rows];

  Cursors(const QuantisedRows& x, const int64_t* row, int64_t unit, int64_t piece) {
    for (int r = 0; r < rows; ++r) {
      codes[r] = x.codes + row[r] * x.width + unit * unit_inputs;
      corrections[r] = x.corrections + row[r] * x.pieces.count + piece;
      scales[r] = x.scales + row[r] * x.scales_of_row + (x.by_groups ? piece : 0);
    }
  }
};

// -- a few rows ---------------------------------------------------------------------------------------------------------------

// `unit_groups`: groups are one unit, so that nothing is counted inside of them. A function of its own: inlined, its pointers would be
// kept on the stack and be read again in every group.
template <int rows, bool by_groups, bool unit_groups>
[[gnu::noinline]] void multiply_strip(const Int4Weight& weight, int64_t panel, int strip, const QuantisedRows& x, const int64_t* row,
                                      float* sums, int64_t stride) {
  constexpr bool two_chains = rows <= 4;  // for many rows there are chains enough, and registers for one each
  F32 sum[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r] = F32::zero();
  Cursors<rows> at(x, row, 0, 0);
  const uint8_t* codes = weight.at(panel, 0) + strip * strip_bytes;
  const bf16* scales = weight.scales_of(panel) + strip * F32::width;
  const int64_t groups = weight.groups();
  const int64_t of_group = unit_groups ? 1 : x.pieces.of_group, units_of_group = unit_groups ? 1 : x.pieces.units_of_group;
  int64_t input = 0, piece = 0;
  for (int64_t group = 0; group < groups; ++group, scales += panel_rows) {
    const F32 scale = scales_of_strip(scales);
    int64_t left = units_of_group;
    for (int64_t part = 0; part < of_group; ++part, ++piece, left -= piece_units) {
      I32 even[rows], odd[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        even[r] = I32::broadcast(at.corrections[r][piece]);
        odd[r] = I32::broadcast(0);
      }
      for (int64_t unit = unit_groups ? 1 : smaller(left, piece_units); unit > 0; --unit, codes += unit_bytes, input += unit_inputs) {
        Bytes steps[unit_steps];
        turn(codes, steps);
#pragma GCC unroll 4
        for (int64_t line = 0; line < strip_bytes; line += 64) _mm_prefetch(codes + prefetch_ahead + line, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            even[r] = add_products(even[r], steps[i], Bytes::broadcast_four(at.codes[r] + input + 4 * i));
            I32& other = two_chains ? odd[r] : even[r];
            other = add_products(other, steps[4 + i], Bytes::broadcast_four(at.codes[r] + input + 16 + 4 * i));
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sum[r] = add_piece<by_groups>(sum[r], two_chains ? even[r] + odd[r] : even[r], scale, at.scales[r] + piece);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sum[r].store(sums + r * stride);
}

template <int rows, bool by_groups>
inline void multiply_strip_of(int64_t count, const Int4Weight& weight, int64_t panel, int strip, const QuantisedRows& x,
                              const int64_t* row, float* sums, int64_t stride) {
  if constexpr (rows > 0) {
    if (count == rows) {
      return x.pieces.units_of_group == 1 ? multiply_strip<rows, by_groups, true>(weight, panel, strip, x, row, sums, stride)
                                          : multiply_strip<rows, by_groups, false>(weight, panel, strip, x, row, sums, stride);
    }
    multiply_strip_of<rows - 1, by_groups>(count, weight, panel, strip, x, row, sums, stride);
  }
}

// -- many rows ----------------------------------------------------------------------------------------------------------------

// Whole groups, or a piece of one, that are turned at once.
struct Chunk {
  int64_t unit, piece, pieces, units_of_piece;

  int64_t units() const { return pieces * units_of_piece; }
};

// The chunk that begins with `piece`.
inline Chunk chunk_at(const Pieces& cut, int64_t piece) {
  const int64_t group = piece / cut.of_group, inside = piece % cut.of_group * piece_units;
  if (cut.of_group > 1) return {group * cut.units_of_group + inside, piece, 1, smaller(piece_units, cut.units_of_group - inside)};
  return {group * cut.units_of_group, piece, smaller(piece_units / cut.units_of_group, cut.count - piece), cut.units_of_group};
}

// One strip of a chunk.
struct Turned {
  alignas(64) uint8_t codes[piece_units * 2 * strip_bytes];
  alignas(64) float scales[piece_units * F32::width];

  void fill(const Int4Weight& weight, int64_t panel, int strip, const Chunk& chunk, int64_t pieces_of_group, const uint8_t* next) {
    const uint8_t* from = weight.at(panel, chunk.unit) + strip * strip_bytes;
    const bf16* steps = weight.scales_of(panel) + strip * F32::width;
    for (int64_t unit = 0; unit < chunk.units(); ++unit) {
      Bytes turned[unit_steps];
      turn(from + unit * unit_bytes, turned);
      for (int64_t line = 0; line < strip_bytes; line += 64) _mm_prefetch(next + unit * unit_bytes + line, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int64_t i = 0; i < unit_steps; ++i) turned[i].store(codes + (unit * unit_steps + i) * Bytes::width);
    }
    for (int64_t piece = 0; piece < chunk.pieces; ++piece) {
      scales_of_strip(steps + (chunk.piece + piece) / pieces_of_group * panel_rows).store(scales + piece * F32::width);
    }
  }
};

template <int rows, int strips, bool by_groups>
[[gnu::noinline]] void tile(const Turned* turned, const Chunk& chunk, const QuantisedRows& x, const int64_t* row, float* sums, int64_t stride) {
  F32 sum[rows][strips];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int s = 0; s < strips; ++s) sum[r][s] = chunk.piece == 0 ? F32::zero() : F32::load(sums + r * stride + s * F32::width);
  const Cursors<rows> at(x, row, chunk.unit, chunk.piece);
  int64_t step = 0;
  for (int64_t piece = 0; piece < chunk.pieces; ++piece) {
    I32 products[rows][strips];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < strips; ++s) products[r][s] = I32::broadcast(at.corrections[r][piece]);
    for (int64_t unit = 0; unit < chunk.units_of_piece; ++unit, step += unit_steps) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < unit_steps; ++i) {  // unrolled, or the compiler would move every sum in every step
        Bytes weights[strips];
#pragma GCC unroll 2
        for (int s = 0; s < strips; ++s) weights[s] = Bytes::load(turned[s].codes + (step + i) * Bytes::width);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Bytes four = Bytes::broadcast_four(at.codes[r] + 4 * (step + i));
#pragma GCC unroll 2
          for (int s = 0; s < strips; ++s) products[r][s] = add_products(products[r][s], weights[s], four);
        }
      }
    }
    F32 scales[strips];
#pragma GCC unroll 2
    for (int s = 0; s < strips; ++s) scales[s] = F32::load(turned[s].scales + piece * F32::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < strips; ++s) sum[r][s] = add_piece<by_groups>(sum[r][s], products[r][s], scales[s], at.scales[r] + piece);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int s = 0; s < strips; ++s) sum[r][s].store(sums + r * stride + s * F32::width);
}

template <int rows, int strips, bool by_groups>
inline void tile_of(int64_t count, const Turned* turned, const Chunk& chunk, const QuantisedRows& x, const int64_t* row, float* sums,
                    int64_t stride) {
  if constexpr (rows > 0) {
    if (count == rows) return tile<rows, strips, by_groups>(turned, chunk, x, row, sums, stride);
    tile_of<rows - 1, strips, by_groups>(count, turned, chunk, x, row, sums, stride);
  }
}

template <bool by_groups>
void multiply_turned(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                     float* sums, int64_t stride) {
  const int64_t strips = panels * strips_of_panel, tiles = blocks_of(count, turned_rows);
  Turned turned[strips_at_once];
  for (int64_t piece = 0; piece < x.pieces.count;) {
    const Chunk chunk = chunk_at(x.pieces, piece);
    piece += chunk.pieces;
    for (int64_t strip = 0; strip < strips; strip += strips_at_once) {
      const int64_t some = smaller(strips_at_once, strips - strip);
      for (int64_t s = strip; s < strip + some; ++s) {
        const int64_t later = s + strips_at_once;
        const uint8_t* next = later < strips ? weight.at(panel + later / strips_of_panel, chunk.unit)
                                             : weight.at(panel + later % strips_at_once / strips_of_panel, chunk.unit + chunk.units());
        turned[s - strip].fill(weight, panel + s / strips_of_panel, s % strips_of_panel, chunk, x.pieces.of_group,
                               next + later % strips_of_panel * strip_bytes);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = count * t / tiles, rows = count * (t + 1) / tiles - first;
        float* to = sums + first * stride + strip * F32::width;
        if (some == strips_at_once) {
          tile_of<turned_rows, strips_at_once, by_groups>(rows, turned, chunk, x, row + first, to, stride);
        } else {
          tile_of<turned_rows, 1, by_groups>(rows, turned, chunk, x, row + first, to, stride);
        }
      }
    }
  }
}

// Sums of a row in the order of strips, to its outputs.
inline void finish_row(float scale, float* sums, int64_t width) {
  for (int64_t i = 0; i < width; i += F32::width) (to_output_order(F32::load(sums + i)) * F32::broadcast(scale)).store(sums + i);
}

template <bool by_groups>
void multiply_codes(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                   float* sums, int64_t stride) {
  if (count <= 2 * direct_rows) {
    const int64_t goes = blocks_of(count, direct_rows);
    for (int64_t strip = 0; strip < panels * strips_of_panel; ++strip) {
      for (int64_t go = 0; go < goes; ++go) {
        const int64_t first = count * go / goes, rows = count * (go + 1) / goes - first;
        multiply_strip_of<direct_rows, by_groups>(rows, weight, panel + strip / strips_of_panel, static_cast<int>(strip % strips_of_panel), x,
                                                  row + first, sums + first * stride + strip * F32::width, stride);
      }
    }
  } else {
    multiply_turned<by_groups>(weight, panel, panels, x, row, count, sums, stride);
  }
  for (int64_t r = 0; r < count; ++r) finish_row(by_groups ? 1.0f : x.scales[row[r]], sums + r * stride, panels * panel_rows);
}

// As `multiply` of panels.h, for rows number `row[0]` ... of x.
inline void multiply_int4(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                          float* sums, int64_t stride) {
  x.by_groups ? multiply_codes<true>(weight, panel, panels, x, row, count, sums, stride)
              : multiply_codes<false>(weight, panel, panels, x, row, count, sums, stride);
}

// The product of a mixture; where there is a tile unit, it is that of int4_tiles.h.
struct Int4ByBytes {
  static void multiply(const Int4Weight& weight, int64_t panel, int64_t panels, const QuantisedRows& x, const int64_t* row, int64_t count,
                       float* sums, int64_t stride) {
    multiply_int4(weight, panel, panels, x, row, count, sums, stride);
  }
};

// silu(gate) * up of some rows and columns, rounded as the operator does.
template <class Product, class T>
void fill_plain_between(const ExpertsCall<Int4Weight>& call, const Rows& rows, int64_t panel, const QuantisedRows& hidden,
                        const int64_t* tokens, T* between) {
  const Int4Weight gate = call.gate.of_expert(rows.expert), up = call.up.of_expert(rows.expert);
  const int64_t panels = smaller(between_panels, gate.panels() - panel), width = panels * panel_rows;
  const int64_t column = panel * panel_rows, columns = smaller(width, gate.rows - column);
  const Buffer<float> gates(rows.count * width), ups(rows.count * width);
  Product::multiply(gate, panel, panels, hidden, tokens + rows.first, rows.count, gates, width);
  Product::multiply(up, panel, panels, hidden, tokens + rows.first, rows.count, ups, width);
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

template <class Product, class T>
void mix_quantised_tokens(const ExpertsCall<Int4Weight>& call) {
  const Routing routing(call.ids, call.tokens * call.choices, call.experts);
  const int threads = threads_for(3 * routing.used * call.gate.width * call.down.width, call.threads);
  const QuantisedRows hidden(call.tokens, call.gate, call.activation_groups), between(routing.used, call.down, call.activation_groups);
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
    fill_plain_between<Product, T>(call, routing.blocks[task / tasks], task % tasks * between_panels, hidden, tokens, plain);
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
      Product::multiply(down, panel, panels, between, rows + block.first, block.count, results, panels * panel_rows);
    });
  });
}

template <class Product, class T>
void mix_quantised(const ExpertsCall<Int4Weight>& call) {
  const int64_t token_bytes = call.gate.padded_width() + call.choices * (call.down.padded_width() + call.down.width * sizeof(T));
  in_chunks<T>(call, token_bytes, mix_quantised_tokens<Product, T>);
}

}  // namespace
}  // namespace glm5
