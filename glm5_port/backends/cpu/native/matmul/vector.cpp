// The products in float, and those of 8-bit activations in integers.
#include "matmul/float_kernel.h"
#include "matmul/int4_bytes.h"
#include "matmul/int8_kernel.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"

namespace glm5 {
namespace {

void int4_matmul(const MatmulCall<Int4Weight>& call) {
  call.is_bf16 ? multiply_rows<Int4ByFloats, bf16>(call) : multiply_rows<Int4ByFloats, float>(call);
}
void int4_experts(const ExpertsCall<Int4Weight>& call) {
  call.is_bf16 ? mix_experts<Int4ByFloats, bf16>(call) : mix_experts<Int4ByFloats, float>(call);
}
void int4_int8_experts(const ExpertsCall<Int4Weight>& call) {
  call.is_bf16 ? mix_quantised<Int4ByBytes, bf16>(call) : mix_quantised<Int4ByBytes, float>(call);
}
void int8_matmul(const MatmulCall<Int8Weight>& call) { call.is_bf16 ? multiply_quantised<bf16>(call) : multiply_quantised<float>(call); }
void linear(const MatmulCall<DenseWeight>& call) {
  call.is_bf16 ? multiply_rows<DenseByFloats<bf16>, bf16>(call) : multiply_rows<DenseByFloats<float>, float>(call);
}
void dense_experts(const ExpertsCall<DenseWeight>& call) {
  call.is_bf16 ? mix_experts<DenseByFloats<bf16>, bf16>(call) : mix_experts<DenseByFloats<float>, float>(call);
}

}  // namespace

namespace GLM5_ISA {
const MatmulKernels matmul = {int4_matmul, int4_experts, int4_int8_experts, int8_matmul, linear, dense_experts};
}
}  // namespace glm5
