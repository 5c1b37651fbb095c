// Attention of the heads of one token to rows of the cache, in splits of its keys that several threads can share.
//
// A split is a run of a token's keys whose size depends on the number of its own keys alone; each is attended to block by block,
// and the partial results are combined in order. So a token's bits depend on nothing but the token.
#pragma once

#include "attention/stage.h"
#include "parallel.h"

namespace glm5 {
namespace {

constexpr int64_t smallest_split = 512, most_splits = 64;
constexpr int64_t workspace_floats = int64_t{8} << 20;  // of partial results, unless one token needs more

template <class Unit>
int64_t split_size(int64_t keys) {
  constexpr int64_t block = BlockShape<Unit>::keys;
  return larger(smallest_split, blocks_of(keys, most_splits * block) * block);
}

template <class Unit>
struct Tokens {
  explicit Tokens(const AttentionCall& call) : places(call.tokens), first_split(call.tokens + 1) {
    first_split[0] = 0;
    for (int64_t token = 0; token < call.tokens; ++token) {
      places[token] = place_of(call.batch, token);
      first_split[token + 1] = first_split[token] + blocks_of(keys(call, token), split_size<Unit>(keys(call, token)));
    }
  }

  int64_t keys(const AttentionCall& call, int64_t token) const {
    const int64_t visible = visible_keys(call, places[token]);
    return call.index_count >= 0 && visible ? call.index_count : visible;
  }

