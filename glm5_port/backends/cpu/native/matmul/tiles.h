// The tile unit (AMX): eight tiles of sixteen rows of 64 bytes. The kernel of tile_kernel.h knows only what is here, so that it can
// be tested by emulation on machines without the unit.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace glm5 {
namespace {

constexpr int64_t tile_side = 16, tile_row_bytes = 64;

#if defined(GLM5_ISA_amx)

// Configured for this thread as long as it lives. The instructions take the number of a tile as a constant.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = tile_row_bytes;
      shape.rows[tile] = tile_side;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
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
};

#else

class TileUnit {
 public:
  template <int tile>
  void zero() { std::memset(tiles_[tile], 0, sizeof tiles_[tile]); }
  template <int tile>
  void load(const void* from, int64_t stride) {
    for (int64_t row = 0; row < tile_side; ++row) std::memcpy(tiles_[tile][row], static_cast<const uint8_t*>(from) + row * stride, tile_row_bytes);
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int64_t row = 0; row < tile_side; ++row) std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles_[tile][row], tile_row_bytes);
  }
  template <int sum, int a, int b>
  void add_products() {
    for (int64_t m = 0; m < tile_side; ++m) {
      for (int64_t n = 0; n < tile_side; ++n) {
        float total = float_of(tiles_[sum][m][n]);
        for (int64_t k = 0; k < tile_side; ++k) {
          total += low(tiles_[a][m][k]) * low(tiles_[b][k][n]);
          total += high(tiles_[a][m][k]) * high(tiles_[b][k][n]);
        }
        tiles_[sum][m][n] = bits_of(total);
      }
    }
  }

 private:
  static float low(uint32_t pair) { return float_of(pair << 16); }
  static float high(uint32_t pair) { return float_of(pair & 0xFFFF0000); }

  uint32_t tiles_[8][tile_side][tile_row_bytes / 4];
};

#endif

}  // namespace
}  // namespace glm5
