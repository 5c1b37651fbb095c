// Number formats beside float: bfloat16 as its sixteen bits, and conversions of single numbers. Vectors are in simd.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace glm5 {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(int8_t x) { return x; }
inline float widen(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const uint32_t magnitude = exponent == 31  ? 0x7F800000 | mantissa << 13
                             : exponent > 0 ? (exponent + 112) << 23 | mantissa << 13
                                            : bits_of(static_cast<float>(mantissa) * 0x1p-24f);
  return float_of(sign | magnitude);
}
// Without infinities: all ones but the sign is NaN.
inline float widen(e4m3 x) {
  const uint32_t sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7F;
  const uint32_t bits = magnitude == 0x7F ? 0x7FC00000
                        : magnitude >= 8  ? (120u << 23) + (magnitude << 20)
                                          : bits_of(static_cast<float>(magnitude) * 0x1p-9f);
  return float_of(sign | bits);
}

// Half to even; subnormals are kept and NaN stays NaN, as torch rounds.
inline bf16 round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) { *to = round_to_bf16(x); }

// Instead of templates of the standard library, which the linker might merge across instruction sets.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory of a kernel's own, on a cache line, uninitialised; freed with it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, blocks_of(count * sizeof(T) + 1, 64) * 64))) {
    if (!data_) std::abort();  // some kilobytes could not be had: nothing that runs here can go on
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace glm5
