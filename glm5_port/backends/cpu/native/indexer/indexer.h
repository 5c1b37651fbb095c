// The lightning indexer (glm5_port/operators/indexer.py): scores of cached keys for each token, the best of them, and both in one.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numbers.h"

namespace glm5 {

enum class KeyFormat : int { float32, bfloat16, fp8, int8 };

// Strides count elements. A row of keys is dense.
struct IndexCache {
  const void* keys;  // [pages, page_size, head_dim]
  KeyFormat format;
  int64_t page_stride, row_stride;
  const void* scales;  // [pages, page_size]: float for fp8, fp16 for int8, null for the others
  int64_t scale_page_stride, scale_row_stride;
  int64_t pages, page_size;
};

struct IndexerCall {
  const void* query;  // [tokens, heads, head_dim] float or bfloat16, heads dense
  bool query_is_bf16;
  int64_t query_token_stride, query_head_stride;
  const float* head_weights;  // [tokens, heads]
  int64_t weights_stride;
  IndexCache cache;
  const int32_t* block_table;  // [sequences, pages_of_sequence]
  int64_t table_stride, pages_of_sequence;
  const int32_t *query_starts, *lengths;  // [sequences + 1], [sequences]
  int64_t sequences, tokens, heads, head_dim;
  float* scores;     // [tokens, pages_of_sequence * page_size] of indexer_scores
  int32_t* indices;  // [tokens, top_k] of lightning_indexer
  int64_t top_k;
  int threads;
};

struct SelectCall {
  const void* scores;  // [rows, columns] float or bfloat16, rows dense
  bool is_bf16;
  int64_t rows, columns, stride;
  int32_t* indices;  // [rows, top_k]
  int64_t top_k;
  int threads;
};

struct IndexerKernels {
  void (*indexer_scores)(const IndexerCall& call);
  void (*lightning_indexer)(const IndexerCall& call);
  void (*select_top_k)(const SelectCall& call);
};
GLM5_MATRIX_KERNELS(IndexerKernels, indexer)

#if defined(__x86_64__)
// The kernels of AMX with the tile unit emulated, to test them where there is none.
namespace avx512_bf16 { extern const IndexerKernels indexer_by_emulated_tiles; }
#endif

namespace {

inline int64_t clamped(int64_t x, int64_t most) { return larger(0, smaller(x, most)); }
inline int64_t positions_of(const IndexerCall& call) { return call.pages_of_sequence * call.cache.page_size; }

// Tokens of one sequence that are computed together; token i lies at first_position + i.
struct Tile {
  int64_t sequence, first_token, tokens, first_position;
};

// How many positions token i of a tile sees.
inline int64_t visible(const IndexerCall& call, const Tile& tile, int64_t i) {
  return clamped(tile.first_position + i + 1, positions_of(call));
}

inline int64_t most_tiles(const IndexerCall& call, int64_t size) { return blocks_of(call.tokens, size) + call.sequences; }

// Cuts the tokens of each sequence into tiles of at most `size`; returns how many. Padding is in none.
inline int64_t cut_tiles(const IndexerCall& call, int64_t size, Tile* tiles) {
  int64_t count = 0;
  for (int64_t sequence = 0; sequence < call.sequences; ++sequence) {
    const int64_t first = clamped(call.query_starts[sequence], call.tokens);
    const int64_t end = clamped(call.query_starts[sequence + 1], call.tokens);
    for (int64_t token = first; token < end; token += size) {
      const int64_t position = call.lengths[sequence] - (end - token);
      tiles[count++] = {sequence, token, smaller(size, end - token), position};
    }
  }
  return count;
}

inline int64_t first_padding(const IndexerCall& call) { return clamped(call.query_starts[call.sequences], call.tokens); }

// Walks over the rows of a sequence's keys, from one position to the next.
class Rows {
 public:
  Rows(const IndexerCall& call, int64_t sequence, int64_t position)
      : cache_(call.cache), pages_(call.block_table + sequence * call.table_stride + position / call.cache.page_size),
        row_(position % call.cache.page_size) {
    static const int64_t sizes[] = {4, 2, 1, 1};
    size_ = sizes[static_cast<int>(cache_.format)];
    open();
  }
  const void* key() const { return static_cast<const char*>(cache_.keys) + (page_ * cache_.page_stride + row_ * cache_.row_stride) * size_; }
  // A factor of the whole key.
  float scale() const {
    const int64_t place = page_ * cache_.scale_page_stride + row_ * cache_.scale_row_stride;
    switch (cache_.format) {
      case KeyFormat::fp8: return static_cast<const float*>(cache_.scales)[place];
      case KeyFormat::int8: return widen(static_cast<const fp16*>(cache_.scales)[place]);
      default: return 1.0f;
    }
  }
  // Only to a position that exists: the next page is looked up.
  void advance() {
    if (++row_ == cache_.page_size) {
      row_ = 0;
      ++pages_;
      open();
    }
  }

 private:
  void open() { page_ = clamped(*pages_, cache_.pages - 1); }  // a page that is not there reads some row, as the definition does

  const IndexCache& cache_;
  const int32_t* pages_;
  int64_t row_, page_ = 0, size_;
};

}  // namespace
}  // namespace glm5
