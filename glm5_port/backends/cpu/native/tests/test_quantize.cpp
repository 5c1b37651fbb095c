#include "quantize/quantize.h"
#include "tests/harness.h"

namespace glm5::tests {
namespace {

template <class T>
struct Result {
  Exact<uint32_t> packed;
  Exact<bf16> scales;
  Exact<float> statistics;
};

template <class T>
Result<T> quantized(Isa isa, const Exact<T>& weight, int64_t rows, int64_t width, int64_t stride, int64_t group, int threads,
                    bool measured = true) {
  Result<T> result{Exact<uint32_t>(rows * width / 8), Exact<bf16>(rows * (width / group)), Exact<float>(rows * statistics_count)};
  quantize_for(isa).int4_quantize({weight.data(), sizeof(T) == 2, rows, width, stride, group, result.packed.data(),
                                   result.scales.data(), measured ? result.statistics.data() : nullptr, threads});
  return result;
}

template <class T>
void same_bits_everywhere(int64_t groups) {
  std::mt19937 random(0);
  for (const int64_t group : {8, 16, 24, 32, 64, 160}) {
    for (const int64_t rows : {0, 1, 5, 33}) {
      for (const int64_t gap : {0, 3}) {
        const int64_t width = groups * group, stride = width + gap;
        const Exact<T> weight(extent(rows, stride, width), gap);
        fill_normal(weight, random, 0.02f);
        for (int64_t i = 0; i < weight.size(); i += 7) narrow(0.0f, &weight[i]);
        if (rows == 33) {  // zeros, tiny, infinite, NaN and huge groups
          for (int64_t i = 0; i < group; ++i) narrow(0.0f, &weight[i]), narrow(1e-37f, &weight[stride + i]);
          narrow(INFINITY, &weight[2 * stride]), narrow(NAN, &weight[3 * stride + 1]), narrow(3e38f, &weight[4 * stride + group]);
        }
        const Result<T> expected = quantized(Isa::scalar, weight, rows, width, stride, group, 1);
        for (const Isa isa : usable_isas()) {
          for (const int threads : {1, 2, 4}) {
            const Result<T> result = quantized(isa, weight, rows, width, stride, group, threads);
            CHECK(result.packed == expected.packed);
            CHECK(result.scales == expected.scales);
            const Result<T> alone = quantized(isa, weight, rows, width, stride, group, threads, false);
            CHECK(alone.packed == expected.packed);
            CHECK(alone.scales == expected.scales);
            for (int64_t i = 0; i < result.statistics.size(); ++i) {
              const float theirs = expected.statistics[i];
              CHECK(std::fabs(result.statistics[i] - theirs) <= 1e-5f * std::fabs(theirs));
            }
          }
        }
      }
    }
  }
}

TEST(quantize_bf16) { same_bits_everywhere<bf16>(3); }
TEST(quantize_float) { same_bits_everywhere<float>(3); }
// A vector of groups at a time, twice, and some that are left over.
TEST(quantize_many_groups_bf16) { same_bits_everywhere<bf16>(37); }
TEST(quantize_many_groups_float) { same_bits_everywhere<float>(37); }

TEST(quantize_every_amax) {
  const Exact<bf16> weight(int64_t{1 << 15} * 8);
  for (int64_t i = 0; i < 1 << 15; ++i) weight[8 * i + 3] = {static_cast<uint16_t>(i)};
  const Result<bf16> result = quantized(Isa::scalar, weight, 1 << 15, 8, 8, 8, 2);
  for (int i = smallest_amax; i <= largest_amax; ++i) {
    const double seventh = widen(bf16{static_cast<uint16_t>(i)}) / 7.0;
    CHECK(result.scales[i].bits == round_to_bf16(static_cast<float>(seventh)).bits);
    CHECK(((result.packed[i] >> 12) & 15) == 15);
  }
}

Exact<bf16> dequantized(Isa isa, const Exact<uint32_t>& packed, int64_t packed_stride, const Exact<bf16>& scales, int64_t scale_stride,
                        int64_t rows, int64_t width, int64_t group, int threads) {
  Exact<bf16> values(rows * width);
  quantize_for(isa).int4_dequantize({packed.data(), packed_stride, scales.data(), scale_stride, rows, width, group, values.data(), threads});
  return values;
}

// Every code with scales of all sizes, and scales that are no number; rows of words and of scales with gaps between them.
TEST(dequantize_everywhere) {
  std::mt19937 random(1);
  for (const int64_t group : {8, 16, 24, 32, 64, 160}) {
    for (const int64_t groups : {1, 3, 37}) {
      for (const int64_t rows : {0, 1, 5}) {
        for (const int64_t gap : {0, 3}) {
          const int64_t width = groups * group, packed_stride = width / 8 + gap, scale_stride = groups + gap;
          const Exact<uint32_t> packed(extent(rows, packed_stride, width / 8), gap);
          const Exact<bf16> scales(extent(rows, scale_stride, groups), gap);
          for (int64_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint32_t>(random());
          for (int64_t i = 0; i < scales.size(); ++i) scales[i] = {static_cast<uint16_t>(random())};
          const Exact<bf16> expected = dequantized(Isa::scalar, packed, packed_stride, scales, scale_stride, rows, width, group, 1);
          for (const Isa isa : usable_isas()) {
            for (const int threads : {1, 2, 4}) {
              const Exact<bf16> values = dequantized(isa, packed, packed_stride, scales, scale_stride, rows, width, group, threads);
              for (int64_t i = 0; i < values.size(); ++i) {
                const bool both_nan = std::isnan(widen(values[i])) && std::isnan(widen(expected[i]));
                CHECK(both_nan || values[i].bits == expected[i].bits);
              }
            }
          }
        }
      }
    }
  }
}

// Known words: the codes -8 .. 7 in order, and products that bfloat16 rounds (half to even, either way) or holds.
TEST(dequantize_meaning) {
  const Exact<uint32_t> packed(4);
  packed[0] = packed[2] = 0x76543210, packed[1] = packed[3] = 0xFEDCBA98;
  const Exact<bf16> scales(2);
  scales[0] = {0x3F81}, scales[1] = round_to_bf16(-2.0f);  // 1 + 2^-7, and a power of two
  for (const Isa isa : usable_isas()) {
    const Exact<bf16> values = dequantized(isa, packed, 2, scales, 1, 2, 16, 16, 1);
    for (int code = -8; code < 8; ++code) {
      const double exact = code * (1 + 0x1p-7), step = std::abs(code) < 2 ? 0x1p-7 : std::abs(code) < 4 ? 0x1p-6 : std::abs(code) < 8 ? 0x1p-5 : 0x1p-4;
      CHECK(widen(values[code + 8]) == std::nearbyint(exact / step) * step);
      CHECK(widen(values[16 + code + 8]) == -2.0f * static_cast<float>(code));
    }
  }
}

}  // namespace
}  // namespace glm5::tests
