#include "matmul/matmul.h"
#include "tests/harness.h"

namespace glm5::tests {
namespace {

using Random = std::mt19937;

template <class T>
float largest(const Exact<T>& values) {
  float most = 0;
  for (int64_t i = 0; i < values.size(); ++i) most = std::fmax(most, std::fabs(widen(values[i])));
  return most;
}

// Equal numbers, or within `share` of the largest and, beside it, of the rounding to T.
template <class T>
bool close(const Exact<T>& a, const Exact<T>& b, float share) {
  const float allowed = share * largest(b), step = sizeof(T) == 2 && share > 0 ? 1.0f / 128 : 0;
  for (int64_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(widen(a[i]) - widen(b[i])) <= allowed + step * std::fabs(widen(b[i])))) return false;
  return a.size() == b.size();
}

// What float sums in another order, and activations between two products that are rounded to bfloat16 elsewhere, may differ by.
constexpr float of_sums = 2e-5f;
template <class T>
constexpr float of_chains = sizeof(T) == 2 ? 0.02f : 1e-4f;

// The kernels of this machine's instruction sets, the specification first, and those of AMX over an emulated tile unit.
std::vector<const MatmulKernels*> usable_kernels() {
  std::vector<const MatmulKernels*> found;
  for (const Isa isa : usable_isas()) {
    found.push_back(&matmul_for(isa));
#if defined(__x86_64__)
    if (isa == Isa::avx512_bf16) found.push_back(&avx512_bf16::matmul_by_emulated_tiles);
#endif
  }
  return found;
}

// Where bytes are multiplied exactly, tiles give the bits of vectors. `run(kernels)` is what they compute.
template <class Run>
void compare_tiles(const Run& run) {
#if defined(__x86_64__)
  if (isa_missing(Isa::avx512_bf16)[0] != 0) return;
  CHECK(run(avx512_bf16::matmul_by_emulated_tiles) == run(avx512::matmul));
  if (isa_missing(Isa::amx)[0] == 0) CHECK(run(amx::matmul) == run(avx512::matmul));
#endif
}

// -- weights -----------------------------------------------------------------------------------------------------------

// Canonical words and scales of `matrices` INT4 matrices, and their panels; the codes are in reach of the tests.
struct Int4 {
  Int4(int64_t matrices, int64_t rows_, int64_t width_, int64_t group_, bool whole, Random& random)
      : rows(rows_), width(width_), group(group_), packed(matrices * rows * width / 2), scales(matrices * rows * (width / group)),
        panel_codes(matrices * matrix_codes(), 1), panel_scales(matrices * matrix_scales(), 1) {
    std::normal_distribution<float> normal(0, 0.02f);
    for (int64_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = round_to_bf16(whole ? std::ldexp(1.0f, static_cast<int>(random() % 3) - 1) : normal(random));
    fill(matrices);
  }
  void fill(int64_t matrices) const {
    for (int64_t i = 0; i < matrices; ++i)
      fill_panels(&packed[i * rows * width / 2], &scales[i * rows * (width / group)], width / 2, width / group, weight(i), 0, shape().panels());
  }
  Shape shape() const { return {rows, width, group}; }
  int64_t matrix_codes() const { return shape().panels() * shape().units() * unit_bytes; }
  int64_t matrix_scales() const { return shape().panels() * shape().groups() * panel_rows; }
  // Every `step`th matrix from `first` on is that of an expert.
  Int4Weight weight(int64_t first = 0, int64_t step = 1) const {
    return {shape(), panel_codes.data() + first * matrix_codes(), panel_scales.data() + first * matrix_scales(), step * matrix_codes(), step * matrix_scales()};
  }
  void set(int64_t matrix, int64_t row, int64_t input, int code) const {
    uint8_t& byte = packed[((matrix * rows + row) * width + input) / 2];
    byte = static_cast<uint8_t>(input % 2 ? (byte & 15) | (code + 8) << 4 : (byte & 240) | (code + 8));
  }
  int code(int64_t row, int64_t input) const { return (packed[(row * width + input) / 2] >> (4 * (input % 2)) & 15) - 8; }

  int64_t rows, width, group;
  Exact<uint8_t> packed;
  Exact<bf16> scales;
  Exact<uint8_t> panel_codes;
  Exact<bf16> panel_scales;
};

// -- one matrix ----------------------------------------------------------------------------------------------------------

template <class T>
using Multiply = std::function<void(const MatmulKernels& kernels, const T* x, int64_t rows, int64_t stride, T* y, int threads)>;

// Every instruction set against the specification (`share` 0: the same numbers), with the same bits on any number of threads and
// for a row alone.
template <class T>
void compare(const Exact<T>& x, int64_t rows, int64_t stride, int64_t outputs, float share, const Multiply<T>& multiply) {
  const MatmulKernels* const specification = &matmul_for(Isa::scalar);
  const auto result_of = [&](const MatmulKernels* kernels, int threads) {
    Exact<T> y(rows * outputs);
    multiply(*kernels, x.data(), rows, stride, y.data(), threads);
    return y;
  };
  const Exact<T> expected = result_of(specification, 2);
  for (const MatmulKernels* kernels : usable_kernels()) {
    const Exact<T> result = result_of(kernels, 1);
    CHECK(close(result, expected, kernels == specification ? 0 : share));
    for (const int threads : {2, 3, 4})
      if (kernels != specification) CHECK(result_of(kernels, threads) == result);
    for (const int64_t row : {int64_t{0}, rows - 1}) {
      if (rows == 0) continue;
      const Exact<T> alone(outputs);
      multiply(*kernels, x.data() + row * stride, 1, stride, alone.data(), 1);
      CHECK(std::memcmp(alone.data(), &result[row * outputs], outputs * sizeof(T)) == 0);
    }
  }
}

template <class T>
void int4(int64_t rows, int64_t outputs, int64_t width, int64_t group, bool whole, Random& random) {
  const int64_t stride = width + rows % 3;
  const Int4 weight(1, outputs, width, group, whole, random);
  const Exact<T> x(extent(rows, stride, width), rows % 2);
  whole ? fill_whole(x, random, 2) : fill_normal(x, random);
  compare<T>(x, rows, stride, outputs, whole ? 0 : of_sums, [&](const MatmulKernels& kernels, const T* from, int64_t count, int64_t step, T* y, int threads) {
    kernels.int4_matmul({from, sizeof(T) == 2, count, step, weight.weight(), y, threads});
  });
}

template <class T>
void int4_everywhere() {
  Random random(1);
  for (const int64_t group : {8, 16, 24, 32, 40, 64, 96, 160})
    for (const int64_t groups : {1, 2, 3})
      for (const int64_t rows : {1, 5}) int4<T>(rows, 19, groups * group, group, true, random);
  for (const int64_t outputs : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) int4<T>(3, outputs, 96, 32, true, random);
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19}) int4<T>(rows, 40, 64, 32, true, random);
  for (const int64_t width : {224, 256, 288, 480, 512, 544, 1120}) int4<T>(2, 17, width, 32, true, random);  // pieces of decoded weights
  int4<T>(259, 70, 64, 32, true, random);                                                                    // blocks of rows, and threads
  for (const int64_t rows : {1, 4, 9}) int4<T>(rows, 300, 288, 96, false, random);
}

