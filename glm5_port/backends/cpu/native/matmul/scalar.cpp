// What the products mean: weights bf16(q * s), sums in float, results rounded once.
#include <cmath>

#include "matmul/matmul.h"
#include "parallel.h"

namespace glm5 {
namespace {

int code_of(const Int4Weight& weight, int64_t row, int64_t input) {
  const int64_t inside = input % weight.group;
  const int64_t unit = input / weight.group * weight.units_of_group() + inside / unit_inputs;
  const uint8_t* bytes = weight.codes_of(row / panel_rows) + unit * unit_bytes + row % panel_rows * (unit_inputs / 2);
  const int place = static_cast<int>(inside % unit_inputs);
  return ((bytes[place / 2] >> (4 * (place % 2))) & 15) - 8;
}

float scale_of(const Int4Weight& weight, int64_t row, int64_t input) {
  return widen(weight.scales_of(row / panel_rows)[input / weight.group * panel_rows + row % panel_rows]);
}

float weight_of(const Int4Weight& weight, int64_t row, int64_t input) {
  return widen(round_to_bf16(static_cast<float>(code_of(weight, row, input)) * scale_of(weight, row, input)));
}

template <class T>
float product(const T* x, const Int4Weight& weight, int64_t row) {
  float sum = 0;
  for (int64_t input = 0; input < weight.width; ++input) sum += widen(x[input]) * weight_of(weight, row, input);
  return sum;
}

template <class T>
void multiply(const Int4MatmulCall& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    const T* x = static_cast<const T*>(call.x) + row * call.stride;
    T* y = static_cast<T*>(call.y) + row * call.weight.rows;
    for (int64_t output = 0; output < call.weight.rows; ++output) narrow(product(x, call.weight, output), y + output);
  });
}

Int4Weight of_expert(Int4Weight weight, int64_t expert, int64_t codes, int64_t scales) {
  weight.codes += expert * codes;
  weight.scales += expert * scales;
  return weight;
}

template <class T>
void mix(const Int4ExpertsCall& call) {
  const int64_t between_width = call.down.width, width = call.down.rows;
  parallel_for(call.threads, call.tokens, [&](int64_t token) {
    const T* x = static_cast<const T*>(call.hidden) + token * call.stride;
    const Buffer<T> between(between_width);
    const Buffer<float> total(width);
    for (int64_t output = 0; output < width; ++output) total[output] = 0;
    for (int64_t choice = 0; choice < call.choices; ++choice) {
      const int64_t expert = call.ids[token * call.choices + choice];
      if (expert < 0 || expert >= call.experts) continue;
      const Int4Weight gate = of_expert(call.gate, expert, call.gate_up_codes, call.gate_up_scales);
      const Int4Weight up = of_expert(call.up, expert, call.gate_up_codes, call.gate_up_scales);
      const Int4Weight down = of_expert(call.down, expert, call.down_codes, call.down_scales);
      for (int64_t i = 0; i < between_width; ++i) {
        const float g = product(x, gate, i);
        narrow(g / (1 + std::exp(-g)) * product(x, up, i), between + i);
      }
      const float route_weight = call.route_weights[token * call.choices + choice];
      for (int64_t output = 0; output < width; ++output) {
        total[output] += product(static_cast<const T*>(between), down, output) * route_weight;
      }
    }
    T* y = static_cast<T*>(call.y) + token * width;
    for (int64_t output = 0; output < width; ++output) narrow(total[output], y + output);
  });
}

void int4_matmul(const Int4MatmulCall& call) { call.is_bf16 ? multiply<bf16>(call) : multiply<float>(call); }
void int4_experts(const Int4ExpertsCall& call) { call.is_bf16 ? mix<bf16>(call) : mix<float>(call); }

}  // namespace

namespace scalar {
const MatmulKernels matmul = {int4_matmul, int4_experts};
}
}  // namespace glm5
