// The indexer with products of pairs of bfloat16 numbers: queries and keys stay as they are; codes of quantised keys are bfloat16
// numbers too. Whatever is float32 goes to the float kernels.
#include "indexer/score.h"

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

bool has_floats(const IndexerCall& call) { return !call.query_is_bf16 || call.cache.format == KeyFormat::float32; }

void indexer_scores(const IndexerCall& call) { has_floats(call) ? avx512::indexer.indexer_scores(call) : score_all<PairProduct>(call); }
void lightning_indexer(const IndexerCall& call) { has_floats(call) ? avx512::indexer.lightning_indexer(call) : index_all<PairProduct>(call); }
void select_top_k(const SelectCall& call) { avx512::indexer.select_top_k(call); }

}  // namespace

namespace GLM5_ISA {
const IndexerKernels indexer = {indexer_scores, lightning_indexer, select_top_k};
}
}  // namespace glm5
