// Writing rows into a paged cache (glm5_port/operators/cache.py), in every format (cache_layouts.py).
//
// Shape legend: T tokens; W width of a row.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numbers.h"

namespace glm5 {

constexpr int64_t latent_width = 512, rope_width = 64, latent_group = 128, latent_groups = latent_width / latent_group;
constexpr float largest_e4m3 = 448.0f, largest_int8 = 127.0f;
constexpr float smallest_group = 1e-4f;  // of a group's largest magnitude, so that zeros get a finite scale

// [T, W] float or bfloat16; rows `stride` elements apart, the numbers of a row side by side.
struct NewRows {
  const void* data;
  int64_t stride, width;
  bool is_bf16;
};

// One tensor of the cache; strides in bytes, the bytes of a row side by side.
struct CacheTensor {
  uint8_t* data;
  int64_t page_stride, row_stride;
};

// Where each token goes: slots[t] is page * page_size + row, below 0 where nothing is written.
struct Slots {
  const int64_t* slots;
  int64_t tokens, page_size;
};

struct CopyCall {
  const uint8_t* rows;  // `bytes` each, `stride` bytes apart
  int64_t stride, bytes;
  CacheTensor field;
  Slots slots;
  int threads;
};

struct LatentWriteCall {
  NewRows latent, rope;
  CacheTensor row;  // of 656 bytes
  bool is_fp8;
  Slots slots;
  int threads;
};

struct IndexWriteCall {
  NewRows key;
  CacheTensor values, scale;
  bool is_fp8;
  Slots slots;
  int threads;
};

struct CacheKernels {
  void (*copy)(const CopyCall& call);
  void (*write_latent)(const LatentWriteCall& call);
  void (*write_index)(const IndexWriteCall& call);
};
GLM5_KERNELS(CacheKernels, cache)

namespace {

inline uint8_t* row_of(const CacheTensor& field, const Slots& slots, int64_t token) {
  const int64_t slot = slots.slots[token];
  return field.data + slot / slots.page_size * field.page_stride + slot % slots.page_size * field.row_stride;
}

// Scale of a group of e4m3 index keys: the smallest power of two that is at least amax / 448, by the bits alone.
inline float power_of_two_scale(float amax) {
  if (!(amax < __builtin_inff())) return amax;
  return float_of((bits_of(amax / largest_e4m3) + 0x007FFFFF) & 0x7F800000);
}

// Half to even; too large is infinite; NaN stays NaN.
inline fp16 round_to_fp16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (magnitude >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65536 and more
  if (magnitude < 0x38800000) {  // below 2^-14 the step is 2^-24: the unit in the last place of 0.5 to 1
    const uint32_t steps = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

inline void store(float x, uint8_t* to) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16 x, uint8_t* to) { std::memcpy(to, &x, sizeof x); }
inline void store(fp16 x, uint8_t* to) { std::memcpy(to, &x, sizeof x); }

}  // namespace
}  // namespace glm5
