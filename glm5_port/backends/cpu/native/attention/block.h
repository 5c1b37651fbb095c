// One block of keys against the queries of a few lanes: scores, running softmax, weighted sum of values. The lanes are the heads
// of one token (the latent row is key and value of them all), or the tokens of one head.
#pragma once

#include "attention/tile.h"
#include "vector_math.h"

namespace glm5 {
namespace {

// Words of a panel of 64 columns: with this many, panels of both products and their weights stay in the first-level cache.
constexpr int64_t words_of_segment = 64;

constexpr float lowest_float = -3.4028235e38f;

// The sizes of one kind of block. Widths are padded to whole vectors, with zeros.
template <class Unit>
struct BlockShape {
  static constexpr int64_t keys = words_of_segment * Unit::depth;  // most keys of a block

  int64_t lanes;  // queries
  int64_t content_words, rope_words;  // the two parts of a key
  int64_t value_width;  // numbers
  int64_t value_groups;  // 1, or groups of `quantised_group` channels with a scale for each key

  // Words of one part of the keys that are multiplied at once.
  struct Segment {
    bool of_rope;
    int64_t first, words;
  };

  int64_t key_words() const { return content_words + rope_words; }
  int64_t content_segments() const { return blocks_of(content_words, words_of_segment); }
  int64_t segments() const { return content_segments() + blocks_of(rope_words, words_of_segment); }
  Segment segment(int64_t number) const {
    const bool of_rope = number >= content_segments();
    const int64_t first = (number - (of_rope ? content_segments() : 0)) * words_of_segment;
    return {of_rope, first, smaller(words_of_segment, (of_rope ? rope_words : content_words) - first)};
  }
  int64_t lane_panels() const { return blocks_of(lanes, panel); }
  int64_t value_panels() const { return blocks_of(value_width, panel); }
  int64_t value_panel_words() const { return keys / Unit::depth * panel; }
  int64_t query_words() const { return lane_panels() * key_words() * panel; }
  int64_t state_floats() const { return lane_panels() * panel * (2 + value_panels() * panel); }
};

// A block of keys as it is multiplied. Scales are of bfloat16 pairs only, which cannot hold them: float rows hold the products.
template <class Unit>
struct KeyBlock {
  using Shape = BlockShape<Unit>;
  using Word = typename Unit::Word;

  KeyBlock(const Shape& shape, bool in_place = false)  // NOLINT: arrays of blocks are made of their shape
      : memory(in_place ? 0 : Shape::keys * shape.key_words()),
        values(shape.value_panels() * shape.value_panel_words()),
        score_factors(shape.segments() * Shape::keys),
        value_scales(shape.value_groups * Shape::keys) {
    for (int64_t k = 0; k < Shape::keys && !in_place; ++k) {
      content[k] = memory + k * shape.key_words();
      rope[k] = content[k] + shape.content_words;
    }
  }

  Buffer<Word> memory;  // [keys][content_words, rope_words], or nothing where the rows are read in place
  const Word *content[Shape::keys], *rope[Shape::keys];  // of each key
  Buffer<Word> values;  // [value panels][keys / depth][panel], zeros for a missing last key of a pair
  Buffer<float> score_factors;  // [segments][keys]: what the products of a segment count in the score
  Buffer<float> value_scales;  // [value_groups][keys]
  int64_t count = 0;  // keys of the block
};

// Running softmax of each lane: the largest score, the sum of weights, and the weighted sum of values in panels
// [lane panels][value panels][panel][panel].
template <class Unit>
struct State {
  State(const BlockShape<Unit>& shape, float* memory)
      : largest(memory), total(memory + shape.lane_panels() * panel), sums(memory + 2 * shape.lane_panels() * panel) {}

  void clear(const BlockShape<Unit>& shape) const {
    const int64_t lanes = shape.lane_panels() * panel;
    for (int64_t i = 0; i < lanes; ++i) largest[i] = -__builtin_inff();
    std::memset(total, 0, (shape.state_floats() - lanes) * sizeof(float));
  }

  float* largest;
  float* total;
  float* sums;
};

template <class Unit>
struct Scratch {
  explicit Scratch(const BlockShape<Unit>& shape)
      : scores(BlockShape<Unit>::keys * panel), weights(shape.value_groups * shape.value_panel_words()) {
    for (int64_t i = 0; i < larger(panel, BlockShape<Unit>::keys); ++i) ones[i] = 1.0f;
  }

