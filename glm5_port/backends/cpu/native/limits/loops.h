// The loops of all vector instruction sets. Twelve chains hide the latency of any product.
#pragma once

#include "limits/limits.h"
#include "parallel.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr int chains = 12;

int64_t read(const void* from, int64_t bytes, int threads) {
  int64_t total = 0;
  constexpr int lanes = 8, step = lanes * I32::width;
  parallel_for(threads, bytes / read_block, [&](int64_t block) {
    const int32_t* word = static_cast<const int32_t*>(from) + block * (read_block / 4);
    I32 sums[lanes];
    for (I32& sum : sums) sum = I32::broadcast(0);
    for (int64_t i = 0; i < read_block / 4; i += step) {
      for (int lane = 0; lane < lanes; ++lane) sums[lane] = sums[lane] | I32::load(word + i + lane * I32::width);
    }
    for (int lane = 1; lane < lanes; ++lane) sums[0] = sums[0] | sums[lane];
    const int64_t sum = sums[0].largest();
#pragma omp atomic
    total += sum;
  });
  return total;
}

// `repeats` times `product.add(sum)` for each of the chains. A function of its own, with a copy of its factors: what a parallel region
// shares lies in memory, and the compiler keeps it there.
template <class Product>
[[gnu::noinline]] void run_chains(int64_t repeats, const Product product) {
  typename Product::Sum sums[chains];
#pragma GCC unroll 12
  for (int chain = 0; chain < chains; ++chain) sums[chain] = product.start();
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < chains; ++chain) {
      sums[chain] = product.add(sums[chain]);
      __asm__ volatile("" : "+v"(sums[chain]));  // neither left out nor taken together
    }
  }
}

// The chains in every thread; operations done.
template <class Product>
int64_t repeat(int64_t repeats, int threads, const Product& product) {
  parallel_for(threads, threads, [&](int64_t) { run_chains(repeats, product); });
  return 2 * chains * Product::products * repeats * threads;
}

struct FloatProduct {
  using Sum = decltype(F32::v);
  static constexpr int64_t products = F32::width;
  F32 half = F32::broadcast(0.5f);
  Sum start() const { return half.v; }
  Sum add(Sum sum) const { return multiply_add(half, half, F32{sum}).v; }
};

struct ByteProduct {
#if defined(__AVX512VNNI__)
  using Sum = __m512i;
  static constexpr int64_t products = 64;
  __m512i ones = _mm512_set1_epi8(1);
  Sum start() const { return ones; }
  Sum add(Sum sum) const { return _mm512_dpbusd_epi32(sum, ones, ones); }
#else
  using Sum = __m256i;
  static constexpr int64_t products = 32;
  __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  Sum start() const { return ones; }
  Sum add(Sum sum) const {
    __m256i bytes = ones;
    __asm__ volatile("" : "+v"(bytes));  // the product of constants is none
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, ones), words));
  }
#endif
};

inline int64_t multiply_float(int64_t repeats, int threads) { return repeat(repeats, threads, FloatProduct{}); }

}  // namespace
}  // namespace glm5