TEST(matmul_int4_bf16) { int4_everywhere<bf16>(); }
TEST(matmul_int4_float) { int4_everywhere<float>(); }

// Rows that are zero but for a one give the weights themselves.
TEST(matmul_int4_meaning) {
  Random random(2);
  for (const int64_t group : {8, 24, 40}) {
    const int64_t width = 2 * group, outputs = 18;
    const Int4 weight(1, outputs, width, group, false, random);
    const Exact<float> x(width * width), y(width * outputs);
    for (int64_t i = 0; i < width; ++i) x[i * width + i] = 1;
    for (const Isa isa : usable_isas()) {
      matmul_for(isa).int4_matmul({x.data(), false, width, width, weight.weight(), y.data(), 2});
      for (int64_t i = 0; i < width; ++i)
        for (int64_t row = 0; row < outputs; ++row)
          CHECK(y[i * outputs + row] == widen(round_to_bf16(static_cast<float>(weight.code(row, i)) * widen(weight.scales[row * 2 + i / group]))));
    }
  }
}

template <class T>
void dense(int64_t rows, int64_t outputs, int64_t width, bool whole, Random& random) {
  const int64_t stride = width + rows % 3, weight_stride = width + outputs % 3;
  const Exact<T> x(extent(rows, stride, width), rows % 2), weight(extent(outputs, weight_stride, width), 1);
  whole ? fill_whole(x, random, 3) : fill_normal(x, random);
  whole ? fill_whole(weight, random, 3) : fill_normal(weight, random, 0.05f);
  const int64_t size = sizeof(T);
  const DenseWeight made = {{outputs, width, width}, reinterpret_cast<const uint8_t*>(weight.data()), size, weight_stride * size};
  compare<T>(x, rows, stride, outputs, whole ? 0 : of_sums, [&](const MatmulKernels& kernels, const T* from, int64_t count, int64_t step, T* y, int threads) {
    kernels.linear({from, sizeof(T) == 2, count, step, made, y, threads});
  });
}

