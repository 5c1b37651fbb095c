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

// `repeats` times `add(sum)` for each of the chains, in every thread; `products` are those of one.
template <class Vector, class Add>
int64_t repeat(int64_t repeats, int threads, int64_t products, Vector start, const Add& add) {
  parallel_for(threads, threads, [&](int64_t) {
    Vector sums[chains];
    for (Vector& sum : sums) sum = start;
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
      for (int chain = 0; chain < chains; ++chain) {
        sums[chain] = add(sums[chain]);
        __asm__ volatile("" : "+v"(sums[chain]));  // neither left out nor taken together
      }
    }
  });
  return 2 * chains * products * repeats * threads;
}

inline int64_t multiply_float(int64_t repeats, int threads) {
  const F32 half = F32::broadcast(0.5f);
  return repeat(repeats, threads, F32::width, half.v, [&](auto sum) { return multiply_add(half, half, F32{sum}).v; });
}

}  // namespace
}  // namespace glm5
