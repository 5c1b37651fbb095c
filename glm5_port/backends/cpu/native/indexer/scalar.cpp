// What the indexer means: score = sum over heads of weight * relu(query . key), all in float, of the keys up to a token's own
// position; the best are taken highest score first, then lowest position.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "indexer/indexer.h"
#include "parallel.h"

namespace glm5 {
namespace {

constexpr float nothing = -std::numeric_limits<float>::infinity();

float channel(const Rows& rows, KeyFormat format, int64_t c) {
  switch (format) {
    case KeyFormat::float32: return static_cast<const float*>(rows.key())[c];
    case KeyFormat::bfloat16: return widen(static_cast<const bf16*>(rows.key())[c]);
    case KeyFormat::fp8: return widen(static_cast<const e4m3*>(rows.key())[c]) * rows.scale();
    case KeyFormat::int8: return widen(static_cast<const int8_t*>(rows.key())[c]) * rows.scale();
  }
  return 0;
}

template <class T>
float score(const IndexerCall& call, int64_t token, const Rows& rows) {
  float total = 0;
  for (int64_t head = 0; head < call.heads; ++head) {
    const T* query = static_cast<const T*>(call.query) + token * call.query_token_stride + head * call.query_head_stride;
    float dot = 0;
    for (int64_t c = 0; c < call.head_dim; ++c) dot += widen(query[c]) * channel(rows, call.cache.format, c);
    const float rectified = dot < 0 ? 0 : dot;  // NaN stays
    total += call.head_weights[token * call.weights_stride + head] * rectified;
  }
  return total;
}

// The scores of a token, -inf where it does not see.
void score_token(const IndexerCall& call, const Tile& tile, float* scores) {
  const int64_t seen = visible(call, tile, 0);
  std::fill(scores + seen, scores + positions_of(call), nothing);
  if (seen == 0) return;
  Rows rows(call, tile.sequence, 0);
  for (int64_t position = 0; position < seen; ++position) {
    if (position > 0) rows.advance();
    scores[position] = call.query_is_bf16 ? score<bf16>(call, tile.first_token, rows) : score<float>(call, tile.first_token, rows);
  }
}

// Above every other in the order of selection: NaN is highest.
bool above(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

template <class T>
void select(const T* scores, int64_t columns, int64_t top_k, int32_t* indices) {
  std::vector<int32_t> positions;
  for (int64_t i = 0; i < columns; ++i) {
    if (widen(scores[i]) != nothing) positions.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(positions.begin(), positions.end(), [&](int32_t a, int32_t b) { return above(widen(scores[a]), widen(scores[b])); });
  positions.resize(std::min<size_t>(positions.size(), top_k));
  std::sort(positions.begin(), positions.end());
  std::copy(positions.begin(), positions.end(), indices);
  std::fill(indices + positions.size(), indices + top_k, -1);
}

void indexer_scores(const IndexerCall& call) {
  std::vector<Tile> tiles(most_tiles(call, 1));
  const int64_t positions = positions_of(call);
  std::fill(call.scores + first_padding(call) * positions, call.scores + call.tokens * positions, nothing);
  parallel_for(call.threads, cut_tiles(call, 1, tiles.data()), [&](int64_t i) {
    score_token(call, tiles[i], call.scores + tiles[i].first_token * positions);
  });
}

void lightning_indexer(const IndexerCall& call) {
  std::vector<Tile> tiles(most_tiles(call, 1));
  std::fill(call.indices + first_padding(call) * call.top_k, call.indices + call.tokens * call.top_k, -1);
  parallel_for(call.threads, cut_tiles(call, 1, tiles.data()), [&](int64_t i) {
    std::vector<float> scores(positions_of(call));
    score_token(call, tiles[i], scores.data());
    select(scores.data(), positions_of(call), call.top_k, call.indices + tiles[i].first_token * call.top_k);
  });
}

void select_top_k(const SelectCall& call) {
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    int32_t* indices = call.indices + row * call.top_k;
    call.is_bf16 ? select(static_cast<const bf16*>(call.scores) + row * call.stride, call.columns, call.top_k, indices)
                 : select(static_cast<const float*>(call.scores) + row * call.stride, call.columns, call.top_k, indices);
  });
}

}  // namespace

namespace scalar {
const IndexerKernels indexer = {indexer_scores, lightning_indexer, select_top_k};
}
}  // namespace glm5
