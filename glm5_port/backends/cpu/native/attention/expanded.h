// Attention on keys and values that are expanded from the latent: one head at a time, whose tokens are the lanes.
//
// A few blocks of keys are expanded at once, and then meet every token of the head that sees them; blocks beyond a token's own
// position are skipped. Blocks begin at fixed positions of the sequence, so a token's bits depend on nothing but its sequence.
#pragma once

#include "attention/latent.h"

namespace glm5 {
namespace {

constexpr int64_t tokens_of_run = 4096;  // whose running sums, some megabytes, a thread holds at once
constexpr int64_t blocks_of_chunk = 4;  // of expanded keys, which stay in the second-level cache

// Tokens of one sequence.
struct Run {
  int64_t sequence, first, last;
};

inline int64_t runs_of_batch(const AttentionCall& call, Run* runs) {
  int64_t count = 0;
  for (int64_t sequence = 0; sequence < call.batch.sequences; ++sequence) {
    const int64_t last = smaller(call.batch.query_starts[sequence + 1], call.tokens);
    for (int64_t first = call.batch.query_starts[sequence]; first < last; first += tokens_of_run, ++count)
      if (runs) runs[count] = {sequence, first, smaller(last, first + tokens_of_run)};
  }
  return count;
}

// The weights of one head as panel operands, [panels][latent words][panel]: their rows are the lanes.
template <class Unit>
struct HeadWeight {
  HeadWeight(const AttentionCall& call, const void* weight, int64_t head, int64_t width)
      : words(padded(call.cache.latent_width) / Unit::depth), width(width), panels(blocks_of(width, panel) * words * panel) {
    const int64_t latent_width = call.cache.latent_width;
    for (int64_t first = 0; first < width; first += panel)
      pack_panel<Unit>(weight, call.is_bf16, (head * width + first) * latent_width, latent_width, smaller(panel, width - first),
                       latent_width, panels + first * words);
  }

