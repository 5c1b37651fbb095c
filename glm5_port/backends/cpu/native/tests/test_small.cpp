#include "small/small.h"
#include "tests/harness.h"

namespace glm5::tests {
namespace {

// Whether two results are as near as floats in another order of sums are, and then rounded.
template <class T>
bool near(const Exact<T>& a, const Exact<T>& b) {
  const float step = sizeof(T) == 2 ? 0.01f : 1e-5f;
  for (int64_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(widen(a[i]) - widen(b[i])) <= step * (1 + std::fabs(widen(b[i]))))) return false;
  return true;
}

template <class T>
struct Normalised {
  Exact<T> y, sum;
};

template <class T>
Normalised<T> normalised(Isa isa, const Exact<T>& x, const Exact<T>& residual, const Exact<float>& weight, const Exact<float>& bias,
                         int64_t rows, int64_t width, int64_t stride, int64_t gap, int threads) {
  Normalised<T> result{Exact<T>(rows * width, gap), Exact<T>(rows * width, gap)};
  small_for(isa).norm({x.data(), sizeof(T) == 2, rows, width, stride, residual.size() ? residual.data() : nullptr, stride, result.sum.data(),
                       weight.data(), bias.size() ? bias.data() : nullptr, bias.size() > 0, 1e-5f, result.y.data(), threads});
  return result;
}

template <class T>
void norms() {
  std::mt19937 random(1);
  for (const int64_t width : {1, 7, 8, 16, 31, 129, 300}) {
    for (const int64_t rows : {0, 1, 5, 230}) {
      for (const int64_t gap : {0, 3}) {
        for (const int kind : {0, 1, 2}) {
          const int64_t stride = width + gap;
          const Exact<T> x(extent(rows, stride, width), gap), residual(kind == 1 ? x.size() : 0, gap);
          const Exact<float> weight(width, gap), bias(kind == 2 ? width : 0, gap);
          fill_normal(x, random), fill_normal(residual, random), fill_normal(weight, random), fill_normal(bias, random);
          const Normalised<T> expected = normalised(Isa::scalar, x, residual, weight, bias, rows, width, stride, gap, 1);
          for (const Isa isa : usable_isas()) {
            const Normalised<T> result = normalised(isa, x, residual, weight, bias, rows, width, stride, gap, 3);
            CHECK(near(result.y, expected.y) || (kind == 2 && width == 1));  // a centred row of one is nothing but rounding
            CHECK(result.sum == expected.sum);
          }
        }
      }
    }
  }
}

TEST(norm_bf16) { norms<bf16>(); }
TEST(norm_float) { norms<float>(); }

template <class T>
void rotations() {
  std::mt19937 random(2);
  for (const int64_t pairs : {1, 3, 8, 17, 32}) {
    for (const int64_t start : {0, 5}) {
      for (const int64_t gap : {0, 3}) {
        for (const bool interleaved : {false, true}) {
          const int64_t tokens = 70, heads = 3, width = start + 2 * pairs + gap, stride = width + gap;
          const Exact<T> x(extent(tokens * heads, stride, width), gap);
          const Exact<float> cosine(tokens * pairs), sine(tokens * pairs);
          fill_normal(x, random), fill_normal(cosine, random), fill_normal(sine, random);
          const auto turned = [&](Isa isa, int threads) {
            Exact<T> y(tokens * heads * width, gap);
            small_for(isa).rotate({x.data(), sizeof(T) == 2, tokens, heads, width, heads * stride, stride, cosine.data(), sine.data(), pairs,
                                   start, interleaved, y.data(), threads});
            return y;
          };
          const Exact<T> expected = turned(Isa::scalar, 1);
          for (const Isa isa : usable_isas()) CHECK(turned(isa, 3) == expected);
        }
      }
    }
  }
}

TEST(rotate_bf16) { rotations<bf16>(); }
TEST(rotate_float) { rotations<float>(); }

struct Routed {
  Exact<float> weights;
  Exact<int32_t> ids;
};

template <class T>
void routes() {
  std::mt19937 random(3);
  for (const int64_t width : {1, 9, 16, 77}) {
    for (const int64_t experts : {4, 12, 50, 100}) {
      for (const int64_t groups : {1, 2}) {
        const int64_t tokens = 37, gap = width % 2 * 3, stride = width + gap, top_k = 2;
        const Exact<T> hidden(extent(tokens, stride, width), gap), gate(extent(experts, stride, width), gap);
        const Exact<float> bias(experts, gap);
        fill_whole(hidden, random, 1), fill_whole(gate, random, 1), fill_whole(bias, random, 1);  // many equal scores
        const auto routed = [&](Isa isa, int threads) {
          Routed result{Exact<float>(tokens * top_k), Exact<int32_t>(tokens * top_k)};
          small_for(isa).route({hidden.data(), sizeof(T) == 2, tokens, width, stride, gate.data(), stride, experts, bias.data(), top_k, groups, 1,
                                true, 2.5f, result.weights.data(), result.ids.data(), threads});
          return result;
        };
        const Routed expected = routed(Isa::scalar, 1);
        for (const Isa isa : usable_isas()) {
          const Routed result = routed(isa, 3);
          CHECK(near(result.weights, expected.weights));
          if (width <= 16) CHECK(result.ids == expected.ids);  // wide ones saturate, where sigmoids differ in the last bit
        }
      }
    }
  }
}

TEST(route_bf16) { routes<bf16>(); }
TEST(route_float) { routes<float>(); }

}  // namespace
}  // namespace glm5::tests
