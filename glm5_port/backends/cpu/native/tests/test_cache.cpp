#include <algorithm>

#include "cache/cache.h"
#include "tests/harness.h"

namespace glm5::tests {
namespace {

// Where tokens go: pages and rows in no order, and nowhere for every seventh token.
struct Places {
  Places(int64_t tokens_, int64_t page_size_, std::mt19937& random) : tokens(tokens_), page_size(page_size_), slots(tokens) {
    std::vector<int64_t> free(pages() * page_size);
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int64_t>(i);
    std::shuffle(free.begin(), free.end(), random);
    for (int64_t i = 0; i < tokens; ++i) slots[i] = i % 7 == 3 ? -1 : free[i];
  }
  int64_t pages() const { return blocks_of(tokens, page_size) + 1; }
  Slots call() const { return {slots.data(), tokens, page_size}; }
  int64_t tokens, page_size;
  Exact<int64_t> slots;
};

// A tensor of the cache, rows of `bytes` at any address; what is not written keeps its pattern.
struct Field {
  Field(const Places& places, int64_t bytes, int64_t gap)
      : row_stride(bytes + gap), page_stride(places.page_size * row_stride + gap),
        memory(extent(places.pages(), page_stride, extent(places.page_size, row_stride, bytes)), gap) {
    for (int64_t i = 0; i < memory.size(); ++i) memory[i] = 0xA5;
  }
  CacheTensor call() const { return {memory.data(), page_stride, row_stride}; }
  int64_t row_stride, page_stride;
  Exact<uint8_t> memory;
};

// Rows of all sizes: ordinary, tiny, large, whole numbers (many ties), and zeros.
template <class T>
void fill_rows(const Exact<T>& rows, int64_t stride, std::mt19937& random) {
  const float sizes[] = {1, 1e-6f, 300, 1e-30f, 1e30f};
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const int64_t row = i / stride;
    const float x = row % 7 == 5 ? static_cast<float>(static_cast<int>(random() % 255) - 127) / 2 : row % 7 == 6 ? 0.0f : normal(random) * sizes[row % 5];
    narrow(x, &rows[i]);
  }
}

TEST(cache_copy) {
  std::mt19937 random(1);
  for (const int64_t tokens : {0, 1, 15, 16, 17, 50}) {
    for (const int64_t bytes : {0, 1, 7, 64, 100}) {
      const Places places(tokens, 3, random);
      const Exact<uint8_t> rows(extent(tokens, bytes + 1, bytes), 1);
      for (int64_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(random());
      const auto copied = [&](Isa isa, int threads) {
        Field field(places, bytes, 1);
        cache_for(isa).copy({rows.data(), bytes + 1, bytes, field.call(), places.call(), threads});
        return field;
      };
      const Field expected = copied(Isa::scalar, 1);
      for (int64_t token = 0; token < tokens; ++token) {
        if (places.slots[token] < 0) continue;
        const uint8_t* to = row_of(expected.call(), places.call(), token);
        CHECK(std::equal(to, to + bytes, rows.data() + token * (bytes + 1)));
      }
      for (const Isa isa : usable_isas())
        for (const int threads : {1, 3}) CHECK(copied(isa, threads).memory == expected.memory);
    }
  }
}

template <class T>
void latent_rows() {
  std::mt19937 random(2);
  for (const int64_t tokens : {0, 1, 40}) {
    for (const int64_t gap : {0, 1}) {
      const Places places(tokens, 4, random);
      const Exact<T> latent(extent(tokens, latent_width + gap, latent_width), gap), rope(extent(tokens, rope_width + gap, rope_width), gap);
      fill_rows(latent, latent_width + gap, random), fill_rows(rope, rope_width + gap, random);
      for (const bool is_fp8 : {false, true}) {
        const auto written = [&](Isa isa, int threads) {
          Field field(places, latent_width + 4 * latent_groups + 2 * rope_width, gap);
          cache_for(isa).write_latent({{latent.data(), latent_width + gap, latent_width, sizeof(T) == 2},
                                       {rope.data(), rope_width + gap, rope_width, sizeof(T) == 2}, field.call(), is_fp8, places.call(), threads});
          return field;
        };
        const Field expected = written(Isa::scalar, 1);
        for (const Isa isa : usable_isas())
          for (const int threads : {1, 2, 3}) CHECK(written(isa, threads).memory == expected.memory);
      }
    }
  }
}

TEST(cache_latent_bf16) { latent_rows<bf16>(); }
TEST(cache_latent_float) { latent_rows<float>(); }

template <class T>
struct Written {
  Field values, scales;
};

template <class T>
Written<T> index_rows(Isa isa, const Places& places, const Exact<T>& keys, int64_t width, int64_t gap, bool is_fp8, int threads) {
  Written<T> to{Field(places, width, gap), Field(places, is_fp8 ? 4 : 2, gap)};
  cache_for(isa).write_index({{keys.data(), width + gap, width, sizeof(T) == 2}, to.values.call(), to.scales.call(), is_fp8, places.call(), threads});
  return to;
}

template <class T>
void index_everywhere() {
  std::mt19937 random(3);
  for (const int64_t width : {1, 7, 8, 9, 15, 16, 17, 64, 130}) {
    for (const bool is_fp8 : {false, true}) {
      const int64_t tokens = 40, gap = width % 2;
      const Places places(tokens, 4, random);
      const Exact<T> keys(extent(tokens, width + gap, width), gap);
      fill_rows(keys, width + gap, random);
      const Written<T> expected = index_rows(Isa::scalar, places, keys, width, gap, is_fp8, 1);
      for (const Isa isa : usable_isas()) {
        for (const int threads : {1, 3}) {
          const Written<T> result = index_rows(isa, places, keys, width, gap, is_fp8, threads);
          CHECK(result.values.memory == expected.values.memory);
          CHECK(result.scales.memory == expected.scales.memory);
        }
      }
    }
  }
}

TEST(cache_index_bf16) { index_everywhere<bf16>(); }
TEST(cache_index_float) { index_everywhere<float>(); }

// NaN is kept by e4m3, whatever its sign, and is 0 among the codes of int8, whose scale says that it was there.
TEST(cache_not_finite) {
  std::mt19937 random(4);
  const Places places(3, 4, random);
  const Exact<float> keys(3 * 20);
  fill_normal(keys, random);
  keys[5] = NAN, keys[20 + 17] = -INFINITY;
  for (const bool is_fp8 : {false, true}) {
    const Written<float> expected = index_rows(Isa::scalar, places, keys, 20, 0, is_fp8, 1);
    for (const Isa isa : usable_isas()) {
      const Written<float> result = index_rows(isa, places, keys, 20, 0, is_fp8, 1);
      const Exact<uint8_t>&codes = result.values.memory, &theirs = expected.values.memory;
      for (int64_t i = 0; i < codes.size(); ++i) CHECK(codes[i] == theirs[i] || (is_fp8 && ((codes[i] | 0x80) == 0xFF) && ((theirs[i] | 0x80) == 0xFF)));
      const uint8_t* scale = row_of(result.scales.call(), places.call(), 0);
      float x;
      std::memcpy(&x, scale, sizeof x);
      fp16 half;
      std::memcpy(&half, scale, sizeof half);
      CHECK(std::isnan(is_fp8 ? x : widen(half)));
    }
  }
}

TEST(cache_meaning) {
  const float values[] = {127, 2.5f, -3.5f, 0, 1, -127, 0.4f, 120}, numbers[] = {448, 1, -0.5f, 0, 19, -21, 0.015625f, -448};
  const uint8_t codes[] = {127, 2, 0xFC, 0, 1, 0x81, 0, 120}, small_codes[] = {0x7E, 0x38, 0xB0, 0, 0x5A, 0xDA, 0x08, 0xFE};
  const Exact<float> keys(8);
  const Exact<int64_t> slot(1);
  for (const Isa isa : usable_isas()) {
    for (const bool is_fp8 : {false, true}) {
      std::memcpy(keys.data(), is_fp8 ? numbers : values, sizeof values);
      const Exact<uint8_t> to(8), scale(is_fp8 ? 4 : 2);
      cache_for(isa).write_index({{keys.data(), 8, 8, false}, {to.data(), 8, 8}, {scale.data(), 4, 4}, is_fp8, {slot.data(), 1, 1}, 1});
      CHECK(std::memcmp(to.data(), is_fp8 ? small_codes : codes, 8) == 0);
      CHECK(scale[scale.size() - 1] == (is_fp8 ? 0x3F : 0x3C));  // of 1
    }
  }
}

}  // namespace
}  // namespace glm5::tests
