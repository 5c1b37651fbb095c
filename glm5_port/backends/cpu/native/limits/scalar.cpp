#include "limits/limits.h"

#include "parallel.h"

namespace glm5 {
namespace {

int64_t read(const void* from, int64_t bytes, int threads) {
  int64_t total = 0;
  const int64_t words = bytes / 8, block_words = read_block / 8;
  parallel_for(threads, words / block_words, [&](int64_t block) {
    const int64_t* word = static_cast<const int64_t*>(from) + block * block_words;
    int64_t sum = 0;
    for (int64_t i = 0; i < block_words; ++i) sum ^= word[i];
#pragma omp atomic
    total += sum;
  });
  return total;
}

int64_t multiply(Product kind, int64_t repeats, int threads) {
  if (kind != Product::float32) return 0;
  constexpr int chains = 8;
  parallel_for(threads, threads, [&](int64_t) {
    volatile float seed = 0.5f;
    float sums[chains] = {};
    const float a = seed, b = seed;
    for (int64_t i = 0; i < repeats; ++i) {
      for (float& sum : sums) sum = sum * a + b;
    }
    for (const float sum : sums) seed = seed + sum;
  });
  return 2 * chains * repeats * threads;
}

}  // namespace

namespace scalar {
const LimitKernels limits = {read, multiply};
}
}  // namespace glm5
