// The products of bfloat16 activations, by pairs. Float activations take the float kernels of AVX-512.
#include "matmul/bf16_kernel.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"

namespace glm5 {
namespace {

void int4_matmul(const Int4MatmulCall& call) { call.is_bf16 ? linear<Bf16Kernel, bf16>(call) : avx512::matmul.int4_matmul(call); }
void int4_experts(const Int4ExpertsCall& call) { call.is_bf16 ? mixture<Bf16Kernel, bf16>(call) : avx512::matmul.int4_experts(call); }

}  // namespace

namespace GLM5_ISA {
const MatmulKernels matmul = {int4_matmul, int4_experts};
}
}  // namespace glm5