template <class T>
void dense_everywhere() {
  Random random(3);
  for (const int64_t width : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 511, 513, 1030})
    for (const int64_t rows : {1, 5}) dense<T>(rows, 19, width, true, random);
  for (const int64_t outputs : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) dense<T>(3, outputs, 40, true, random);
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19}) dense<T>(rows, 40, 33, true, random);
  dense<T>(259, 70, 40, true, random);
  for (const int64_t rows : {1, 4, 9}) dense<T>(rows, 300, 290, false, random);
}

TEST(matmul_dense_bf16) { dense_everywhere<bf16>(); }
TEST(matmul_dense_float) { dense_everywhere<float>(); }

// With a largest magnitude of 127 the codes are the activations, and everything is exact.
template <class T>
void int8(int64_t rows, int64_t outputs, int64_t width, bool whole, Random& random) {
  const int64_t stride = width + rows % 3, row_bytes = width + outputs % 3;
  const Exact<T> x(extent(rows, stride, width), rows % 2);
  const Exact<int8_t> codes(extent(outputs, row_bytes, width), 1);
  const Exact<float> scales(outputs, 1);
  whole ? fill_whole(x, random, 127) : fill_normal(x, random);
  for (int64_t row = 0; whole && row < rows; ++row) narrow(row % 2 ? 127.0f : -127.0f, &x[row * stride + row % width]);
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i % 50 == 0 ? -128 : random());
  for (int64_t i = 0; i < outputs; ++i) scales[i] = whole ? std::ldexp(1.0f, static_cast<int>(i % 5) - 2) : 0.013f * static_cast<float>(i + 1);
  const Int8Weight made = {{outputs, width, width}, codes.data(), row_bytes, scales.data()};
  compare<T>(x, rows, stride, outputs, whole ? 0 : 0.005f, [&](const MatmulKernels& kernels, const T* from, int64_t count, int64_t step, T* y, int threads) {
    kernels.int8_matmul({from, sizeof(T) == 2, count, step, made, y, threads});
  });
  compare_tiles([&](const MatmulKernels& kernels) {
    Exact<T> y(rows * outputs);
    kernels.int8_matmul({x.data(), sizeof(T) == 2, rows, stride, made, y.data(), 2});
    return y;
  });
}

template <class T>
void int8_everywhere() {
  Random random(4);
  for (const int64_t width : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 513})
    for (const int64_t rows : {1, 5}) int8<T>(rows, 19, width, true, random);
  for (const int64_t outputs : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) int8<T>(3, outputs, 40, true, random);
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19}) int8<T>(rows, 40, 33, true, random);
  int8<T>(259, 70, 40, true, random);
  for (const int64_t width : {1, 4, 63, 64, 65, 130, 511, 512, 513, 1100})  // tiles, and chunks of them
    for (const int64_t rows : {9, 16, 17, 33}) int8<T>(rows, 17 + rows, width, rows % 2, random);
  for (const int64_t rows : {1, 4, 9}) int8<T>(rows, 300, 290, false, random);
}

TEST(matmul_int8_bf16) { int8_everywhere<bf16>(); }
TEST(matmul_int8_float) { int8_everywhere<float>(); }

