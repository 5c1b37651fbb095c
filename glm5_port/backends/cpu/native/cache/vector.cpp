// Rows of the cache in vectors; the bytes are those of scalar.cpp, but for the sign of a NaN.
#include "cache/cache.h"
#include "parallel.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr int64_t tokens_of_block = 16;
constexpr int64_t lanes = F32::width;

struct Row {
  const void* data;
  bool is_bf16;

  F32 load(int64_t first) const {
    return is_bf16 ? F32::load(static_cast<const bf16*>(data) + first) : F32::load(static_cast<const float*>(data) + first);
  }
  F32 load_first(int64_t first, int64_t count) const {
    return is_bf16 ? glm5::load_first(static_cast<const bf16*>(data) + first, count)
                   : glm5::load_first(static_cast<const float*>(data) + first, count);
  }
  F32 numbers(int64_t first, int64_t last) const { return first + lanes <= last ? load(first) : load_first(first, last - first); }
};

Row row_at(const NewRows& rows, int64_t token) {
  const int64_t place = token * rows.stride;
  if (rows.is_bf16) return {static_cast<const bf16*>(rows.data) + place, true};
  return {static_cast<const float*>(rows.data) + place, false};
}

// Magnitudes compared as integers, so that NaN, whose bits are above infinity's, is the largest.
float largest_of(const Row& row, int64_t first, int64_t count) {
  I32 amax = bits_of(F32::broadcast(smallest_group));
  for (int64_t i = first; i < first + count; i += lanes) amax = maximum(amax, bits_of(absolute(row.numbers(i, first + count))));
  return float_of(static_cast<uint32_t>(amax.largest()));
}

// Codes as numbers from -128 to 127, which are bytes with the sign of e4m3 in the highest bit.
I32 e4m3_of(F32 x) {
  const I32 bits = bits_of(absolute(x)), negative = shift_right<31>(bits_of(x));
  const F32 magnitude = float_of(minimum(bits, bits_of(F32::broadcast(largest_e4m3))));
  const I32 kept = bits_of(magnitude), odd = shift_right<20>(kept) & I32::broadcast(1);
  const I32 normal = shift_right<20>(kept + I32::broadcast(0x7FFFF) + odd) - I32::broadcast(120 << 3);
  const I32 small = to_int(round_to_even(magnitude * F32::broadcast(0x1p9f)));
  const I32 number = choose_greater(bits_of(F32::broadcast(0x1p-6f)), kept, small, normal);
  const I32 code = choose_greater(bits, I32::broadcast(0x7F800000), I32::broadcast(0x7F), number);
  return code - shift_left<7>(negative);
}

I32 int8_of(F32 x) {
  const F32 limit = F32::broadcast(largest_int8);
  const I32 code = to_int(round_to_even(maximum(-limit, minimum(limit, x))));
  return choose_greater(bits_of(absolute(x)), I32::broadcast(0x7F800000), I32::broadcast(0), code);
}

void quantise(const Row& row, int64_t first, int64_t count, float scale, bool is_fp8, uint8_t* codes) {
  const F32 divisor = F32::broadcast(scale);
  int8_t* to = reinterpret_cast<int8_t*>(codes);
  for (int64_t i = 0; i < count; i += lanes) {
    const F32 value = row.numbers(first + i, first + count) / divisor;
    const I32 code = is_fp8 ? e4m3_of(value) : int8_of(value);
    if (i + lanes <= count) {
      code.store(to + i);
    } else {
      int8_t whole[lanes];
      code.store(whole);
      std::memcpy(to + i, whole, count - i);
    }
  }
}

void write_latent_row(const LatentWriteCall& call, int64_t token) {
  const Row latent = row_at(call.latent, token), rope = row_at(call.rope, token);
  uint8_t* row = row_of(call.row, call.slots, token);
  uint8_t* scales = row + latent_width + (call.is_fp8 ? 0 : 2 * rope_width);
  uint8_t* rope_to = row + latent_width + (call.is_fp8 ? 4 * latent_groups : 0);
  for (int64_t group = 0; group < latent_groups; ++group) {
    const int64_t first = group * latent_group;
    const float scale = largest_of(latent, first, latent_group) / (call.is_fp8 ? largest_e4m3 : largest_int8);
    quantise(latent, first, latent_group, scale, call.is_fp8, row + first);
    store(scale, scales + 4 * group);
  }
  for (int64_t i = 0; i < rope_width; i += lanes) rope.load(i).store(reinterpret_cast<bf16*>(rope_to) + i);
}

void write_index_row(const IndexWriteCall& call, int64_t token) {
  const Row key = row_at(call.key, token);
  uint8_t* to = row_of(call.scale, call.slots, token);
  const float amax = largest_of(key, 0, call.key.width);
  float scale = power_of_two_scale(amax);
  if (call.is_fp8) {
    store(scale, to);
  } else {
    const fp16 rounded = round_to_fp16(amax / largest_int8);
    scale = widen(rounded);
    store(rounded, to);
  }
  quantise(key, 0, call.key.width, scale, call.is_fp8, row_of(call.values, call.slots, token));
}

template <class Write>
void each_token(const Slots& slots, int threads, const Write& write) {
  parallel_for(threads, blocks_of(slots.tokens, tokens_of_block), [&](int64_t block) {
    const int64_t last = smaller(slots.tokens, (block + 1) * tokens_of_block);
    for (int64_t token = block * tokens_of_block; token < last; ++token)
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

namespace GLM5_ISA {
const CacheKernels cache = {copy, write_latent, write_index};
}
}  // namespace glm5
