// Products by INT4 weights, one matrix or a mixture of experts (glm5_port/operators/int4.py): what the kernels are called with.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "matmul/layout.h"
#include "numbers.h"

namespace glm5 {

// y = x W^T.
struct Int4MatmulCall {
  const void* x;  // [rows, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t rows, stride;
  Int4Weight weight;
  void* y;        // [rows, weight.rows], of the type of x
  int threads;
};

// y_t = sum over j of route_weights[t, j] * down(silu(gate x_t) * up x_t) of expert ids[t, j].
struct Int4ExpertsCall {
  const void* hidden;           // [tokens, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t tokens, stride;
  const float* route_weights;   // [tokens, choices], dense
  const int32_t* ids;           // [tokens, choices], dense
  int64_t choices, experts;
  Int4Weight gate, up, down;    // of expert 0; those of the others follow, `expert_codes` and `expert_scales` elements apart
  int64_t gate_up_codes, gate_up_scales, down_codes, down_scales;
  void* y;                      // [tokens, down.rows], of the type of hidden
  int threads;
};

struct MatmulKernels {
  void (*int4_matmul)(const Int4MatmulCall& call);
  void (*int4_experts)(const Int4ExpertsCall& call);
};
GLM5_MATRIX_KERNELS(MatmulKernels, matmul)

}  // namespace glm5
