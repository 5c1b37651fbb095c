// What stands between the products of a layer: normalisation, rotation, and the choice of experts (glm5_port/operators/norm.py,
// rope.py, moe.py; the LayerNorm of indexer.py).
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numbers.h"

namespace glm5 {

// y = weight * (x - mean) / sqrt(mean of (x - mean)^2 + eps) + bias, where mean is 0 unless `centred`.
struct NormCall {
  const void* x;  // [rows, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t rows, width, stride;
  const void* residual;  // [rows, width] as x, or null: x + residual, rounded, is what is normalised, and goes to `sum`
  int64_t residual_stride;
  void* sum;
  const float* weight;
  const float* bias;  // or null
  bool centred;
  float eps;
  void* y;  // [rows, width] of the type of x, dense
  int threads;
};

// (a, b) -> (a cos - b sin, b cos + a sin) of pairs of channels; each product is rounded.
struct RotateCall {
  const void* x;  // [tokens, heads, width] float or bfloat16, heads dense
  bool is_bf16;
  int64_t tokens, heads, width, token_stride, head_stride;
  const float *cosine, *sine;  // [tokens, pairs]
  int64_t pairs, start;
  bool interleaved;
  void* y;  // [tokens, heads, width], dense
  int threads;
};

struct RouteCall {
  const void* hidden;  // [tokens, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t tokens, width, stride;
  const void* gate;  // [experts, width] of the type of hidden
  int64_t gate_stride, experts;
  const float* correction_bias;
  int64_t top_k, groups, groups_kept;
  bool renormalise;
  float scale;
  float* weights;  // [tokens, top_k]
  int32_t* ids;    // [tokens, top_k]
  int threads;
};

struct SmallKernels {
  void (*norm)(const NormCall& call);
  void (*rotate)(const RotateCall& call);
  void (*route)(const RouteCall& call);
};
GLM5_KERNELS(SmallKernels, small)

namespace {

// Numbers in the order of selection as integers: NaN, of any sign, is the highest; zeros are equal.
inline int32_t order_of(float x) {
  if (x != x) return INT32_MAX;
  const int32_t bits = static_cast<int32_t>(bits_of(x + 0.0f));
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

// The `count` highest of `orders`, highest first, equal ones by their number.
inline void best_of(const int32_t* orders, int64_t size, int64_t count, int32_t* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (found == count && orders[i] <= orders[best[count - 1]]) continue;
    int64_t place = found < count ? found++ : count - 1;
    for (; place > 0 && orders[best[place - 1]] < orders[i]; --place) best[place] = best[place - 1];
    best[place] = static_cast<int32_t>(i);
  }
}

// The choice of one token, from its sigmoid scores.
struct Chooser {
  explicit Chooser(const RouteCall& call) : call_(call), orders_(call.experts), group_orders_(call.groups), groups_(call.groups) {}

  void choose(const float* scores, float* weights, int32_t* ids) const {
    const int64_t size = call_.experts / call_.groups;
    for (int64_t e = 0; e < call_.experts; ++e) orders_[e] = order_of(scores[e] + call_.correction_bias[e]);
    if (call_.groups_kept < call_.groups) {
      for (int64_t group = 0; group < call_.groups; ++group) {
        int32_t best[2];
        best_of(orders_ + group * size, size, 2, best);
        const int64_t first = group * size + best[0], second = group * size + best[1];
        group_orders_[group] = order_of((scores[first] + call_.correction_bias[first]) + (scores[second] + call_.correction_bias[second]));
      }
      best_of(group_orders_, call_.groups, call_.groups, groups_);
      for (int64_t i = call_.groups_kept; i < call_.groups; ++i) {
        for (int64_t e = groups_[i] * size; e < (groups_[i] + 1) * size; ++e) orders_[e] = order_of(-__builtin_inff());
      }
    }
    best_of(orders_, call_.experts, call_.top_k, ids);
    float sum = 0;
    for (int64_t i = 0; i < call_.top_k; ++i) sum += scores[ids[i]];
    for (int64_t i = 0; i < call_.top_k; ++i) {
      weights[i] = (call_.renormalise ? scores[ids[i]] / (sum + 1e-20f) : scores[ids[i]]) * call_.scale;
    }
  }

  const RouteCall& call_;
  const Buffer<int32_t> orders_, group_orders_, groups_;
};

}  // namespace
}  // namespace glm5
