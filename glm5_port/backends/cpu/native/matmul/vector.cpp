// The products in float.
#include "matmul/float_kernel.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"

namespace glm5 {
namespace {

void int4_matmul(const Int4MatmulCall& call) { call.is_bf16 ? linear<FloatKernel, bf16>(call) : linear<FloatKernel, float>(call); }
void int4_experts(const Int4ExpertsCall& call) { call.is_bf16 ? mixture<FloatKernel, bf16>(call) : mixture<FloatKernel, float>(call); }

}  // namespace

namespace GLM5_ISA {
const MatmulKernels matmul = {int4_matmul, int4_experts};
}
}  // namespace glm5
