// Products of rows by one matrix or by a mixture of experts, whose weights are INT4, INT8 or floating point
// (glm5_port/operators/int4.py, linear.py, moe.py): what the kernels are called with.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "matmul/layout.h"
#include "numbers.h"

namespace glm5 {

// y = x W^T.
template <class Weight>
struct MatmulCall {
  const void* x;  // [rows, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t rows, stride;
  Weight weight;
  void* y;        // [rows, weight.rows], of the type of x
  int threads;
};

// y_t = sum over j of route_weights[t, j] * down(silu(gate x_t) * up x_t) of expert ids[t, j].
template <class Weight>
struct ExpertsCall {
  const void* hidden;          // [tokens, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t tokens, stride;
  const float* route_weights;  // [tokens, choices], dense
  const int32_t* ids;          // [tokens, choices], dense
  int64_t choices, experts;
  Weight gate, up, down;       // of expert 0
  void* y;                     // [tokens, down.rows], of the type of hidden
  int threads;
  bool activation_groups = false;  // 8-bit activations have a scale for each group of the weights, not one for a row
};

struct MatmulKernels {
  void (*int4_matmul)(const MatmulCall<Int4Weight>& call);
  void (*int4_experts)(const ExpertsCall<Int4Weight>& call);
  void (*int4_int8_experts)(const ExpertsCall<Int4Weight>& call);  // activations quantised to 8 bits
  void (*int8_matmul)(const MatmulCall<Int8Weight>& call);         // the same, a scale a row
  void (*linear)(const MatmulCall<DenseWeight>& call);             // weights of the type of x
  void (*dense_experts)(const ExpertsCall<DenseWeight>& call);
};
GLM5_MATRIX_KERNELS(MatmulKernels, matmul)

#if defined(__x86_64__)
// The kernels of AMX with the tile unit emulated, to test them where there is none.
namespace avx512_bf16 { extern const MatmulKernels matmul_by_emulated_tiles; }
#endif

}  // namespace glm5
