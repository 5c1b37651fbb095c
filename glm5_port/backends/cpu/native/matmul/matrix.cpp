// The products of bfloat16 activations, by pairs. Float and 8-bit activations take the kernels of AVX-512.
#include "matmul/bf16_kernel.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"

namespace glm5 {
namespace {

const MatmulKernels& narrower = avx512::matmul;

void int4_matmul(const MatmulCall<Int4Weight>& call) {
  call.is_bf16 ? multiply_rows<Int4ByPairs, bf16>(call) : narrower.int4_matmul(call);
}
void int4_experts(const ExpertsCall<Int4Weight>& call) {
  call.is_bf16 ? mix_experts<Int4ByPairs, bf16>(call) : narrower.int4_experts(call);
}
void int4_int8_experts(const ExpertsCall<Int4Weight>& call) { narrower.int4_int8_experts(call); }
void int8_matmul(const MatmulCall<Int8Weight>& call) { narrower.int8_matmul(call); }
void linear(const MatmulCall<DenseWeight>& call) {
  call.is_bf16 ? multiply_rows<DenseByPairs, bf16>(call) : narrower.linear(call);
}
void dense_experts(const ExpertsCall<DenseWeight>& call) {
  call.is_bf16 ? mix_experts<DenseByPairs, bf16>(call) : narrower.dense_experts(call);
}

}  // namespace

namespace GLM5_ISA {
const MatmulKernels matmul = {int4_matmul, int4_experts, int4_int8_experts, int8_matmul, linear, dense_experts};
}
}  // namespace glm5
