// silu(gate) * up in vectors.
#pragma once

#include "simd.h"

namespace glm5 {
namespace {

// e^x, within 2 units in the last place; 0 below -87.3 and infinity above 88.7; NaN stays NaN.
inline F32 exponential(F32 x) {
  x = maximum(F32::broadcast(-87.3f), minimum(F32::broadcast(88.8f), x));  // the second operand is what a NaN comes through
  const F32 power = round_to_even(x * F32::broadcast(1.44269504f));
  const F32 rest = multiply_add(power, F32::broadcast(-1.42860677e-6f), multiply_add(power, F32::broadcast(-0.693145752f), x));
  const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F32 sum = F32::broadcast(terms[0]);
  for (int i = 1; i < 7; ++i) sum = multiply_add(sum, rest, F32::broadcast(terms[i]));
  return sum * float_of(shift_left<23>(to_int(power) + I32::broadcast(127)));  // an exponent of 128 is infinity
}

inline F32 silu_times(F32 gate, F32 up) {
  return gate / (F32::broadcast(1.0f) + exponential(-gate)) * up;
}

}  // namespace
}  // namespace glm5
