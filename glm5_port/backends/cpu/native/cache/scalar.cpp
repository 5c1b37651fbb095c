// What the cache formats store: all arithmetic in float, a value is x / scale, rounded to the nearest code, ties to even.
#include <cmath>

#include "cache/cache.h"
#include "parallel.h"

namespace glm5 {
namespace {

float number_at(const NewRows& rows, int64_t token, int64_t i) {
  const int64_t place = token * rows.stride + i;
  return rows.is_bf16 ? widen(static_cast<const bf16*>(rows.data)[place]) : static_cast<const float*>(rows.data)[place];
}

// Largest magnitude, at least the smallest that is told apart from zero; NaN stays NaN.
float largest_of(const NewRows& rows, int64_t token, int64_t first, int64_t count) {
  float amax = smallest_group;
  for (int64_t i = first; i < first + count; ++i) {
    const float magnitude = std::fabs(number_at(rows, token, i));
    if (magnitude > amax || magnitude != magnitude) amax = magnitude;
    if (amax != amax) break;
  }
  return amax;
}

// Saturates at 448.
uint8_t e4m3_of(float x) {
  const uint8_t sign = bits_of(x) >> 31 ? 0x80 : 0;
  if (x != x) return sign | 0x7F;
  const float magnitude = std::fmin(std::fabs(x), largest_e4m3);
  if (magnitude < 0x1p-6f) return sign | static_cast<uint8_t>(std::nearbyint(magnitude * 0x1p9f));
  const uint32_t bits = bits_of(magnitude), rounded = bits + 0x7FFFF + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((rounded >> 20) - (120 << 3));
}

uint8_t int8_of(float x) {
  if (x != x) return 0;
  const float rounded = std::fmax(-largest_int8, std::fmin(largest_int8, std::nearbyint(x)));
  return static_cast<uint8_t>(static_cast<int8_t>(rounded));
}

void quantise(const NewRows& rows, int64_t token, int64_t first, int64_t count, float scale, bool is_fp8, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = number_at(rows, token, first + i) / scale;
    codes[i] = is_fp8 ? e4m3_of(value) : int8_of(value);
  }
}

// bytes 0-511 codes, then four float scales and 64 bfloat16 rope (fp8), or rope and scales (int8).
void write_latent_row(const LatentWriteCall& call, int64_t token) {
  uint8_t* row = row_of(call.row, call.slots, token);
  uint8_t* scales = row + latent_width + (call.is_fp8 ? 0 : 2 * rope_width);
  uint8_t* rope = row + latent_width + (call.is_fp8 ? 4 * latent_groups : 0);
  for (int64_t group = 0; group < latent_groups; ++group) {
    const int64_t first = group * latent_group;
    const float scale = largest_of(call.latent, token, first, latent_group) / (call.is_fp8 ? largest_e4m3 : largest_int8);
    quantise(call.latent, token, first, latent_group, scale, call.is_fp8, row + first);
    store(scale, scales + 4 * group);
  }
  for (int64_t i = 0; i < rope_width; ++i) store(round_to_bf16(number_at(call.rope, token, i)), rope + 2 * i);
}

void write_index_row(const IndexWriteCall& call, int64_t token) {
  uint8_t* to = row_of(call.scale, call.slots, token);
  const float amax = largest_of(call.key, token, 0, call.key.width);
  float scale = power_of_two_scale(amax);
  if (call.is_fp8) {
    store(scale, to);
  } else {
    const fp16 rounded = round_to_fp16(amax / largest_int8);
    scale = widen(rounded);
    store(rounded, to);
  }
  quantise(call.key, token, 0, call.key.width, scale, call.is_fp8, row_of(call.values, call.slots, token));
}

template <class Write>
void each_token(const Slots& slots, int threads, const Write& write) {
  parallel_for(threads, slots.tokens, [&](int64_t token) {
    if (slots.slots[token] >= 0) write(token);
  });
}

void copy(const CopyCall& call) {
  each_token(call.slots, call.threads, [&](int64_t token) {
    std::memcpy(row_of(call.field, call.slots, token), call.rows + token * call.stride, call.bytes);
  });
}

void write_latent(const LatentWriteCall& call) {
  each_token(call.slots, call.threads, [&](int64_t token) { write_latent_row(call, token); });
}

void write_index(const IndexWriteCall& call) {
  each_token(call.slots, call.threads, [&](int64_t token) { write_index_row(call, token); });
}

}  // namespace

namespace scalar {
const CacheKernels cache = {copy, write_latent, write_index};
}
}  // namespace glm5
