#include <nanobind/stl/tuple.h>

#include <tuple>

#include "attention/attention.h"
#include "binding.h"

namespace glm5 {
namespace {

using QueriesIn = std::tuple<Address, int64_t, int64_t>;  // data, token_stride, head_stride
using FieldIn = std::tuple<Address, int64_t, int64_t>;  // data, page_stride, row_stride
using CacheIn = std::tuple<int, FieldIn, FieldIn, int64_t, int64_t, int64_t, int64_t>;  // as LatentCache
using BatchIn = std::tuple<Address, Address, Address, int64_t, int64_t, int64_t>;  // as Batch

Queries queries_of(const QueriesIn& in) {
  const auto [data, token_stride, head_stride] = in;
  return {at<void>(data), token_stride, head_stride};
}

CacheField field_of(const FieldIn& in) {
  const auto [data, page_stride, row_stride] = in;
  return {at<uint8_t>(data), page_stride, row_stride};
}

LatentCache cache_of(const CacheIn& in) {
  const auto& [format, latent, rope, pages, page_size, latent_width, rope_width] = in;
  return {static_cast<RowFormat>(format), field_of(latent), field_of(rope), pages, page_size, latent_width, rope_width};
}

Batch batch_of(const BatchIn& in) {
  const auto [starts, lengths, table, sequences, columns, stride] = in;
  return {at<int32_t>(starts), at<int32_t>(lengths), at<int32_t>(table), sequences, columns, stride};
}

}  // namespace

void bind_attention(nanobind::module_& module) {
  module.def(
      "attend",
      [](int isa, bool is_bf16, int64_t tokens, int64_t heads, const QueriesIn& query, const QueriesIn& query_rope,
         const CacheIn& cache, const BatchIn& batch, Address indices, int64_t index_count, int64_t index_stride, float scale,
         Address out, int threads) {
        attention_for(static_cast<Isa>(isa))
            .attend({queries_of(query), queries_of(query_rope), is_bf16, tokens, heads, cache_of(cache), batch_of(batch),
                     at<int32_t>(indices), index_count, index_stride, scale, at<void>(out), threads});
      },
      released());
  module.def(
      "attend_expanded",
      [](int isa, bool is_bf16, int64_t tokens, int64_t heads, const QueriesIn& query, const QueriesIn& query_rope,
         const CacheIn& cache, const BatchIn& batch, Address key_weight, Address value_weight, int64_t nope_width,
         int64_t value_width, float scale, Address out, int threads) {
        const AttentionCall attention = {queries_of(query),
                                         queries_of(query_rope),
                                         is_bf16,
                                         tokens,
                                         heads,
                                         cache_of(cache),
                                         batch_of(batch),
                                         nullptr,
                                         -1,
                                         0,
                                         scale,
                                         at<void>(out),
                                         threads};
        attention_for(static_cast<Isa>(isa))
            .attend_expanded({attention, at<void>(key_weight), at<void>(value_weight), nope_width, value_width});
      },
      released());
  module.def(
      "multiply_heads",
      [](int isa, bool is_bf16, const QueriesIn& x, int64_t tokens, int64_t heads, int64_t width_in, int64_t width_out,
         Address weight, int64_t weight_head_stride, int64_t weight_row_stride, Address y, int threads) {
        const Queries rows = queries_of(x);
        attention_for(static_cast<Isa>(isa))
            .multiply_heads({rows.data, rows.token_stride, rows.head_stride, is_bf16, tokens, heads, width_in, width_out,
                             at<void>(weight), weight_head_stride, weight_row_stride, at<void>(y), threads});
      },
      released());
}

}  // namespace glm5
