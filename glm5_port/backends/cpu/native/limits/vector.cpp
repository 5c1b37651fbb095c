#include "limits/loops.h"

namespace glm5 {
namespace {

int64_t multiply_bytes(int64_t repeats, int threads) { return repeat(repeats, threads, ByteProduct{}); }

int64_t multiply(Product kind, int64_t repeats, int threads) {
  if (kind == Product::bf16) return 0;
  return kind == Product::int8 ? multiply_bytes(repeats, threads) : multiply_float(repeats, threads);
}

}  // namespace

namespace GLM5_ISA {
const LimitKernels limits = {read, multiply};
}
}  // namespace glm5
