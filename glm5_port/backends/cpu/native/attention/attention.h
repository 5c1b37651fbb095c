// Attention over the latent cache (glm5_port/operators/mla.py, sparse_attention.py): selected rows, all rows, and all rows
// expanded to keys and values of each head. Rows of the cache are read in place, in every format (operators/cache_layouts.py).
//
// Shape legend: T tokens; H heads; C latent; R rope; K indices of a token; B sequences; N nope part of a head; V value part.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numbers.h"

namespace glm5 {

enum class RowFormat { float32, bfloat16, fp8, int8 };

// The 656-byte rows.
constexpr int64_t quantised_latent = 512, quantised_rope = 64, quantised_group = 128,
                  quantised_groups = quantised_latent / quantised_group;
constexpr int64_t quantised_row_bytes = quantised_latent + 4 * quantised_groups + 2 * quantised_rope;

// One tensor of a paged cache; strides in bytes, the numbers of a row side by side.
struct CacheField {
  const uint8_t* data;
  int64_t page_stride, row_stride;
};

struct LatentCache {
  RowFormat format;
  CacheField latent;  // or the whole row of a quantised format
  CacheField rope;  // of float32 and bfloat16 rows
  int64_t pages, page_size, latent_width, rope_width;
};

// Packed tokens; see docs/architecture.md, "Call conventions".
struct Batch {
  const int32_t* query_starts;  // [B + 1]
  const int32_t* lengths;  // [B]
  const int32_t* block_table;  // [B, columns], rows `table_stride` entries apart
  int64_t sequences, columns, table_stride;
};

// [T, H, width] float or bfloat16; strides in elements, the numbers of a head side by side.
struct Queries {
  const void* data;
  int64_t token_stride, head_stride;
};

struct AttentionCall {
  Queries query, query_rope;  // [T, H, C] and [T, H, R]
  bool is_bf16;  // dtype of queries, weights and result
  int64_t tokens, heads;
  LatentCache cache;
  Batch batch;
  const int32_t* indices;  // [T, K], rows `index_stride` entries apart
  int64_t index_count;  // K; -1: every key up to the token's own
  int64_t index_stride;
  float scale;
  void* out;  // [T, H, C] dense
  int threads;
};

struct ExpandedCall {
  AttentionCall attention;  // query is [T, H, N], out [T, H, V]; no indices
  const void* key_weight;  // [H, N, C] dense
  const void* value_weight;  // [H, V, C] dense
  int64_t nope_width, value_width;
};

// y[t, h] = weight[h] x[t, h].
struct HeadsCall {
  const void* x;  // [T, H, in] float or bfloat16; strides in elements, the numbers of a head side by side
  int64_t token_stride, head_stride;
  bool is_bf16;
  int64_t tokens, heads, width_in, width_out;
  const void* weight;  // [H, out, in], of the type of x; the numbers of a row side by side
  int64_t weight_head_stride, weight_row_stride;
  void* y;  // [T, H, out] dense
  int threads;
};

struct AttentionKernels {
  void (*attend)(const AttentionCall& call);
  void (*attend_expanded)(const ExpandedCall& call);
  void (*multiply_heads)(const HeadsCall& call);
};
GLM5_MATRIX_KERNELS(AttentionKernels, attention)

namespace {

// Where the parts of one cached row lie.
struct LatentRow {
  const uint8_t* latent;
  const uint8_t* rope;
  const uint8_t* scales;  // of the quantised formats
};

inline const uint8_t* row_of(const CacheField& field, int64_t page, int64_t row) {
  return field.data + page * field.page_stride + row * field.row_stride;
}

inline LatentRow row_at(const LatentCache& cache, const Batch& batch, int64_t sequence, int64_t position) {
  const int64_t row = position % cache.page_size;
  int64_t page = batch.block_table[sequence * batch.table_stride + position / cache.page_size];
  page = larger(0, smaller(page, cache.pages - 1));  // a page that does not exist is the caller's error, but no reason to crash
  const uint8_t* latent = row_of(cache.latent, page, row);
  switch (cache.format) {
    case RowFormat::fp8: return {latent, latent + quantised_latent + 4 * quantised_groups, latent + quantised_latent};
    case RowFormat::int8: return {latent, latent + quantised_latent, latent + quantised_latent + 2 * quantised_rope};
    default: return {latent, row_of(cache.rope, page, row), nullptr};
  }
}

inline float scale_of(const LatentRow& row, int64_t group) {
  float scale;
  std::memcpy(&scale, row.scales + 4 * group, sizeof scale);
  return scale;
}

// Sequence and position of a token; position -1 is padding.
struct Place {
  int64_t sequence, position;
};

inline Place place_of(const Batch& batch, int64_t token) {
  int64_t first = 0, last = batch.sequences;  // the sequence is the first whose tokens end beyond this one
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (batch.query_starts[middle + 1] > token) last = middle;
    else first = middle + 1;
  }
  if (first == batch.sequences) return {0, -1};
  return {first, batch.lengths[first] - batch.query_starts[first + 1] + token};
}

// How many positions of its sequence a token sees: those up to its own that the block table and the cache hold.
inline int64_t visible_keys(const AttentionCall& call, const Place& place) {
  const int64_t held = call.cache.pages ? call.batch.columns * call.cache.page_size : 0;
  return larger(0, smaller(place.position + 1, held));
}

}  // namespace
}  // namespace glm5
