// The indexer with products of pairs of bfloat16 numbers, by vectors or, on AMX, by tiles: queries and keys stay as they are; codes of
// quantised keys are bfloat16 numbers too. Whatever is float32 goes to the float kernels.
#include "indexer/score.h"
#include "tiles.h"

namespace glm5 {
namespace {

inline uint32_t load_pair(const uint32_t* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);  // rows of a cache may begin at any address
  return pair;
}

// Codes of e4m3 as bfloat16 numbers; those below 8 are subnormal.
inline __m512i bf16_of_e4m3(__m512i codes) {
  const __m512i subnormal = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
  const __m512i number = _mm512_mask_permutexvar_epi16(normal, small, magnitude, subnormal);
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
  return _mm512_or_si512(sign, _mm512_mask_mov_epi16(number, nan, _mm512_set1_epi16(0x7FC0)));
}

struct PairProduct {
  using Element = uint32_t;
  static constexpr int64_t channels = 2, round = 1;
  static constexpr int keys = 8;

  static bool direct(KeyFormat format) { return format == KeyFormat::bfloat16; }

  static void widen_query(const IndexerCall& call, int64_t place, int64_t count, int64_t depth, uint32_t* to) {
    widen_key(KeyFormat::bfloat16, static_cast<const bf16*>(call.query) + place, count, depth, to);
  }

  static void widen_key(KeyFormat format, const void* row, int64_t count, int64_t depth, uint32_t* to) {
    bf16* numbers = reinterpret_cast<bf16*>(to);
    std::memset(numbers + count, 0, (depth * channels - count) * sizeof(bf16));
    int64_t i = 0;
    if (format == KeyFormat::bfloat16) {
      std::memcpy(numbers, row, count * sizeof(bf16));
    } else if (format == KeyFormat::fp8) {
      const e4m3* codes = static_cast<const e4m3*>(row);
      for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        _mm512_storeu_si512(numbers + i, bf16_of_e4m3(_mm512_cvtepu8_epi16(bytes)));
      }
      for (; i < count; ++i) numbers[i] = round_to_bf16(widen(codes[i]));
    } else {
      const int8_t* codes = static_cast<const int8_t*>(row);
      for (; i + 32 <= count; i += 32) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(load_codes(codes + i + 16).v, load_codes(codes + i).v);
        std::memcpy(numbers + i, &pairs, sizeof pairs);
      }
      for (; i < count; ++i) numbers[i] = round_to_bf16(widen(codes[i]));
    }
  }

  static void multiply(const uint32_t* query, const uint32_t* const* rows, int64_t depth, const void* const* next,
                       F32 (&dots)[keys][2]) {
    constexpr int64_t line = 16;  // elements
    __m512 sums[keys][2];
#pragma GCC unroll 16
    for (int k = 0; k < keys; ++k) sums[k][0] = sums[k][1] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < depth; begin += line) {
      if (next) {  // a line of each at a time: more at once than are on their way already would be waited for
#pragma GCC unroll 16
        for (int k = 0; k < keys; ++k) __builtin_prefetch(static_cast<const uint32_t*>(next[k]) + begin);
      }
      for (int64_t i = begin; i < smaller(depth, begin + line); ++i) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(query + i * heads_of_group);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(query + i * heads_of_group + F32::width);
#pragma GCC unroll 16
        for (int k = 0; k < keys; ++k) {
          const __m512bh key = (__m512bh)_mm512_set1_epi32(static_cast<int>(load_pair(rows[k] + i)));
          sums[k][0] = _mm512_dpbf16_ps(sums[k][0], first, key);
          sums[k][1] = _mm512_dpbf16_ps(sums[k][1], second, key);
        }
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < keys; ++k) {
      dots[k][0] = {sums[k][0]};
      dots[k][1] = {sums[k][1]};
    }
  }
};

// Two tiles of keys by two of heads, in steps of 32 channels. Keys are rows of the left side as they are, behind each other in the
// Scorer's own memory; queries lie there as tiles of the right side.
//
// What can be expected, in cycles: of each 32 channels 64 of products beside 32 of loads. 128 channels of 32 keys by 32 heads are 256,
// then 64 stores, and 256 of vectors that rectify, weigh and sum, in part meanwhile: between half of the unit's peak and all of it,
// counted and never measured.
class TileProduct : public PairProduct {
 public:
  static constexpr int64_t round = tile_side;
  static constexpr int keys = 2 * tile_side;

  static bool direct(KeyFormat) { return false; }

  void multiply(const uint32_t* query, const uint32_t* const* rows, int64_t depth, const void* const* next,
                F32 (&dots)[keys][2]) {
    constexpr int64_t query_stride = heads_of_group * sizeof(uint32_t);
    const int64_t key_stride = depth * static_cast<int64_t>(sizeof(uint32_t));
    unit_.zero<0>();
    unit_.zero<1>();
    unit_.zero<2>();
    unit_.zero<3>();
    for (int64_t i = 0; i < depth; i += tile_side) {
      for (int k = 0; next && k < keys; ++k) __builtin_prefetch(static_cast<const uint32_t*>(next[k]) + i);
      unit_.load<6>(rows[0] + i, key_stride);
      unit_.load<4>(query + i * heads_of_group, query_stride);
      unit_.add_products<0, 6, 4>();
      unit_.load<5>(query + i * heads_of_group + tile_side, query_stride);
      unit_.add_products<1, 6, 5>();
      unit_.load<7>(rows[0] + tile_side * depth + i, key_stride);
      unit_.add_products<2, 7, 4>();
      unit_.add_products<3, 7, 5>();
    }
    unit_.store<0>(&dots[0][0], sizeof dots[0]);
    unit_.store<1>(&dots[0][1], sizeof dots[0]);
    unit_.store<2>(&dots[tile_side][0], sizeof dots[0]);
    unit_.store<3>(&dots[tile_side][1], sizeof dots[0]);
  }

 private:
  TileUnit unit_;
};

bool has_floats(const IndexerCall& call) { return !call.query_is_bf16 || call.cache.format == KeyFormat::float32; }

template <class Product>
struct Kernels {
  static void indexer_scores(const IndexerCall& call) { has_floats(call) ? avx512::indexer.indexer_scores(call) : score_all<Product>(call); }
  static void lightning_indexer(const IndexerCall& call) {
    has_floats(call) ? avx512::indexer.lightning_indexer(call) : index_all<Product>(call);
  }
  static void select_top_k(const SelectCall& call) { avx512::indexer.select_top_k(call); }

  static constexpr IndexerKernels table = {indexer_scores, lightning_indexer, select_top_k};
};

}  // namespace

namespace GLM5_ISA {
#if defined(GLM5_ISA_amx)
const IndexerKernels indexer = Kernels<TileProduct>::table;
#else
const IndexerKernels indexer = Kernels<PairProduct>::table;
const IndexerKernels indexer_by_emulated_tiles = Kernels<TileProduct>::table;
#endif
}
}  // namespace glm5
