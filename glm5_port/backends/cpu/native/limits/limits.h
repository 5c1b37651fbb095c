// What the machine itself can do: loops that only read memory, or only multiply in registers. Benchmarks run them beside a kernel,
// so that its share of the limit is a ratio inside one run.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace glm5 {

enum class Product { float32, bf16, int8 };

struct LimitKernels {
  // Reads everything once, all threads together; the result is a sum that nobody can leave out.
  int64_t (*read)(const void* from, int64_t bytes, int threads);
  // Multiplies and adds `repeats` times in registers, in every thread; operations done (a product and a sum are two), or 0 where the
  // instruction set has no such product.
  int64_t (*multiply)(Product kind, int64_t repeats, int threads);
};
GLM5_MATRIX_KERNELS(LimitKernels, limits)

constexpr int64_t read_block = 1 << 20;

}  // namespace glm5
