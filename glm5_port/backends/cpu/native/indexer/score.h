// Scores of blocks of keys, and the walk over tokens and blocks. `Product` is how an instruction set multiplies:
//
//     Element                    what a product takes: one channel, or several
//     channels                   in one Element; rows are padded to `depth` Elements with zeros
//     keys                       rows that are multiplied together
//     direct(format)             whether rows of the cache can be read where they are
//     widen_query(from, count, to), widen_key(format, row, count, to)  make Elements of `count` channels, zeros behind them
//     multiply(query, rows, depth, next, dots)   dots[k][v] = sum over depth of query vector v * row k. Meanwhile it may ask
//                                for the cache's rows `next`, unless that is null. Rows that are not read where they are lie
//                                behind each other, in memory for all `keys` of them
//
// A score is computed in one order of sums, whatever is computed beside it. For files that are compiled for a vector instruction set.
#pragma once

#include "indexer/indexer.h"
#include "indexer/select.h"
#include "parallel.h"
#include "simd.h"

namespace glm5 {
namespace {

constexpr int64_t block_keys = 96;       // a multiple of every Product::keys and of vectors, and at most Candidates::chunk
constexpr int64_t tile_tokens = 8;       // that share a block of keys
constexpr int64_t least_keys = 8064;     // of a split, a multiple of block_keys: each split selects once
constexpr int64_t items_wanted = 64;     // tiles times splits: what threads share
constexpr int64_t heads_of_group = 2 * F32::width;

// The scores of one tile of tokens.
template <class Product>
class Scorer {
  using Element = typename Product::Element;

 public:
  Scorer(const IndexerCall& call, const Tile& tile)
      : call_(call), tile_(tile), depth_(blocks_of(call.head_dim, Product::channels * Product::round) * Product::round),
        groups_(blocks_of(call.heads, heads_of_group)), queries_(tile.tokens * groups_ * depth_ * heads_of_group),
        weights_(tile.tokens * groups_ * heads_of_group), used_(groups_ * heads_of_group), keys_(block_keys * depth_) {
    direct_ = Product::direct(call.cache.format) && call.head_dim == depth_ * Product::channels;
    for (int64_t head = 0; head < groups_ * heads_of_group; ++head) used_[head] = head < call.heads ? -1 : 0;
    for (int64_t token = 0; token < tile.tokens; ++token) take_token(token);
  }

  // Scores of the positions first .. first + count - 1 for every token, as far as it sees; count <= block_keys, and the last is
  // a position that some token sees.
  void score(int64_t first, int64_t count, float* scores, int64_t stride) {
    take_keys(first, count);
    for (int64_t token = 0; token < tile_.tokens; ++token) {
      const int64_t seen = clamped(visible(call_, tile_, token) - first, count);
      for (int64_t key = 0; key < seen; key += Product::keys) add_heads(token, key, token == 0 ? next_ + key : nullptr);
      for (int64_t key = 0; key < seen; key += F32::width) write_scores(key, seen, scores + token * stride + key);
    }
  }

 private:
  // [groups, depth, heads of a group]: what one step of a product takes lies together.
  void take_token(int64_t token) {
    const Buffer<Element> row(depth_);
    Element* queries = queries_ + token * groups_ * depth_ * heads_of_group;
    float* weights = weights_ + token * groups_ * heads_of_group;
    const float* given = call_.head_weights + (tile_.first_token + token) * call_.weights_stride;
    for (int64_t head = 0; head < groups_ * heads_of_group; ++head) {
      const bool there = head < call_.heads;
      weights[head] = there ? given[head] : 0.0f;
      const int64_t place = (tile_.first_token + token) * call_.query_token_stride + head * call_.query_head_stride;
      Product::widen_query(call_, place, there ? call_.head_dim : 0, depth_, row);
      Element* to = queries + head / heads_of_group * depth_ * heads_of_group + head % heads_of_group;
      for (int64_t i = 0; i < depth_; ++i) to[i * heads_of_group] = row[i];
    }
  }