  int64_t words, width;
  Buffer<typename Unit::Word> panels;
};

// products[keys][panel] = latent rows of a block . one panel of a weight's rows.
template <class Unit>
void expand_panel(const BlockShape<Unit>& latent_shape, const KeyBlock<Unit>& latent, const HeadWeight<Unit>& weight,
                  int64_t first, const float* ones, Upcoming& upcoming, float* products) {
  for (int64_t number = 0; number < latent_shape.content_segments(); ++number) {
    const auto segment = latent_shape.segment(number);
    const ScatteredRows<typename Unit::Word> rows = {latent.content, segment.first};
    multiply<Unit>(latent.count, smaller(panel, weight.width - first), rows,
                   weight.panels + first * weight.words + segment.first * panel, segment.words, products,
                   number == 0 ? nullptr : ones, latent.score_factors + number * BlockShape<Unit>::keys, upcoming);
  }
}

// Keys and values of one head from a block of latent rows, rounded to the numbers of the unit.
template <class Unit>
void expand_block(const BlockShape<Unit>& latent_shape, const KeyBlock<Unit>& latent, const HeadWeight<Unit>& key_weight,
                  const HeadWeight<Unit>& value_weight, const BlockShape<Unit>& shape, const float* ones, Upcoming& upcoming,
                  float* products, KeyBlock<Unit>& block) {
  constexpr int64_t depth = Unit::depth;
  block.count = latent.count;
  upcoming.spread((blocks_of(key_weight.width, panel) + blocks_of(value_weight.width, panel)) *
                  blocks_of(key_weight.words, words_of_segment) * (block.count / tile_rows));
  for (int64_t first = 0; first < key_weight.width; first += panel) {
    expand_panel(latent_shape, latent, key_weight, first, ones, upcoming, products);
    for (int64_t k = 0; k < block.count; ++k)
      for (int64_t n = 0; n < panel && first + n < key_weight.width; n += F32::width)
        Unit::store_numbers(Unit::numbers(F32::load(products + k * panel + n)), block.memory + k * shape.key_words(), first + n);
  }
  for (int64_t k = 0; k < block.count; ++k)
    std::memcpy(block.memory + k * shape.key_words() + shape.content_words, latent.rope[k],
                shape.rope_words * sizeof(typename Unit::Word));
  for (int64_t first = 0; first < value_weight.width; first += panel) {
    expand_panel(latent_shape, latent, value_weight, first, ones, upcoming, products);
    typename Unit::Word* values = block.values + first / panel * shape.value_panel_words();
    for (int64_t k = 0; k < block.count; k += depth)
      for (int64_t v = 0; v < panel; v += F32::width) {
        typename Unit::Numbers numbers[depth];
        for (int64_t i = 0; i < depth; ++i)
          numbers[i] = Unit::numbers(k + i < block.count ? F32::load(products + (k + i) * panel + v) : F32::zero());
        Unit::store_words(numbers, values + k / depth * panel + v);
      }
  }
}

template <class Unit>
void pack_tokens(const ExpandedCall& given, const Run& run, int64_t head, const BlockShape<Unit>& shape,
                 typename Unit::Word* to) {
  const AttentionCall& call = given.attention;
  for (int64_t token = run.first; token < run.last; token += panel, to += shape.key_words() * panel) {
    const int64_t tokens = smaller(panel, run.last - token);
    const auto first = [&](const Queries& query) { return token * query.token_stride + head * query.head_stride; };
    pack_panel<Unit>(call.query.data, call.is_bf16, first(call.query), call.query.token_stride, tokens, given.nope_width, to);
    pack_panel<Unit>(call.query_rope.data, call.is_bf16, first(call.query_rope), call.query_rope.token_stride, tokens,
                     call.cache.rope_width, to + shape.content_words * panel);
  }
}

// A chunk of expanded blocks against all tokens of a run, a panel of them at a time.
template <class Unit>
void attend_chunk(const BlockShape<Unit>& shape, const KeyBlock<Unit>* blocks, int64_t count, int64_t first_lane,
                  const typename Unit::Word* queries, float* memory, Scratch<Unit>& scratch, Upcoming& upcoming) {
  BlockShape<Unit> one_panel = shape;
  one_panel.lanes = panel;
  for (int64_t lane = 0; lane < shape.lanes; lane += panel) {
    BlockShape<Unit> part = shape;
    part.lanes = smaller(panel, shape.lanes - lane);
    const State<Unit> state(part, memory + lane / panel * one_panel.state_floats());
    for (int64_t block = 0; block < count; ++block)
      attend_block(part, blocks[block], queries + lane * shape.key_words(), state, scratch, upcoming,
                   first_lane + block * BlockShape<Unit>::keys - lane);
  }
}

template <class Unit, class T>
void write_run(const ExpandedCall& given, const Run& run, int64_t head, const BlockShape<Unit>& shape, const float* memory) {
  const int64_t heads = given.attention.heads, width = given.value_width;
  for (int64_t token = run.first; token < run.last; token += panel, memory += panel * (2 + shape.value_panels() * panel)) {
    BlockShape<Unit> part = shape;
    part.lanes = smaller(panel, run.last - token);
    T* out = static_cast<T*>(given.attention.out) + (token * heads + head) * width;
    for (int64_t p = 0; p < shape.value_panels(); ++p) combine<Unit>(part, memory, 1, 0, p, out, heads * width);
  }
}

template <class Unit>
void attend_run(const ExpandedCall& given, const Run& run, int64_t head) {
  constexpr int64_t keys_of_block = BlockShape<Unit>::keys;
  const AttentionCall& call = given.attention;
  const Place first = place_of(call.batch, run.first), last = place_of(call.batch, run.last - 1);
  const int64_t keys = visible_keys(call, last);
  BlockShape<Unit> latent_rows = latent_shape<Unit>(call.cache, 0);
  latent_rows.value_width = 0;
  const BlockShape<Unit> shape = {run.last - run.first, padded(given.nope_width) / Unit::depth, latent_rows.rope_words,
                                  given.value_width, 1};

  const HeadWeight<Unit> key_weight(call, given.key_weight, head, given.nope_width);
  const HeadWeight<Unit> value_weight(call, given.value_weight, head, given.value_width);
  const Buffer<typename Unit::Word> queries(shape.query_words());
  const Buffer<float> memory(shape.state_floats()), products(keys_of_block * panel);
  const Buffer<LatentRow> rows(2 * keys_of_block);
  KeyBlock<Unit> latent(latent_rows, reads_in_place<Unit>(call.cache)), blocks[blocks_of_chunk] = {shape, shape, shape, shape};
  Scratch<Unit> scratch(shape);
  pack_tokens(given, run, head, shape, queries);
  for (int64_t lane = 0; lane < shape.lanes; lane += panel) {
    BlockShape<Unit> part = shape;
    part.lanes = panel;
    State<Unit>(part, memory + lane / panel * part.state_floats()).clear(part);
  }
  fill_score_factors(latent_rows, 1.0f, latent);
  for (KeyBlock<Unit>& block : blocks) fill_score_factors(shape, call.scale, block);

  const auto list = [&](int64_t key) {
    const int64_t count = smaller(keys_of_block, keys - key);
    for (int64_t k = 0; k < count; ++k) rows[k] = row_at(call.cache, call.batch, run.sequence, key + k);
    return count;
  };
  Upcoming nothing(call.cache, rows, 0);
  for (int64_t key = 0; key < keys; key += blocks_of_chunk * keys_of_block) {
    int64_t count = 0;
    for (int64_t k = key; count < blocks_of_chunk && k < keys; k += keys_of_block, ++count) {
      stage(call.cache, rows, list(k), 1.0f, latent_rows, latent);
      expand_block(latent_rows, latent, key_weight, value_weight, shape, scratch.ones, nothing, products, blocks[count]);
    }
    attend_chunk(shape, blocks, count, key - first.position, static_cast<const typename Unit::Word*>(queries), memory, scratch,
                 nothing);
  }
  call.is_bf16 ? write_run<Unit, bf16>(given, run, head, shape, memory) : write_run<Unit, float>(given, run, head, shape, memory);
}

template <class Unit>
void attend_expanded_heads(const ExpandedCall& given) {
  const AttentionCall& call = given.attention;
  const int64_t row = call.heads * given.value_width * (call.is_bf16 ? 2 : 4);
  const int64_t placed = smaller(call.batch.query_starts[call.batch.sequences], call.tokens);
  if (placed < call.tokens)
    std::memset(static_cast<uint8_t*>(call.out) + placed * row, 0, (call.tokens - placed) * row);  // padding
  const Buffer<Run> runs(runs_of_batch(call, nullptr));
  const int64_t count = runs_of_batch(call, runs);
  parallel_for(call.threads, count * call.heads,
               [&](int64_t task) { attend_run<Unit>(given, runs[task / call.heads], task % call.heads); });
}

}  // namespace
}  // namespace glm5
