// The INT4 quantiser (glm5_port/quant/int4.py), rule amax7, with the statistics that an export reports.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numbers.h"

namespace glm5 {

constexpr int smallest_amax = (127 - 110) << 7;  // bit patterns of bfloat16: groups below are zeros
constexpr int largest_amax = (127 + 127) << 7;   // groups above cannot be held

// What rounding did to a row, in the order of STATISTICS (operators/int4_measured.py). A row with a group that cannot be quantised has
// zeros.
constexpr int statistics_count = 7;
struct QuantizeStatistics {
  int64_t at_limit = 0, zero_groups = 0, tiny_groups = 0, fp16_unsafe_scales = 0;
  double error_sum = 0, magnitude_sum = 0;
  float max_error = 0;
  bool refused = false;

  void store(float* to) const {
    const double all[statistics_count] = {double(at_limit), double(zero_groups), double(tiny_groups), double(fp16_unsafe_scales),
                                          error_sum,        magnitude_sum,       max_error};
    for (int i = 0; i < statistics_count; ++i) to[i] = refused ? 0 : static_cast<float>(all[i]);
  }
};

struct QuantizeCall {
  const void* weight;     // [rows, width] float or bfloat16, rows `stride` elements apart
  bool is_bf16;
  int64_t rows, width, stride, group;
  uint32_t* packed;       // [rows, width / 8]
  bf16* scales;           // [rows, width / group]
  float* statistics;      // [rows, statistics_count], or null
  int threads;
};

// value = bf16(q * s).
struct DequantizeCall {
  const uint32_t* packed;  // [rows, width / 8], rows `packed_stride` words apart
  int64_t packed_stride;
  const bf16* scales;      // [rows, width / group], rows `scale_stride` apart
  int64_t scale_stride;
  int64_t rows, width, group;
  bf16* values;            // [rows, width]
  int threads;
};

struct QuantizeKernels {
  void (*int4_quantize)(const QuantizeCall& call);
  void (*int4_dequantize)(const DequantizeCall& call);
};
GLM5_KERNELS(QuantizeKernels, quantize)

namespace {

// Bit pattern of bf16(amax / 7) from that of amax, by integers alone; see seventh_bits in quant/int4.py.
inline int32_t seventh_bits(int32_t amax) {
  const int32_t mantissa = 128 + (amax & 127);
  const bool lower = mantissa < 224;
  const int32_t rounded = (((lower ? 16 : 8) * mantissa + 7) * 4682) >> 16;
  return amax - mantissa + rounded - ((lower ? 3 : 2) << 7);
}

inline bf16 scale_of(int32_t amax) {
  const int32_t bits = amax < smallest_amax ? 127 << 7 : amax <= largest_amax ? seventh_bits(amax) : 0x7FC0;
  return {static_cast<uint16_t>(bits)};
}

// Whether float16 holds a scale exactly: eight bits of mantissa fit, so it is a matter of the exponent alone, but for subnormals.
inline bool fits_fp16(bf16 scale) {
  const int exponent = ((scale.bits >> 7) & 0xFF) - 127;
  if (exponent > 15) return false;
  if (exponent >= -14 - 3) return true;  // three bits of the eleven are free
  const int lost = -14 - 3 - exponent;   // low bits of the mantissa that fall below 2^-24
  return lost <= 7 && ((128 | (scale.bits & 127)) & ((1 << lost) - 1)) == 0;
}

}  // namespace
}  // namespace glm5
