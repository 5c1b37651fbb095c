// What attention means: every score, exponential and sum in double, one rounding at the end.
#include <cmath>

#include "attention/attention.h"
#include "parallel.h"

namespace glm5 {
namespace {

float number_at(const void* data, bool is_bf16, int64_t i) {
  return is_bf16 ? widen(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
}

void narrow_to(double x, void* data, bool is_bf16, int64_t i) {
  is_bf16 ? narrow(static_cast<float>(x), static_cast<bf16*>(data) + i)
          : narrow(static_cast<float>(x), static_cast<float*>(data) + i);
}

// Numbers of a row may lie at any byte.
template <class T>
float number_in(const uint8_t* row, int64_t i) {
  T x;
  std::memcpy(&x, row + i * sizeof(T), sizeof x);
  return widen(x);
}

// The latent, then the rope key, as float32: what a stored row stands for.
void read_row(const LatentCache& cache, const LatentRow& row, float* numbers) {
  for (int64_t c = 0; c < cache.latent_width; ++c) {
    switch (cache.format) {
      case RowFormat::float32: numbers[c] = number_in<float>(row.latent, c); break;
      case RowFormat::bfloat16: numbers[c] = number_in<bf16>(row.latent, c); break;
      case RowFormat::fp8: numbers[c] = number_in<e4m3>(row.latent, c) * scale_of(row, c / quantised_group); break;
      case RowFormat::int8: numbers[c] = number_in<int8_t>(row.latent, c) * scale_of(row, c / quantised_group); break;
    }
  }
  for (int64_t r = 0; r < cache.rope_width; ++r)
    numbers[cache.latent_width + r] =
        cache.format == RowFormat::float32 ? number_in<float>(row.rope, r) : number_in<bf16>(row.rope, r);
}

// Weights in place of scores; all zeros when there is nothing to weigh.
void softmax(double* scores, int64_t count) {
  double largest = -INFINITY, total = 0;
  for (int64_t u = 0; u < count; ++u) largest = scores[u] > largest ? scores[u] : largest;
  if (largest == -INFINITY) largest = 0;
  for (int64_t u = 0; u < count; ++u) total += scores[u] = std::exp(scores[u] - largest);
  for (int64_t u = 0; u < count; ++u) scores[u] /= total == 0 ? 1 : total;
}

// The positions that a token attends to.
int64_t positions_of(const AttentionCall& call, int64_t token, const Place& place, int64_t* positions) {
  const int64_t visible = visible_keys(call, place);
  int64_t count = 0;
  if (call.index_count < 0) {
    for (; count < visible; ++count) positions[count] = count;
    return count;
  }
  for (int64_t i = 0; i < call.index_count; ++i) {
    const int64_t position = call.indices[token * call.index_stride + i];
    if (position >= 0 && position < visible) positions[count++] = position;
  }
  return count;
}

double dot(const Queries& query, bool is_bf16, int64_t token, int64_t head, const float* key, int64_t width) {
  double sum = 0;
  const int64_t first = token * query.token_stride + head * query.head_stride;
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(number_at(query.data, is_bf16, first + i)) * key[i];
  return sum;
}

void attend_token(const AttentionCall& call, int64_t token) {
  const Place place = place_of(call.batch, token);
  const LatentCache& cache = call.cache;
  const int64_t most = call.index_count >= 0 ? call.index_count : visible_keys(call, place),
                width = cache.latent_width + cache.rope_width;
  const Buffer<int64_t> positions(most);
  const Buffer<float> rows(most * width);
  const Buffer<double> weights(most);
  const int64_t count = positions_of(call, token, place, positions);
  for (int64_t u = 0; u < count; ++u) read_row(cache, row_at(cache, call.batch, place.sequence, positions[u]), rows + u * width);
  for (int64_t head = 0; head < call.heads; ++head) {
    for (int64_t u = 0; u < count; ++u) {
      const float* row = rows + u * width;
      weights[u] = call.scale * (dot(call.query, call.is_bf16, token, head, row, cache.latent_width) +
                                 dot(call.query_rope, call.is_bf16, token, head, row + cache.latent_width, cache.rope_width));
    }
    softmax(weights, count);
    for (int64_t c = 0; c < cache.latent_width; ++c) {
      double sum = 0;
      for (int64_t u = 0; u < count; ++u) sum += weights[u] * rows[u * width + c];
      narrow_to(sum, call.out, call.is_bf16, (token * call.heads + head) * cache.latent_width + c);
    }
  }
}

void attend(const AttentionCall& call) {
  parallel_for(call.threads, call.tokens, [&](int64_t token) { attend_token(call, token); });
}

// rows[u] of `width` numbers from the latent of each key: weight [width, C] times latent.
void expand(const ExpandedCall& call, const void* weight, int64_t head, int64_t width, const float* latent, float* to) {
  const int64_t latent_width = call.attention.cache.latent_width;
  for (int64_t n = 0; n < width; ++n) {
    double sum = 0;
    for (int64_t c = 0; c < latent_width; ++c)
      sum += static_cast<double>(number_at(weight, call.attention.is_bf16, (head * width + n) * latent_width + c)) * latent[c];
    to[n] = static_cast<float>(sum);
  }
}

// One head against the keys of one sequence, each expanded once.
void attend_expanded_head(const ExpandedCall& given, int64_t sequence, int64_t head) {
  const AttentionCall& call = given.attention;
  const LatentCache& cache = call.cache;
  const int64_t first = call.batch.query_starts[sequence], last = smaller(call.batch.query_starts[sequence + 1], call.tokens);
  if (first >= last) return;
  const int64_t keys = visible_keys(call, place_of(call.batch, last - 1));
  const int64_t width = given.nope_width + cache.rope_width;
  const Buffer<float> row(cache.latent_width + cache.rope_width), key(keys * width), value(keys * given.value_width);
  const Buffer<double> weights(keys);
  for (int64_t u = 0; u < keys; ++u) {
    read_row(cache, row_at(cache, call.batch, sequence, u), row);
    expand(given, given.key_weight, head, given.nope_width, row, key + u * width);
    expand(given, given.value_weight, head, given.value_width, row, value + u * given.value_width);
    std::memcpy(key + u * width + given.nope_width, row + cache.latent_width, cache.rope_width * sizeof(float));
  }
  for (int64_t token = first; token < last; ++token) {
    const int64_t count = visible_keys(call, place_of(call.batch, token));
    for (int64_t u = 0; u < count; ++u)
      weights[u] =
          call.scale * (dot(call.query, call.is_bf16, token, head, key + u * width, given.nope_width) +
                        dot(call.query_rope, call.is_bf16, token, head, key + u * width + given.nope_width, cache.rope_width));
    softmax(weights, count);
    for (int64_t v = 0; v < given.value_width; ++v) {
      double sum = 0;
      for (int64_t u = 0; u < count; ++u) sum += weights[u] * value[u * given.value_width + v];
      narrow_to(sum, call.out, call.is_bf16, (token * call.heads + head) * given.value_width + v);
    }
  }
}

void attend_expanded(const ExpandedCall& given) {
  const AttentionCall& call = given.attention;
  const int64_t row = call.heads * given.value_width,
                placed = smaller(call.batch.query_starts[call.batch.sequences], call.tokens);
  for (int64_t i = placed * row; i < call.tokens * row; ++i) narrow_to(0, call.out, call.is_bf16, i);  // padding
  parallel_for(call.threads, call.batch.sequences * call.heads,
               [&](int64_t task) { attend_expanded_head(given, task / call.heads, task % call.heads); });
}

void multiply_heads(const HeadsCall& call) {
  parallel_for(call.threads, call.tokens * call.heads, [&](int64_t task) {
    const int64_t token = task / call.heads, head = task % call.heads;
    for (int64_t n = 0; n < call.width_out; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < call.width_in; ++k)
        sum += static_cast<double>(number_at(call.x, call.is_bf16, token * call.token_stride + head * call.head_stride + k)) *
               number_at(call.weight, call.is_bf16, head * call.weight_head_stride + n * call.weight_row_stride + k);
      narrow_to(sum, call.y, call.is_bf16, task * call.width_out + n);
    }
  });
}

}  // namespace

namespace scalar {
const AttentionKernels attention = {attend, attend_expanded, multiply_heads};
}
}  // namespace glm5
