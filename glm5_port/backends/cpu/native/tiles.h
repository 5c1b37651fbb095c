// The tile unit (AMX): eight tiles of at most sixteen rows of 64 bytes. Kernels know only what is here, so that they can be tested by
// emulation on machines without the unit: what the processor refuses ends the process there too.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "numbers.h"

namespace glm5 {
namespace {

constexpr int tile_count = 8;
constexpr int64_t tile_side = 16, tile_row_bytes = 64, tile_bytes = tile_side * tile_row_bytes;

struct TileShape {
  int64_t rows = tile_side, row_bytes = tile_row_bytes;
};
struct TileShapes {
  TileShape of[tile_count];
};

#if defined(GLM5_ISA_amx)

// Configured for this thread as long as it lives. The instructions take the number of a tile as a constant.
class TileUnit {
 public:
  explicit TileUnit(const TileShapes& shapes = {}) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < tile_count; ++tile) {
      config.row_bytes[tile] = static_cast<uint16_t>(shapes.of[tile].row_bytes);
      config.rows[tile] = static_cast<uint8_t>(shapes.of[tile].rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

  template <int tile>
  void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }
  template <int tile>
  void load(const void* from, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory"); }
  template <int tile>
  void store(void* to, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory"); }
  // sum[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] over k, of bfloat16 pairs, in float.
  template <int sum, int a, int b>
  void add_products() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
  // sum[m][n] += a[m][4k + i] * b[k][4n + i] over k and i < 4, of bytes with sign, in 32 bits.
  template <int sum, int a, int b>
  void add_byte_products() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
};

#else

class TileUnit {
 public:
  explicit TileUnit(const TileShapes& shapes = {}) : shapes_(shapes) {
    for (const TileShape& shape : shapes.of) {
      const bool whole = shape.row_bytes % 4 == 0 && shape.row_bytes <= tile_row_bytes && shape.rows <= tile_side;
      must(whole && shape.rows > 0 && shape.row_bytes > 0);
    }
  }

  template <int tile>
  void zero() { std::memset(tiles_[tile], 0, tile_bytes); }
  template <int tile>
  void load(const void* from, int64_t stride) {
    zero<tile>();
    for (int64_t row = 0; row < shapes_.of[tile].rows; ++row) {
      std::memcpy(tiles_[tile][row], static_cast<const uint8_t*>(from) + row * stride, shapes_.of[tile].row_bytes);
    }
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int64_t row = 0; row < shapes_.of[tile].rows; ++row) {
      std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles_[tile][row], shapes_.of[tile].row_bytes);
    }
  }
  // First and second numbers of pairs have sums of their own, from zero on, that enter the tile in the end. Each product is added with
  // one rounding; what is subnormal counts as zero, before and after.
  template <int sum, int a, int b>
  void add_products() {
    check(sum, a, b);
    for (int64_t m = 0; m < shapes_.of[sum].rows; ++m) {
      float first[tile_side] = {}, second[tile_side] = {};
      for (int64_t k = 0; k < shapes_.of[b].rows; ++k) {
        const uint32_t pair = tiles_[a][m][k];
        for (int64_t n = 0; n < tile_side; ++n) {
          const uint32_t other = tiles_[b][k][n];
          first[n] = normal(__builtin_fmaf(normal(pair << 16), normal(other << 16), first[n]));
          second[n] = normal(__builtin_fmaf(normal(pair & 0xFFFF0000), normal(other & 0xFFFF0000), second[n]));
        }
      }
      for (int64_t n = 0; n < tile_side; ++n) {
        uint32_t& total = tiles_[sum][m][n];
        total = bits_of(normal(normal(total) + normal(first[n] + second[n])));
      }
    }
  }
  template <int sum, int a, int b>
  void add_byte_products() {
    check(sum, a, b);
    for (int64_t m = 0; m < shapes_.of[sum].rows; ++m) {
      for (int64_t k = 0; k < shapes_.of[b].rows; ++k) {
        int8_t four[4];
        std::memcpy(four, &tiles_[a][m][k], sizeof four);
        for (int64_t n = 0; n < tile_side; ++n) {
          int8_t other[4];
          std::memcpy(other, &tiles_[b][k][n], sizeof other);
          const int32_t products = four[0] * other[0] + four[1] * other[1] + four[2] * other[2] + four[3] * other[3];
          tiles_[sum][m][n] += static_cast<uint32_t>(products);  // beyond 32 bits it begins anew
        }
      }
    }
  }

 private:
  static void must(bool possible) {
    if (!possible) std::abort();
  }
  void check(int sum, int a, int b) const {
    const TileShape &to = shapes_.of[sum], &left = shapes_.of[a], &right = shapes_.of[b];
    must(sum != a && sum != b && a != b);
    must(to.rows == left.rows && to.row_bytes == right.row_bytes && left.row_bytes == 4 * right.rows);
  }
  static float normal(uint32_t bits) { return float_of(bits & 0x7F800000 ? bits : bits & 0x80000000); }
  static float normal(float x) { return normal(bits_of(x)); }

  TileShapes shapes_;
  uint32_t tiles_[tile_count][tile_side][tile_row_bytes / 4];
};

#endif

}  // namespace
}  // namespace glm5