  void take_keys(int64_t first, int64_t count) {
    Rows rows(call_, tile_.sequence, first);
    const int64_t held = visible(call_, tile_, tile_.tokens - 1) - first;
    for (int64_t key = 0; key < count + Product::keys; ++key) {
      if (key > 0 && key < held) rows.advance();
      if (key >= Product::keys) next_[key - Product::keys] = rows.key();
      if (key >= count) continue;
      scales_[key] = rows.scale();
      rows_[key] = static_cast<const Element*>(rows.key());
      if (!direct_) {
        Product::widen_key(call_.cache.format, rows.key(), call_.head_dim, depth_, keys_ + key * depth_);
        rows_[key] = keys_ + key * depth_;
      }
    }
    for (int64_t key = count; key % Product::keys; ++key) rows_[key] = rows_[count - 1];  // computed, and not used
  }

  // What the heads of each lane add to the scores of some keys.
  void add_heads(int64_t token, int64_t key, const void* const* next) {
    const Element* queries = queries_ + token * groups_ * depth_ * heads_of_group;
    const float* weights = weights_ + token * groups_ * heads_of_group;
    F32 totals[Product::keys];
#pragma GCC unroll 16
    for (int k = 0; k < Product::keys; ++k) totals[k] = F32::zero();
    for (int64_t group = 0; group < groups_; ++group) {
      F32 dots[Product::keys][2];
      product_.multiply(queries + group * depth_ * heads_of_group, rows_ + key, depth_, next, dots);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t head = group * heads_of_group + v * F32::width;
        const F32 weight = F32::load(weights + head);
        const I32 used = I32::load(used_ + head);  // heads that are not there count nothing, even where a key is infinite
#pragma GCC unroll 16
        for (int k = 0; k < Product::keys; ++k) {
          const F32 rectified = float_of(bits_of(maximum(F32::zero(), dots[k][v])) & used);  // in this order of arguments, NaN stays
          totals[k] = multiply_add(weight, rectified, totals[k]);
        }
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < Product::keys; ++k) totals[k].store(totals_[key + k]);
  }

  // The scores of a vector of keys, as far as they are seen: each is its lanes added up.
  void write_scores(int64_t key, int64_t seen, float* scores) const {
    F32 lanes[F32::width];
#pragma GCC unroll 16
    for (int k = 0; k < F32::width; ++k) lanes[k] = F32::load(totals_[key + k]);
    transpose(lanes);
#pragma GCC unroll 4
    for (int half = F32::width / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
    }
    const F32 sums = lanes[0] * F32::load(scales_ + key);
    if (key + F32::width <= seen) sums.store(scores);
    else store_first(sums, scores, seen - key);
  }