// Rows that 8 bits cannot hold: NaN and infinity make a row of NaN, and of no other; zeros give zeros.
TEST(matmul_int8_not_finite) {
  Random random(5);
  const int64_t width = 70, outputs = 9;
  const Exact<float> x(4 * width), y(4 * outputs), scales(outputs);
  const Exact<int8_t> codes(outputs * width);
  fill_normal(x, random);
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(random());
  for (int64_t i = 0; i < outputs; ++i) scales[i] = 1;
  x[69] = NAN, x[width] = INFINITY;
  for (int64_t i = 0; i < width; ++i) x[2 * width + i] = 0;
  for (const Isa isa : usable_isas()) {
    matmul_for(isa).int8_matmul({x.data(), false, 4, width, {{outputs, width, width}, codes.data(), width, scales.data()}, y.data(), 1});
    for (int64_t i = 0; i < 4 * outputs; ++i) CHECK(i < 2 * outputs ? std::isnan(y[i]) : i < 3 * outputs ? y[i] == 0 : std::isfinite(y[i]));
  }
}

// -- experts -------------------------------------------------------------------------------------------------------------

// Choices of experts whose loads are very unequal; some ids are of no expert here.
struct Routes {
  Routes(int64_t tokens_, int64_t choices_, int64_t experts_, Random& random)
      : tokens(tokens_), choices(choices_), experts(experts_), ids(tokens * choices, 1), weights(tokens * choices, 1) {
    for (int64_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int32_t>(random() % 3 ? 0 : static_cast<int64_t>(random() % (experts + 2)) - 1);
      weights[i] = 0.25f * static_cast<float>(1 + random() % 4);
    }
  }
  int64_t tokens, choices, experts;
  Exact<int32_t> ids;
  Exact<float> weights;
};

// Gates of whole numbers are powers of two so large that silu(x) = x in float, and what they multiply fits the eight bits of bfloat16:
// everything is exact but for int8 activations.
template <class T>
void fill_hidden(const Exact<T>& hidden, int64_t stride, bool whole, Random& random) {
  whole ? fill_whole(hidden, random, 1) : fill_normal(hidden, random);
  for (int64_t i = 0; whole && i < hidden.size(); i += stride) narrow(1.0f, &hidden[i]);
}

template <class T, class Run>
void compare_experts(const Routes& routes, int64_t width, float share, const Run& run) {
  const MatmulKernels* const specification = &matmul_for(Isa::scalar);
  const auto result_of = [&](const MatmulKernels* kernels, int threads) {
    Exact<T> y(routes.tokens * width);
    run(*kernels, y.data(), threads);
    return y;
  };
  const Exact<T> expected = result_of(specification, 2);
  for (const MatmulKernels* kernels : usable_kernels()) {
    const Exact<T> result = result_of(kernels, 1);
    CHECK(close(result, expected, share));
    for (const int threads : {2, 3, 4})
      if (kernels != specification) CHECK(result_of(kernels, threads) == result);
  }
}

template <class T>
void int4_experts(const Routes& routes, int64_t width, int64_t between, int64_t group, bool whole, Random& random) {
  const int64_t experts = routes.experts, stride = width + routes.tokens % 3;
  const Int4 gate_up(2 * experts, between, width, group < 0 ? width : group, whole, random);
  const Int4 down(experts, width, between, group < 0 ? between : group, whole, random);
  for (int64_t row = 0; whole && row < experts * between; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      gate_up.set(row / between * 2, row % between, i, i == 0 ? 4 : 0);
      gate_up.set(row / between * 2 + 1, row % between, i, static_cast<int>(random() % 4) - 2);
    }
  }
  for (int64_t i = 0; whole && i < gate_up.scales.size(); ++i) gate_up.scales[i] = round_to_bf16(i % 2 ? 8.0f : 16.0f);
  gate_up.fill(2 * experts);
  const Exact<T> hidden(extent(routes.tokens, stride, width), 1);
  fill_hidden(hidden, stride, whole, random);
  const auto call = [&](T* y, int threads, bool activation_groups = false) {
    return ExpertsCall<Int4Weight>{hidden.data(), sizeof(T) == 2, routes.tokens, stride, routes.weights.data(), routes.ids.data(), routes.choices,
                                   experts, gate_up.weight(0, 2), gate_up.weight(1, 2), down.weight(), y, threads, activation_groups};
  };
  compare_experts<T>(routes, width, whole ? 0 : of_chains<T>, [&](const MatmulKernels& kernels, T* y, int threads) { kernels.int4_experts(call(y, threads)); });
  for (const bool groups : {false, true})
    compare_experts<T>(routes, width, 0.03f, [&](const MatmulKernels& kernels, T* y, int threads) { kernels.int4_int8_experts(call(y, threads, groups)); });
  for (const bool groups : {false, true})
    compare_tiles([&](const MatmulKernels& kernels) {
      Exact<T> y(routes.tokens * width);
      kernels.int4_int8_experts(call(y.data(), 2, groups));
      return y;
    });
}

