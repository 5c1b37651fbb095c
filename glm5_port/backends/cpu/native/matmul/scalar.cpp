// What the products mean: weights bf16(q * s), or 8-bit activations and integer sums of groups; sums in float, rounded once.
#include <cmath>

#include "matmul/matmul.h"
#include "parallel.h"

namespace glm5 {
namespace {

int code_of(const Int4Weight& weight, int64_t row, int64_t input) {
  const int64_t inside = input % weight.group;
  const int64_t unit = input / weight.group * weight.units_of_group() + inside / unit_inputs;
  const uint8_t* bytes = weight.at(row / panel_rows, unit) + row % panel_rows * (unit_inputs / 2);
  const int place = static_cast<int>(inside % unit_inputs);
  return ((bytes[place / 2] >> (4 * (place % 2))) & 15) - 8;
}

float scale_of(const Int4Weight& weight, int64_t row, int64_t input) {
  return widen(weight.scales_of(row / panel_rows)[input / weight.group * panel_rows + row % panel_rows]);
}

template <class T>
float number(const Int4Weight& weight, int64_t row, int64_t input) {
  return widen(round_to_bf16(static_cast<float>(code_of(weight, row, input)) * scale_of(weight, row, input)));
}

template <class T>
float number(const DenseWeight& weight, int64_t row, int64_t input) {
  return widen(reinterpret_cast<const T*>(weight.data + row * weight.row_bytes)[input]);
}

template <class T, class Weight>
float product(const T* x, const Weight& weight, int64_t row) {
  float sum = 0;
  for (int64_t input = 0; input < weight.width; ++input) sum += widen(x[input]) * number<T>(weight, row, input);
  return sum;
}

float silu_times(float gate, float up) { return gate / (1 + std::exp(-gate)) * up; }

template <class T, class Weight>
void multiply(const MatmulCall<Weight>& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    const T* x = static_cast<const T*>(call.x) + row * call.stride;
    T* y = static_cast<T*>(call.y) + row * call.weight.rows;
    for (int64_t output = 0; output < call.weight.rows; ++output) narrow(product(x, call.weight, output), y + output);
  });
}

// For every token, the sum over its choices of what `add(x, expert, route_weight, total)` adds.
template <class T, class Weight, class Add>
void mix(const ExpertsCall<Weight>& call, const Add& add) {
  const int64_t width = call.down.rows;
  parallel_for(call.threads, call.tokens, [&](int64_t token) {
    const Buffer<float> total(width);
    for (int64_t output = 0; output < width; ++output) total[output] = 0;
    for (int64_t choice = token * call.choices; choice < (token + 1) * call.choices; ++choice) {
      const int64_t expert = call.ids[choice];
      if (expert < 0 || expert >= call.experts) continue;
      add(static_cast<const T*>(call.hidden) + token * call.stride, expert, call.route_weights[choice], static_cast<float*>(total));
    }
    for (int64_t output = 0; output < width; ++output) narrow(total[output], static_cast<T*>(call.y) + token * width + output);
  });
}

template <class T, class Weight>
void mix_wide(const ExpertsCall<Weight>& call) {
  mix<T>(call, [&](const T* x, int64_t expert, float route_weight, float* total) {
    const Weight gate = call.gate.of_expert(expert), up = call.up.of_expert(expert), down = call.down.of_expert(expert);
    const Buffer<T> between(down.width);
    for (int64_t i = 0; i < down.width; ++i) narrow(silu_times(product(x, gate, i), product(x, up, i)), between + i);
    for (int64_t output = 0; output < down.rows; ++output) {
      total[output] += product(static_cast<const T*>(between), down, output) * route_weight;
    }
  });
}

// -- 8-bit activations --------------------------------------------------------------------------------------------------------

// Codes q = x / s rounded half to even, s = amax / 127 of `group` neighbours.
struct Quantised {
  int64_t group;
  Buffer<int8_t> codes;
  Buffer<float> scales;

