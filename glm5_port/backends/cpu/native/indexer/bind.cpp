#include "indexer/indexer.h"

#include "binding.h"

namespace glm5 {

void bind_indexer(nanobind::module_& module) {
  namespace nb = nanobind;
  nb::class_<IndexerCall>(module, "IndexerCall")
      .def("__init__", [](IndexerCall* call, Address query, bool query_is_bf16, int64_t query_token_stride, int64_t query_head_stride,
                          Address head_weights, int64_t weights_stride, Address keys, int format, int64_t page_stride, int64_t row_stride,
                          Address scales, int64_t scale_page_stride, int64_t scale_row_stride, int64_t pages, int64_t page_size,
                          Address block_table, int64_t table_stride, int64_t pages_of_sequence, Address query_starts, Address lengths,
                          int64_t sequences, int64_t tokens, int64_t heads, int64_t head_dim, int threads) {
        const IndexCache cache = {at<void>(keys), static_cast<KeyFormat>(format), page_stride, row_stride, at<void>(scales),
                                  scale_page_stride, scale_row_stride, pages, page_size};
        new (call) IndexerCall{at<void>(query), query_is_bf16, query_token_stride, query_head_stride, at<float>(head_weights),
                               weights_stride, cache, at<int32_t>(block_table), table_stride, pages_of_sequence,
                               at<int32_t>(query_starts), at<int32_t>(lengths), sequences, tokens, heads, head_dim,
                               nullptr, nullptr, 0, threads};
      });
  module.def(
      "indexer_scores",
      [](int isa, IndexerCall call, Address scores) {
        call.scores = at<float>(scores);
        indexer_for(static_cast<Isa>(isa)).indexer_scores(call);
      },
      released());
  module.def(
      "lightning_indexer",
      [](int isa, IndexerCall call, Address indices, int64_t top_k) {
        call.indices = at<int32_t>(indices);
        call.top_k = top_k;
        indexer_for(static_cast<Isa>(isa)).lightning_indexer(call);
      },
      released());
  module.def(
      "select_top_k",
      [](int isa, Address scores, bool is_bf16, int64_t rows, int64_t columns, int64_t stride, Address indices, int64_t top_k, int threads) {
        indexer_for(static_cast<Isa>(isa)).select_top_k(
            {at<void>(scores), is_bf16, rows, columns, stride, at<int32_t>(indices), top_k, threads});
      },
      released());
}

}  // namespace glm5