template <class T>
void dense_experts(const Routes& routes, int64_t width, int64_t between, bool whole, Random& random) {
  const int64_t experts = routes.experts, stride = width + routes.tokens % 3, size = sizeof(T), up_stride = width + 1, down_stride = between + 1;
  const Exact<T> gate_up(experts * 2 * between * up_stride, 1), down(experts * width * down_stride, 1), hidden(extent(routes.tokens, stride, width), 1);
  whole ? fill_whole(gate_up, random, 3) : fill_normal(gate_up, random, 0.1f);
  whole ? fill_whole(down, random, 3) : fill_normal(down, random, 0.1f);
  for (int64_t row = 0; whole && row < experts * between; ++row)
    for (int64_t i = 0; i < width; ++i) narrow(i == 0 ? 32.0f : 0.0f, &gate_up[(row / between * 2 * between + row % between) * up_stride + i]);
  fill_hidden(hidden, stride, whole, random);
  const auto weight = [&](const Exact<T>& all, int64_t first, int64_t rows, int64_t inputs, int64_t row_stride, int64_t of_expert) {
    return DenseWeight{{rows, inputs, inputs}, reinterpret_cast<const uint8_t*>(all.data() + first), size, row_stride * size, of_expert * row_stride * size};
  };
  const DenseWeight gate = weight(gate_up, 0, between, width, up_stride, 2 * between), up = weight(gate_up, between * up_stride, between, width, up_stride, 2 * between);
  compare_experts<T>(routes, width, whole ? 0 : of_chains<T>, [&](const MatmulKernels& kernels, T* y, int threads) {
    kernels.dense_experts({hidden.data(), sizeof(T) == 2, routes.tokens, stride, routes.weights.data(), routes.ids.data(), routes.choices, experts,
                                   gate, up, weight(down, 0, width, between, down_stride, width), y, threads});
  });
}

template <class T>
void experts_everywhere() {
  Random random(6);
  for (const int64_t tokens : {0, 1, 2, 7, 40}) {
    for (const int64_t choices : {1, 3}) {
      const Routes routes(tokens, choices, 5, random);
      for (const int64_t group : {-1, 8, 24}) int4_experts<T>(routes, 48, 72, group, true, random);
      dense_experts<T>(routes, 21, 35, true, random);
    }
  }
  int4_experts<T>(Routes(300, 2, 3, random), 32, 32, 32, true, random);  // blocks of rows, and threads
  dense_experts<T>(Routes(300, 2, 3, random), 20, 40, true, random);
  int4_experts<T>(Routes(9, 4, 6, random), 96, 64, 32, false, random);
  for (const int64_t group : {-1, 96, 288}) int4_experts<T>(Routes(9, 2, 2, random), 576, 288, group, false, random);  // pieces of groups, and chunks
  for (const int64_t group : {32, 64, 96}) int4_experts<T>(Routes(12, 2, 1, random), 192, 192, group, false, random);  // tiles of pieces
  dense_experts<T>(Routes(9, 4, 6, random), 90, 60, false, random);
}

TEST(matmul_experts_bf16) { experts_everywhere<bf16>(); }
TEST(matmul_experts_float) { experts_everywhere<float>(); }

}  // namespace
}  // namespace glm5::tests