  template <class T>
  Quantised(const T* x, int64_t width, int64_t group_) : group(group_), codes(width), scales(width / group) {
    for (int64_t start = 0; start < width; start += group) {
      float scale = 0;
      for (int64_t i = start; i < start + group; ++i) {
        const float size = std::fabs(widen(x[i]));
        if (!(size <= scale)) scale = size;  // NaN stays
        if (scale != scale) break;
      }
      scale = scale < 0x1p-100f ? 1 : std::isfinite(scale) ? scale / 127 : NAN;
      for (int64_t i = start; i < start + group; ++i) codes[i] = scale == scale ? static_cast<int8_t>(std::nearbyint(widen(x[i]) / scale)) : 0;
      scales[start / group] = scale;
    }
  }
};

float product(const Quantised& x, const Int4Weight& weight, int64_t row) {
  float sum = 0;
  const bool by_groups = x.group == weight.group;
  for (int64_t start = 0; start < weight.width; start += weight.group) {
    int32_t products = 0;
    for (int64_t input = start; input < start + weight.group; ++input) products += x.codes[input] * code_of(weight, row, input);
    const float scale = scale_of(weight, row, start);
    sum += static_cast<float>(products) * (by_groups ? scale * x.scales[start / weight.group] : scale);
  }
  return by_groups ? sum : sum * x.scales[0];
}

float product(const Quantised& x, const Int8Weight& weight, int64_t row) {
  int32_t sum = 0;
  for (int64_t input = 0; input < weight.width; ++input) sum += x.codes[input] * weight.codes[row * weight.row_bytes + input];
  return static_cast<float>(sum) * (x.scales[0] * weight.scales[row]);
}

template <class T>
void multiply_quantised(const MatmulCall<Int8Weight>& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    const Quantised x(static_cast<const T*>(call.x) + row * call.stride, call.weight.width, call.weight.width);
    T* y = static_cast<T*>(call.y) + row * call.weight.rows;
    for (int64_t output = 0; output < call.weight.rows; ++output) narrow(product(x, call.weight, output), y + output);
  });
}

template <class T>
float rounded(float x) {
  T to;
  narrow(x, &to);
  return widen(to);
}

template <class T>
void mix_quantised(const ExpertsCall<Int4Weight>& call) {
  mix<T>(call, [&](const T* hidden, int64_t expert, float route_weight, float* total) {
    const Int4Weight gate = call.gate.of_expert(expert), up = call.up.of_expert(expert), down = call.down.of_expert(expert);
    const Quantised x(hidden, gate.width, call.activation_groups ? gate.group : gate.width);
    const Buffer<T> plain(down.width);
    for (int64_t i = 0; i < down.width; ++i) {
      narrow(silu_times(rounded<T>(product(x, gate, i)), rounded<T>(product(x, up, i))), plain + i);
    }
    const Quantised between(static_cast<const T*>(plain), down.width, call.activation_groups ? down.group : down.width);
    for (int64_t output = 0; output < down.rows; ++output) total[output] += product(between, down, output) * route_weight;
  });
}

void int4_matmul(const MatmulCall<Int4Weight>& call) { call.is_bf16 ? multiply<bf16>(call) : multiply<float>(call); }
void int4_experts(const ExpertsCall<Int4Weight>& call) { call.is_bf16 ? mix_wide<bf16>(call) : mix_wide<float>(call); }
void int4_int8_experts(const ExpertsCall<Int4Weight>& call) { call.is_bf16 ? mix_quantised<bf16>(call) : mix_quantised<float>(call); }
void int8_matmul(const MatmulCall<Int8Weight>& call) { call.is_bf16 ? multiply_quantised<bf16>(call) : multiply_quantised<float>(call); }
void linear(const MatmulCall<DenseWeight>& call) { call.is_bf16 ? multiply<bf16>(call) : multiply<float>(call); }
void dense_experts(const ExpertsCall<DenseWeight>& call) { call.is_bf16 ? mix_wide<bf16>(call) : mix_wide<float>(call); }

}  // namespace

namespace scalar {
const MatmulKernels matmul = {int4_matmul, int4_experts, int4_int8_experts, int8_matmul, linear, dense_experts};
}
}  // namespace glm5
