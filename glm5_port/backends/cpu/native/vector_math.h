// Functions of vectors of floats that no instruction computes. For files that are compiled for a vector instruction set.
#pragma once

#include "simd.h"

namespace glm5 {
namespace {

// Within 1 ulp of e^x, subnormal results too; e^-inf = 0, e^inf = inf, NaN stays NaN.
//
// e^x = 2^n e^r with n the nearest whole number to x / ln 2, and e^r = 1 + r + r^2 q(r) with q of least relative error, 3e-9.
inline F32 exponential(F32 x) {
  const F32 lowest = F32::broadcast(-105.0f), highest = F32::broadcast(89.0f);  // e^x is 0, and infinite, there already
  x = minimum(highest, maximum(lowest, x));  // in this order of arguments, NaN comes through
  const F32 n = round_to_even(x * F32::broadcast(1.44269504f));
  // ln 2 in two parts, the first with so few bits that its product with n is exact.
  const F32 r = multiply_add(n, F32::broadcast(2.12194440e-4f), multiply_add(n, F32::broadcast(-0.693359375f), x));
  F32 q = F32::broadcast(0.0013814467f);
  q = multiply_add(q, r, F32::broadcast(0.0083687808f));
  q = multiply_add(q, r, F32::broadcast(0.0416683927f));
  q = multiply_add(q, r, F32::broadcast(0.1666651964f));
  q = multiply_add(q, r, F32::broadcast(0.4999999404f));
  return times_power_of_two(multiply_add(q, r * r, r) + F32::broadcast(1.0f), n);
}

// x / (1 + e^-x), within 3 ulp; -0 below -88.7, where e^-x is infinite and the exact value above -3e-37. silu(-inf) is NaN, as
// in torch.
inline F32 silu(F32 x) { return x / (F32::broadcast(1.0f) + exponential(-x)); }

}  // namespace
}  // namespace glm5
