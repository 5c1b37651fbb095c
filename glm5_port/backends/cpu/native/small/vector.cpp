// The small kernels in vectors. A row, a head and a pair of token and expert each have one order of sums.
#include "parallel.h"
#include "small/small.h"
#include "vector_math.h"

namespace glm5 {
namespace {

constexpr int64_t elements_of_block = 1 << 15;  // less is not worth waking another thread

int64_t rows_of_block(int64_t width) { return larger(1, elements_of_block / larger(1, width)); }

// -- normalisation -----------------------------------------------------------------------------------------------------

// The sum over a row of what `term` makes of each vector, in eight running sums.
template <class Term>
float sum_of_row(const float* row, int64_t width, const Term& term) {
  constexpr int chains = 8;
  F32 sums[chains];
  for (F32& sum : sums) sum = F32::zero();
  int64_t i = 0;
  for (; i + chains * F32::width <= width; i += chains * F32::width) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) sums[c] = term(F32::load(row + i + c * F32::width), sums[c]);
  }
  for (; i + F32::width <= width; i += F32::width) sums[0] = term(F32::load(row + i), sums[0]);
  for (int step = chains / 2; step > 0; step /= 2) {
    for (int c = 0; c < step; ++c) sums[c] = sums[c] + sums[c + step];
  }
  float total = sums[0].sum();
  if (i < width) {
    float rest[F32::width] = {};
    term(load_first(row + i, width - i), F32::zero()).store(rest);
    for (int64_t lane = 0; lane < width - i; ++lane) total += rest[lane];
  }
  return total;
}

template <class T>
void norm_row(const NormCall& call, int64_t row, float* values) {
  const T* x = static_cast<const T*>(call.x) + row * call.stride;
  const T* residual = call.residual ? static_cast<const T*>(call.residual) + row * call.residual_stride : nullptr;
  T* total = static_cast<T*>(call.sum) + (residual ? row * call.width : 0);
  T* y = static_cast<T*>(call.y) + row * call.width;
  int64_t i = 0;
  for (; i + F32::width <= call.width; i += F32::width) {
    F32 value = F32::load(x + i);
    if (residual) {
      (value + F32::load(residual + i)).store(total + i);
      value = F32::load(total + i);
    }
    value.store(values + i);
  }
  for (; i < call.width; ++i) {
    values[i] = widen(x[i]);
    if (residual) {
      narrow(values[i] + widen(residual[i]), total + i);
      values[i] = widen(total[i]);
    }
  }
  const float count = static_cast<float>(call.width);
  const float mean = call.centred ? sum_of_row(values, call.width, [](F32 v, F32 sum) { return sum + v; }) / count : 0.0f;
  const F32 middle = F32::broadcast(mean);
  const float square = sum_of_row(values, call.width, [middle](F32 v, F32 sum) { return multiply_add(v - middle, v - middle, sum); });
  const float scale = 1.0f / __builtin_sqrtf(square / count + call.eps);
  const F32 scales = F32::broadcast(scale);
  for (i = 0; i + F32::width <= call.width; i += F32::width) {
    F32 normal = (F32::load(values + i) - middle) * scales * F32::load(call.weight + i);
    if (call.bias) normal = normal + F32::load(call.bias + i);
    normal.store(y + i);
  }
  for (; i < call.width; ++i) {
    const float normal = (values[i] - mean) * scale * call.weight[i];
    narrow(call.bias ? normal + call.bias[i] : normal, y + i);
  }
}

void norm(const NormCall& call) {
  const int64_t size = rows_of_block(call.width);
  parallel_for(call.threads, blocks_of(call.rows, size), [&](int64_t block) {
    const Buffer<float> values(call.width);
    for (int64_t row = block * size; row < smaller((block + 1) * size, call.rows); ++row) {
      call.is_bf16 ? norm_row<bf16>(call, row, values) : norm_row<float>(call, row, values);
    }
  });
}

// -- rotation ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline F32 neighbours(F32 a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
#else
inline F32 neighbours(F32 a) { return {_mm256_permute_ps(a.v, 0xB1)}; }
#endif

// y = x * factors + partners * cross over `count` channels, where `partner` holds the other members of the pairs; null: the
// neighbours of x.
template <class T>
void turn(const T* x, const T* partner, const float* factors, const float* cross, int64_t count, T* y) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) {
    const F32 own = F32::load(x + i), other = partner ? F32::load(partner + i) : neighbours(own);
    (own * F32::load(factors + i) + other * F32::load(cross + i)).store(y + i);
  }
  for (; i < count; ++i) narrow(widen(x[i]) * factors[i] + widen(partner ? partner[i] : x[i ^ 1]) * cross[i], y + i);
}

// Factors of each channel, in the order in which channels are turned: its own, and that of its partner.
void spread_angles(const RotateCall& call, int64_t token, float* factors, float* cross) {
  for (int64_t pair = 0; pair < call.pairs; ++pair) {
    const float cosine = call.cosine[token * call.pairs + pair], sine = call.sine[token * call.pairs + pair];
    const int64_t first = call.interleaved ? 2 * pair : pair, second = call.interleaved ? first + 1 : first + call.pairs;
    factors[first] = factors[second] = cosine;
    cross[first] = -sine;
    cross[second] = sine;
  }
}

