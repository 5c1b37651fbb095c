// What the quantiser means: w = bf16(weight); s = bf16(amax / 7); q = w / s, the exact quotient rounded half to even.
#include <cmath>

#include "parallel.h"
#include "quantize/quantize.h"

namespace glm5 {
namespace {

bf16 rounded(float x) { return round_to_bf16(x); }
bf16 rounded(bf16 x) { return x; }

template <class T>
void quantize_row(const QuantizeCall& call, int64_t row) {
  const T* weight = static_cast<const T*>(call.weight) + row * call.stride;
  const int64_t groups = call.width / call.group;
  uint32_t* words = call.packed + row * (call.width / 8);
  bf16* scales = call.scales + row * groups;
  QuantizeStatistics statistics;
  for (int64_t group = 0; group < groups; ++group) {
    const T* members = weight + group * call.group;
    int32_t amax = 0;
    for (int64_t i = 0; i < call.group; ++i) {
      const int32_t magnitude = rounded(members[i]).bits & 0x7FFF;
      if (magnitude > amax) amax = magnitude;
    }
    const bf16 scale = scales[group] = scale_of(amax);
    const bool held = amax <= largest_amax, ordinary = held && amax >= smallest_amax;
    const double s = widen(scale);
    double worst = 0;
    for (int64_t i = 0; i < call.group; ++i) {
      const double w = widen(rounded(members[i]));
      // A double quotient is near enough: one that is no tie is at least 2^-11 away from every tie.
      const int code = ordinary ? static_cast<int>(std::nearbyint(w / s)) : 0;
      const int64_t place = group * call.group + i;
      uint32_t& word = words[place / 8];
      const int shift = 4 * static_cast<int>(place % 8);
      word = (word & ~(15u << shift)) | static_cast<uint32_t>(code + 8) << shift;
      const double error = std::fabs(w - widen(round_to_bf16(static_cast<float>(code * s))));
      statistics.at_limit += code == 7 || code == -7;
      statistics.error_sum += error;
      statistics.magnitude_sum += std::fabs(w);
      if (error > worst) worst = error;
    }
    statistics.refused |= !held;
    statistics.zero_groups += amax == 0;
    statistics.tiny_groups += amax > 0 && amax < smallest_amax;
    statistics.fp16_unsafe_scales += !fits_fp16(scale);
    if (ordinary) statistics.max_error = std::fmax(statistics.max_error, static_cast<float>(worst) / widen(bf16{static_cast<uint16_t>(amax)}));
  }
  if (call.statistics) statistics.store(call.statistics + row * statistics_count);
}

void int4_quantize(const QuantizeCall& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    call.is_bf16 ? quantize_row<bf16>(call, row) : quantize_row<float>(call, row);
  });
}

void int4_dequantize(const DequantizeCall& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    for (int64_t i = 0; i < call.width; ++i) {
      const int code = static_cast<int>(call.packed[row * call.packed_stride + i / 8] >> (4 * (i % 8)) & 15) - 8;
      const float scale = widen(call.scales[row * call.scale_stride + i / call.group]);
      call.values[row * call.width + i] = round_to_bf16(code * scale);
    }
  });
}

}  // namespace

namespace scalar {
const QuantizeKernels quantize = {int4_quantize, int4_dequantize};
}
}  // namespace glm5
