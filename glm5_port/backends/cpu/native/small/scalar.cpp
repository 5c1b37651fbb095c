// What the small kernels mean, in plain loops.
#include <cmath>
#include <vector>

#include "parallel.h"
#include "small/small.h"

namespace glm5 {
namespace {

template <class T>
void norm_row(const NormCall& call, int64_t row) {
  const T* x = static_cast<const T*>(call.x) + row * call.stride;
  T* y = static_cast<T*>(call.y) + row * call.width;
  std::vector<float> values(call.width);
  for (int64_t i = 0; i < call.width; ++i) {
    values[i] = widen(x[i]);
    if (call.residual) {
      T* sum = static_cast<T*>(call.sum) + row * call.width;
      narrow(values[i] + widen(static_cast<const T*>(call.residual)[row * call.residual_stride + i]), sum + i);
      values[i] = widen(sum[i]);
    }
  }
  double mean = 0, square = 0;
  if (call.centred) {
    for (float value : values) mean += value;
    mean /= static_cast<double>(call.width);
  }
  for (float value : values) square += (value - mean) * (value - mean);
  const float scale = static_cast<float>(1 / std::sqrt(square / static_cast<double>(call.width) + call.eps));
  for (int64_t i = 0; i < call.width; ++i) {
    const float normal = (values[i] - static_cast<float>(mean)) * scale * call.weight[i];
    narrow(call.bias ? normal + call.bias[i] : normal, y + i);
  }
}

template <class T>
void rotate_head(const RotateCall& call, int64_t token, int64_t head) {
  const T* x = static_cast<const T*>(call.x) + token * call.token_stride + head * call.head_stride;
  T* y = static_cast<T*>(call.y) + (token * call.heads + head) * call.width;
  for (int64_t i = 0; i < call.width; ++i) y[i] = x[i];
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const int64_t first = call.start + (call.interleaved ? 2 * pair : pair), second = first + (call.interleaved ? 1 : call.pairs);
    const float cosine = call.cosine[token * call.pairs + pair], sine = call.sine[token * call.pairs + pair];
    const float a = widen(x[first]), b = widen(x[second]);
    narrow(a * cosine - b * sine, y + first);
    narrow(b * cosine + a * sine, y + second);
  }
}

template <class T>
void route_token(const RouteCall& call, int64_t token) {
  const T* hidden = static_cast<const T*>(call.hidden) + token * call.stride;
  std::vector<float> scores(call.experts);
  for (int64_t e = 0; e < call.experts; ++e) {
    const T* gate = static_cast<const T*>(call.gate) + e * call.gate_stride;
    double logit = 0;
    for (int64_t i = 0; i < call.width; ++i) logit += static_cast<double>(widen(hidden[i])) * widen(gate[i]);
    scores[e] = static_cast<float>(1 / (1 + std::exp(-logit)));
  }
  Chooser(call).choose(scores.data(), call.weights + token * call.top_k, call.ids + token * call.top_k);
}

void norm(const NormCall& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) { call.is_bf16 ? norm_row<bf16>(call, row) : norm_row<float>(call, row); });
}

void rotate(const RotateCall& call) {
  parallel_for(call.threads, call.tokens, [&](int64_t token) {
    for (int64_t head = 0; head < call.heads; ++head) {
      call.is_bf16 ? rotate_head<bf16>(call, token, head) : rotate_head<float>(call, token, head);
    }
  });
}

void route(const RouteCall& call) {
  parallel_for(call.threads, call.tokens, [&](int64_t token) { call.is_bf16 ? route_token<bf16>(call, token) : route_token<float>(call, token); });
}

}  // namespace

namespace scalar {
const SmallKernels small = {norm, rotate, route};
}
}  // namespace glm5