template <class T>
void rotate_head(const RotateCall& call, const T* x, const float* factors, const float* cross, T* y) {
  const int64_t end = call.start + 2 * call.pairs;
  std::memcpy(y, x, call.start * sizeof(T));
  std::memcpy(y + end, x + end, (call.width - end) * sizeof(T));
  x += call.start;
  y += call.start;
  if (call.interleaved) return turn<T>(x, nullptr, factors, cross, 2 * call.pairs, y);
  turn(x, x + call.pairs, factors, cross, call.pairs, y);
  turn(x + call.pairs, x, factors + call.pairs, cross + call.pairs, call.pairs, y + call.pairs);
}

template <class T>
void rotate_tokens(const RotateCall& call, int64_t first, int64_t end) {
  const Buffer<float> factors(2 * call.pairs), cross(2 * call.pairs);
  for (int64_t token = first; token < end; ++token) {
    spread_angles(call, token, factors, cross);
    for (int64_t head = 0; head < call.heads; ++head) {
      const T* x = static_cast<const T*>(call.x) + token * call.token_stride + head * call.head_stride;
      rotate_head(call, x, factors, cross, static_cast<T*>(call.y) + (token * call.heads + head) * call.width);
    }
  }
}

void rotate(const RotateCall& call) {
  const int64_t size = rows_of_block(call.heads * call.width);
  parallel_for(call.threads, blocks_of(call.tokens, size), [&](int64_t block) {
    const int64_t first = block * size, end = smaller(first + size, call.tokens);
    call.is_bf16 ? rotate_tokens<bf16>(call, first, end) : rotate_tokens<float>(call, first, end);
  });
}

// -- the choice of experts ---------------------------------------------------------------------------------------------

constexpr int64_t tokens_together = 4, experts_together = F32::width == 16 ? 6 : 3;
constexpr int64_t experts_of_item = 48, tokens_of_item = 32;

// Dot products of some tokens and some experts, each in its own running sum.
template <int tokens, int experts, class T>
void dots(const RouteCall& call, const T* hidden, const T* gate, float* logits) {
  F32 sums[tokens][experts];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int e = 0; e < experts; ++e) sums[t][e] = F32::zero();
  }
  const auto step = [&](const auto& load) {
    F32 x[tokens];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) x[t] = load(hidden + t * call.stride);
#pragma GCC unroll 8
    for (int e = 0; e < experts; ++e) {
      const F32 weight = load(gate + e * call.gate_stride);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) sums[t][e] = multiply_add(x[t], weight, sums[t][e]);
    }
  };
  int64_t i = 0;
  for (; i + F32::width <= call.width; i += F32::width) step([i](const T* row) { return F32::load(row + i); });
  if (i < call.width) step([&](const T* row) { return load_first(row + i, call.width - i); });
  for (int t = 0; t < tokens; ++t) {
    for (int e = 0; e < experts; ++e) logits[t * call.experts + e] = sums[t][e].sum();
  }
}

template <int tokens, class T>
void dots_of_tokens(const RouteCall& call, const T* hidden, int64_t first, int64_t end, float* logits) {
  const T* gate = static_cast<const T*>(call.gate);
  int64_t e = first;
  for (; e + experts_together <= end; e += experts_together) {
    dots<tokens, experts_together>(call, hidden, gate + e * call.gate_stride, logits + e);
  }
  for (; e < end; ++e) dots<tokens, 1>(call, hidden, gate + e * call.gate_stride, logits + e);
}

template <class T>
void fill_logits(const RouteCall& call, int64_t first_token, int64_t end_token, int64_t first, int64_t end, float* logits) {
  const auto row = [&](int64_t token) { return static_cast<const T*>(call.hidden) + token * call.stride; };
  int64_t token = first_token;
  for (; token + tokens_together <= end_token; token += tokens_together) {
    dots_of_tokens<tokens_together>(call, row(token), first, end, logits + token * call.experts);
  }
  for (; token < end_token; ++token) dots_of_tokens<1>(call, row(token), first, end, logits + token * call.experts);
}

void route(const RouteCall& call) {
  const Buffer<float> logits(call.tokens * call.experts + F32::width);
  const int64_t token_blocks = blocks_of(call.tokens, tokens_of_item), expert_blocks = blocks_of(call.experts, experts_of_item);
  parallel_for(call.threads, token_blocks * expert_blocks, [&](int64_t item) {
    const int64_t token = item / expert_blocks * tokens_of_item, expert = item % expert_blocks * experts_of_item;
    const int64_t end_token = smaller(token + tokens_of_item, call.tokens), end = smaller(expert + experts_of_item, call.experts);
    call.is_bf16 ? fill_logits<bf16>(call, token, end_token, expert, end, logits)
                 : fill_logits<float>(call, token, end_token, expert, end, logits);
  });
  parallel_for(call.threads, token_blocks, [&](int64_t block) {
    const Chooser chooser(call);
    const Buffer<float> scores(call.experts + F32::width);
    const F32 one = F32::broadcast(1.0f);
    for (int64_t token = block * tokens_of_item; token < smaller((block + 1) * tokens_of_item, call.tokens); ++token) {
      const float* row = logits + token * call.experts;
      int64_t i = 0;
      for (; i + F32::width <= call.experts; i += F32::width) (one / (one + exponential(-F32::load(row + i)))).store(scores + i);
      if (i < call.experts) (one / (one + exponential(-load_first(row + i, call.experts - i)))).store(scores + i);
      chooser.choose(scores, call.weights + token * call.top_k, call.ids + token * call.top_k);
    }
  });
}

}  // namespace

namespace GLM5_ISA {
const SmallKernels small = {norm, rotate, route};
}
}  // namespace glm5