  const IndexerCall& call_;
  const Tile& tile_;
  Product product_;
  const int64_t depth_, groups_;
  bool direct_;
  const Buffer<Element> queries_;
  const Buffer<float> weights_;
  const Buffer<int32_t> used_;
  const Buffer<Element> keys_;
  const Element* rows_[block_keys + Product::keys];
  const void* next_[block_keys + Product::keys] = {};  // of each key, the row in the cache `Product::keys` after it
  float scales_[block_keys] = {};
  float totals_[block_keys][F32::width] = {};
};

// -- the walk ----------------------------------------------------------------------------------------------------------

// The work of a call: tiles of tokens, and splits of the keys where there are too few tiles to share. Scores and the selection do not
// depend on it.
struct Work {
  explicit Work(const IndexerCall& call) : tiles(most_tiles(call, tile_tokens)), count(cut_tiles(call, tile_tokens, tiles)) {
    for (int64_t i = 0; i < count; ++i) longest = larger(longest, visible(call, tiles[i], tiles[i].tokens - 1));
    const int64_t most = larger(1, longest / least_keys);
    const int64_t wanted = larger(1, smaller(most, blocks_of(items_wanted, larger(1, count))));
    length = larger(1, blocks_of(blocks_of(longest, wanted), block_keys)) * block_keys;
    splits = larger(1, blocks_of(longest, length));
  }
  const Buffer<Tile> tiles;
  const int64_t count;
  int64_t longest = 0, length, splits;
};

template <class Product>
void score_all(const IndexerCall& call) {
  const Work work(call);
  const int64_t positions = positions_of(call);
  const auto hide = [&](float* scores, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) scores[i] = -__builtin_inff();
  };
  hide(call.scores, first_padding(call) * positions, call.tokens * positions);
  parallel_for(call.threads, work.count * work.splits, [&](int64_t item) {
    const Tile& tile = work.tiles[item / work.splits];
    const int64_t split = item % work.splits, first = split * work.length;
    const int64_t end = smaller(first + work.length, visible(call, tile, tile.tokens - 1));
    float* scores = call.scores + tile.first_token * positions;
    if (first < end) {
      Scorer<Product> scorer(call, tile);
      for (int64_t key = first; key < end; key += block_keys) scorer.score(key, smaller(block_keys, end - key), scores + key, positions);
    }
    for (int64_t token = 0; token < tile.tokens; ++token) {
      const int64_t own_end = split + 1 == work.splits ? positions : smaller(first + work.length, positions);
      hide(scores + token * positions, larger(first, visible(call, tile, token)), own_end);
    }
  });
}

// What the splits of each token selected, for the selection among them.
struct Kept {
  Kept(int64_t tokens, int64_t splits, int64_t kept)
      : splits(splits), stride(kept + I32::width), orders(tokens * splits * stride), positions(tokens * splits * stride),
        counts(tokens * splits) {}
  void take(int64_t token, int64_t split, const Candidates& best) {
    const int64_t place = token * splits + split;
    counts[place] = best.count();
    std::memcpy(orders + place * stride, best.orders(), best.count() * sizeof(int32_t));
    std::memcpy(positions + place * stride, best.positions(), best.count() * sizeof(int32_t));
  }
  void offer(int64_t token, Candidates& best) const {
    for (int64_t place = token * splits; place < (token + 1) * splits; ++place) {
      best.offer(orders + place * stride, positions + place * stride, counts[place]);
    }
  }
  const int64_t splits, stride;
  const Buffer<int32_t> orders, positions;
  const Buffer<int64_t> counts;
};

// Offers the scores of one split to the candidates of each token of a tile.
template <class Product>
void offer_split(const IndexerCall& call, const Tile& tile, int64_t first, int64_t end, Candidates* best) {
  Scorer<Product> scorer(call, tile);
  float scores[tile_tokens * block_keys];
  for (int64_t key = first; key < end; key += block_keys) {
    const int64_t count = smaller(block_keys, end - key);
    scorer.score(key, count, scores, block_keys);
    for (int64_t token = 0; token < tile.tokens; ++token) {
      best[token].offer(scores + token * block_keys, key, clamped(visible(call, tile, token) - key, count));
    }
  }
}

template <class Product>
void index_all(const IndexerCall& call) {
  const Work work(call);
  const int64_t kept = smaller(call.top_k, larger(1, work.longest)), room = Candidates::room(kept);
  for (int64_t i = first_padding(call) * call.top_k; i < call.tokens * call.top_k; ++i) call.indices[i] = -1;
  Kept of_splits(work.splits > 1 ? call.tokens : 0, work.splits, kept);
  parallel_for(call.threads, work.count * work.splits, [&](int64_t item) {
    const Tile& tile = work.tiles[item / work.splits];
    const int64_t split = item % work.splits, first = split * work.length;
    const int64_t end = smaller(first + work.length, visible(call, tile, tile.tokens - 1));
    const Buffer<int32_t> memory(tile.tokens * room);
    Candidates best[tile_tokens];
    for (int64_t token = 0; token < tile.tokens; ++token) best[token].begin(memory + token * room, kept);
    if (first < end) offer_split<Product>(call, tile, first, end, best);
    for (int64_t token = 0; token < tile.tokens; ++token) {
      best[token].finish();
      if (work.splits > 1) {
        of_splits.take(tile.first_token + token, split, best[token]);
      } else {
        write_indices(best[token], call.top_k, call.indices + (tile.first_token + token) * call.top_k);
      }
    }
  });
  if (work.splits == 1) return;
  parallel_for(call.threads, first_padding(call), [&](int64_t token) {
    const Buffer<int32_t> memory(room);
    Candidates best;
    best.begin(memory, kept);
    of_splits.offer(token, best);
    best.finish();
    write_indices(best, call.top_k, call.indices + token * call.top_k);
  });
}

}  // namespace
}  // namespace glm5
