#include "limits/loops.h"

namespace glm5 {
namespace {

#if defined(GLM5_ISA_amx)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums of two tiles by two: 16 x 16 outputs each, of 64 bytes of inputs.
template <bool bytes>
int64_t multiply_tiles(int64_t repeats, int threads) {
  constexpr int64_t products = 16 * 16 * (bytes ? 64 : 32), tiles = 4;
  parallel_for(threads, threads, [&](int64_t) {
    const TileConfig config;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < repeats; ++i) {
      if constexpr (bytes) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_release();
  });
  return 2 * tiles * products * repeats * threads;
}

int64_t multiply_pairs(int64_t repeats, int threads) { return multiply_tiles<false>(repeats, threads); }
int64_t multiply_bytes(int64_t repeats, int threads) { return multiply_tiles<true>(repeats, threads); }

#else

struct PairProduct {
  using Sum = __m512;
  static constexpr int64_t products = 32;
  __m512i ones = _mm512_set1_epi16(0x3F80);
  Sum start() const { return _mm512_setzero_ps(); }
  Sum add(Sum sum) const { return _mm512_dpbf16_ps(sum, (__m512bh)ones, (__m512bh)ones); }
};

int64_t multiply_pairs(int64_t repeats, int threads) { return repeat(repeats, threads, PairProduct{}); }
int64_t multiply_bytes(int64_t repeats, int threads) { return repeat(repeats, threads, ByteProduct{}); }

#endif

int64_t multiply(Product kind, int64_t repeats, int threads) {
  switch (kind) {
    case Product::float32: return multiply_float(repeats, threads);
    case Product::bf16: return multiply_pairs(repeats, threads);
    case Product::int8: return multiply_bytes(repeats, threads);
  }
  return 0;
}

}  // namespace

namespace GLM5_ISA {
const LimitKernels limits = {read, multiply};
}
}  // namespace glm5