  Buffer<Place> places;
  Buffer<int64_t> first_split;  // of each token, and one beyond the last
};

// The visible rows among keys first .. last-1 of a token.
template <class Unit>
int64_t list_rows(const AttentionCall& call, int64_t token, const Place& place, int64_t first, int64_t last, LatentRow* rows) {
  const int64_t visible = visible_keys(call, place);
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t position = call.index_count >= 0 ? call.indices[token * call.index_stride + i] : i;
    if (position >= 0 && position < visible) rows[count++] = row_at(call.cache, call.batch, place.sequence, position);
  }
  return count;
}

template <class Unit>
void pack_queries(const AttentionCall& call, int64_t token, const BlockShape<Unit>& shape, typename Unit::Word* to) {
  const LatentCache& cache = call.cache;
  for (int64_t head = 0; head < call.heads; head += panel, to += shape.key_words() * panel) {
    const int64_t heads = smaller(panel, call.heads - head);
    const auto first = [&](const Queries& query) { return token * query.token_stride + head * query.head_stride; };
    pack_panel<Unit>(call.query.data, call.is_bf16, first(call.query), call.query.head_stride, heads, cache.latent_width, to);
    pack_panel<Unit>(call.query_rope.data, call.is_bf16, first(call.query_rope), call.query_rope.head_stride, heads,
                     cache.rope_width, to + shape.content_words * panel);
  }
}

template <class Unit>
void attend_split(const AttentionCall& call, const Tokens<Unit>& tokens, const BlockShape<Unit>& shape, int64_t token,
                  int64_t split, float* memory) {
  constexpr int64_t keys_of_block = BlockShape<Unit>::keys;
  const int64_t keys = tokens.keys(call, token), size = split_size<Unit>(keys);
  const Buffer<LatentRow> rows(size);
  const int64_t count = list_rows<Unit>(call, token, tokens.places[token], split * size, smaller(keys, (split + 1) * size), rows);
  const State<Unit> state(shape, memory);
  state.clear(shape);
  if (count == 0) return;
  Upcoming(call.cache, rows, smaller(keys_of_block, count)).fetch_all();
  const Buffer<typename Unit::Word> queries(shape.query_words());
  KeyBlock<Unit> block(shape, reads_in_place<Unit>(call.cache));
  Scratch<Unit> scratch(shape);
  pack_queries(call, token, shape, queries);
  fill_score_factors(shape, call.scale, block);
  for (int64_t first = 0; first < count; first += keys_of_block) {
    stage(call.cache, rows + first, smaller(keys_of_block, count - first), call.scale, shape, block);
    const int64_t next = smaller(count, first + keys_of_block);
    Upcoming upcoming(call.cache, rows + next, smaller(keys_of_block, count - next));
    attend_block(shape, block, static_cast<const typename Unit::Word*>(queries), state, scratch, upcoming);
  }
}

// factors[split][lane]: what the sums of a split count in the result of each lane of a panel.
template <class Unit>
void combine_factors(const BlockShape<Unit>& shape, const float* memory, int64_t splits, int64_t lane, float* factors) {
  for (int64_t v = 0; v < panel; v += F32::width) {
    F32 peak = F32::broadcast(lowest_float), total = F32::zero();
    const auto state = [&](int64_t split) {
      return State<Unit>(shape, const_cast<float*>(memory) + split * shape.state_floats());
    };
    for (int64_t split = 0; split < splits; ++split) peak = maximum(F32::load(state(split).largest + lane + v), peak);
    for (int64_t split = 0; split < splits; ++split) {
      const F32 factor = exponential(F32::load(state(split).largest + lane + v) - peak);
      total = multiply_add(F32::load(state(split).total + lane + v), factor, total);
      factor.store(factors + split * panel + v);
    }
    float totals[F32::width];
    total.store(totals);
    for (float& sum : totals) sum = sum == 0 ? 1.0f : sum;  // nothing visible gives zeros
    for (int64_t split = 0; split < splits; ++split) {
      float* factor = factors + split * panel + v;
      (F32::load(factor) / F32::load(totals)).store(factor);
    }
  }
}

// One panel of lanes and one of values, from the partial results of splits; the rows of lanes lie `lane_stride` apart in `out`.
template <class Unit, class T>
void combine(const BlockShape<Unit>& shape, const float* memory, int64_t splits, int64_t lane_panel, int64_t value_panel, T* out,
             int64_t lane_stride) {
  const Buffer<float> factors(splits * panel);
  combine_factors(shape, memory, splits, lane_panel * panel, factors);
  const int64_t width = shape.value_width, first_lane = lane_panel * panel, first_value = value_panel * panel;
  const int64_t place = (lane_panel * shape.value_panels() + value_panel) * panel * panel;
  for (int64_t lane = 0; lane < smaller(panel, shape.lanes - first_lane); ++lane) {
    for (int64_t v = 0; v < smaller(panel, width - first_value); v += F32::width) {
      F32 sum = F32::zero();
      for (int64_t split = 0; split < splits; ++split) {
        const State<Unit> state(shape, const_cast<float*>(memory) + split * shape.state_floats());
        sum = multiply_add(F32::load(state.sums + place + lane * panel + v), F32::broadcast(factors[split * panel + lane]), sum);
      }
      store_row(sum, out + (first_lane + lane) * lane_stride, first_value + v, width);
    }
  }
}

template <class Unit, class T>
void combine_token(const AttentionCall& call, const BlockShape<Unit>& shape, const float* memory, int64_t splits, int64_t token,
                   int64_t part) {
  const int64_t width = shape.value_width, panels = shape.value_panels();
  combine<Unit>(shape, memory, splits, part / panels, part % panels, static_cast<T*>(call.out) + token * call.heads * width,
                width);
}

// The last token of a wave whose partial results fit the workspace; at least one token.
template <class Unit>
int64_t end_of_wave(const AttentionCall& call, const Tokens<Unit>& tokens, int64_t floats_of_split, int64_t first) {
  int64_t last = first + 1;
  while (last < call.tokens && (tokens.first_split[last + 1] - tokens.first_split[first]) * floats_of_split <= workspace_floats)
    ++last;
  return last;
}

template <class Unit>
void attend_latent(const AttentionCall& call) {
  const BlockShape<Unit> shape = latent_shape<Unit>(call.cache, call.heads);
  const Tokens<Unit> tokens(call);
  for (int64_t first = 0, last; first < call.tokens; first = last) {
    last = end_of_wave(call, tokens, shape.state_floats(), first);
    const int64_t base = tokens.first_split[first], splits = tokens.first_split[last] - base;
    const Buffer<float> memory(splits * shape.state_floats());
    const Buffer<int64_t> token_of(splits);
    for (int64_t token = first; token < last; ++token)
      for (int64_t split = tokens.first_split[token]; split < tokens.first_split[token + 1]; ++split)
        token_of[split - base] = token;
    parallel_for(call.threads, splits, [&](int64_t task) {
      const int64_t token = token_of[task];
      attend_split(call, tokens, shape, token, task + base - tokens.first_split[token], memory + task * shape.state_floats());
    });
    const int64_t parts = shape.lane_panels() * shape.value_panels();
    parallel_for(call.threads, (last - first) * parts, [&](int64_t task) {
      const int64_t token = first + task / parts, split = tokens.first_split[token];
      const auto finish = call.is_bf16 ? combine_token<Unit, bf16> : combine_token<Unit, float>;
      finish(call, shape, memory + (split - base) * shape.state_floats(), tokens.first_split[token + 1] - split, token,
             task % parts);
    });
  }
}

}  // namespace
}  // namespace glm5