  Buffer<float> scores;  // [keys][panel]
  Buffer<typename Unit::Word> weights;  // [value_groups][keys / depth][panel]
  float fade[panel];  // what sums so far count beside the new block's
  float ones[words_of_segment * 2 > panel ? words_of_segment * 2 : panel];
};

// The weights of one vector of lanes, from scores that already bear every factor.
template <class Unit>
void weigh(const BlockShape<Unit>& shape, const KeyBlock<Unit>& block, Scratch<Unit>& scratch, float* largest, float* total,
           int64_t lane) {
  constexpr int64_t depth = Unit::depth, keys = BlockShape<Unit>::keys;
  const float* scores = scratch.scores + lane;
  const F32 before = F32::load(largest);
  F32 peak = before;
  for (int64_t k = 0; k < block.count; ++k) peak = maximum(F32::load(scores + k * panel), peak);  // NaN is left to the weights
  const F32 base = maximum(peak, F32::broadcast(lowest_float));  // nothing visible yet: weights are e^-inf
  const F32 fade = exponential(before - base);
  F32 sum = F32::load(total) * fade;
  for (int64_t k = 0; k < block.count; k += depth) {
    F32 weight[depth];
    for (int64_t i = 0; i < depth; ++i) {
      weight[i] = k + i < block.count ? exponential(F32::load(scores + (k + i) * panel) - base) : F32::zero();
      sum = sum + weight[i];
    }
    for (int64_t group = 0; group < shape.value_groups; ++group) {
      const float* scales = block.value_scales + group * keys + k;
      typename Unit::Numbers scaled[depth];
      for (int64_t i = 0; i < depth; ++i)
        scaled[i] = Unit::numbers(shape.value_groups == 1 ? weight[i] : weight[i] * F32::broadcast(scales[i]));
      Unit::store_words(scaled, scratch.weights + group * shape.value_panel_words() + k / depth * panel + lane);
    }
  }
  peak.store(largest);
  sum.store(total);
  fade.store(scratch.fade + lane);
}

// Which keys a lane sees: key k of the block from lane `first_lane + k` on; every key where that is not above 0.
constexpr int64_t all_visible = -(int64_t{1} << 40);

// Adds a block of keys to the state of all lanes.
template <class Unit>
void attend_block(const BlockShape<Unit>& shape, const KeyBlock<Unit>& block, const typename Unit::Word* queries,
                  const State<Unit>& state, Scratch<Unit>& scratch, Upcoming& upcoming, int64_t first_lane = all_visible) {
  using Word = typename Unit::Word;
  constexpr int64_t keys = BlockShape<Unit>::keys;
  const int64_t key_calls = blocks_of(shape.key_words(), words_of_fetch) * (block.count / tile_rows),
                value_calls = shape.value_panels() * blocks_of(block.count, Unit::depth * words_of_fetch);
  upcoming.spread(shape.lane_panels() * (key_calls + value_calls * (smaller(panel, shape.lanes) / tile_rows)));
  for (int64_t first = 0; first < shape.lanes; first += panel) {
    const int64_t lanes = smaller(panel, shape.lanes - first), place = first / panel;
    if (first_lane >= first + lanes) continue;  // nobody sees the first key
    for (int64_t number = 0; number < shape.segments(); ++number) {
      const auto segment = shape.segment(number);
      const ScatteredRows<Word> rows = {segment.of_rope ? block.rope : block.content, segment.first};
      const int64_t word = (segment.of_rope ? shape.content_words : 0) + segment.first;
      multiply<Unit>(block.count, lanes, rows, queries + (place * shape.key_words() + word) * panel, segment.words,
                     scratch.scores, number == 0 ? nullptr : scratch.ones, block.score_factors + number * keys, upcoming);
    }
    for (int64_t k = 0; k < block.count; ++k)
      for (int64_t lane = 0; lane < smaller(panel, first_lane + k - first); ++lane)
        scratch.scores[k * panel + lane] = -__builtin_inff();
    for (int64_t lane = 0; lane < lanes; lane += F32::width)
      weigh(shape, block, scratch, state.largest + first + lane, state.total + first + lane, lane);
    for (int64_t p = 0; p < shape.value_panels(); ++p) {
      const int64_t group = shape.value_groups == 1 ? 0 : p * panel / quantised_group;
      const PanelColumns<Word> weights = {scratch.weights + group * shape.value_panel_words()};
      multiply<Unit>(lanes, smaller(panel, shape.value_width - p * panel), weights, block.values + p * shape.value_panel_words(),
                     blocks_of(block.count, Unit::depth), state.sums + (place * shape.value_panels() + p) * panel * panel,
                     scratch.fade, scratch.ones, upcoming);
    }
  }
}

}  // namespace
}  // namespace glm5
