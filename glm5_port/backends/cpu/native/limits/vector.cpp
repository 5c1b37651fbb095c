#include "limits/loops.h"

namespace glm5 {
namespace {

int64_t multiply_bytes(int64_t repeats, int threads) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1);
  return repeat(repeats, threads, 64, ones, [&](__m512i sum) { return _mm512_dpbusd_epi32(sum, ones, ones); });
#else
  const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  return repeat(repeats, threads, 32, ones, [&](__m256i sum) {
    __m256i bytes = ones;
    __asm__ volatile("" : "+v"(bytes));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, ones), words));
  });
#endif
}

int64_t multiply(Product kind, int64_t repeats, int threads) {
  if (kind == Product::bf16) return 0;
  return kind == Product::int8 ? multiply_bytes(repeats, threads) : multiply_float(repeats, threads);
}

}  // namespace

namespace GLM5_ISA {
const LimitKernels limits = {read, multiply};
}
}  // namespace glm5
