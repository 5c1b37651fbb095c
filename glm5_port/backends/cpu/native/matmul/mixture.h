// A mixture of experts, for kernels of any instruction set (panels.h).
//
// Choices are sorted by expert. First, tasks of one expert's rows and some of its columns make silu(gate) * up; then tasks of some
// output columns go through all experts and mix their results, so that no results of whole rows are kept. How unequal the
// loads of experts are matters to neither: the first kind are taken dearest first, those of the second kind cost the same.
#pragma once

#include "matmul/activation.h"
#include "matmul/matmul.h"
#include "matmul/panels.h"

namespace glm5 {
namespace {

constexpr int64_t between_panels = 2, result_panels = 4;  // columns of a task: so many of gate and of up; of the result
constexpr int64_t chunk_bytes = 1 << 28;                  // activations that are kept at once

// Some rows of one expert, neighbours in the sorted order.
struct Rows {
  int64_t expert, first, count;
};

// Which choices go to which expert: a counting sort, so that choices of an expert keep their order.
struct Routing {
  Buffer<int64_t> order;     // [choices in range] token * choices + choice, sorted by expert
  Buffer<int64_t> place;     // [tokens * choices] where in `order`, or -1
  Buffer<Rows> blocks;       // of every expert with rows; those with most rows first
  int64_t used = 0, count = 0;

  Routing(const int32_t* ids, int64_t choices, int64_t experts)
      : order(choices), place(choices), blocks(experts + blocks_of(choices, row_block)) {
    const Buffer<int64_t> starts(experts + 1);
    for (int64_t e = 0; e <= experts; ++e) starts[e] = 0;
    for (int64_t i = 0; i < choices; ++i) {
      if (ids[i] >= 0 && ids[i] < experts) ++starts[ids[i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    used = starts[experts];
    const Buffer<Rows> unsorted(experts + blocks_of(choices, row_block));
    int64_t of_size[row_block + 1] = {};
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t first = starts[e]; first < starts[e + 1]; first += row_block) {
        unsorted[count] = {e, first, smaller(row_block, starts[e + 1] - first)};
        ++of_size[unsorted[count++].count];
      }
    }
    for (int64_t i = 0; i < choices; ++i) {
      const bool in_range = ids[i] >= 0 && ids[i] < experts;
      place[i] = in_range ? starts[ids[i]]++ : -1;
      if (in_range) order[place[i]] = i;
    }
    int64_t places[row_block + 1], next = 0;
    for (int64_t size = row_block; size >= 0; next += of_size[size--]) places[size] = next;
    for (int64_t i = 0; i < count; ++i) blocks[places[unsorted[i].count]++] = unsorted[i];
  }
};

// silu(gate) * up of some rows and columns, into their places in packed rows.
template <class Kernel, class Weight>
void fill_between(const ExpertsCall<Weight>& call, const Rows& rows, int64_t panel, const typename Kernel::Packed* const* x,
                  typename Kernel::Packed* between) {
  const Weight gate = call.gate.of_expert(rows.expert), up = call.up.of_expert(rows.expert);
  const int64_t panels = smaller(between_panels, gate.panels() - panel), width = panels * panel_rows;
  const int64_t column = panel * panel_rows, columns = smaller(width, gate.rows - column);
  const Buffer<float> gates(rows.count * width), ups(rows.count * width);
  multiply<Kernel>(gate, panel, panels, x + rows.first, rows.count, gates, width);
  multiply<Kernel>(up, panel, panels, x + rows.first, rows.count, ups, width);
  int64_t places[between_panels * panel_rows];
  for (int64_t i = 0; i < columns; ++i) places[i] = packed_place<Kernel>(call.down, column + i);
  for (int64_t row = 0; row < rows.count; ++row) {
    typename Kernel::Packed values[between_panels * panel_rows];
    for (int64_t i = 0; i < width; i += F32::width) {
      silu_times(F32::load(gates + row * width + i), F32::load(ups + row * width + i)).store(values + i);
    }
    typename Kernel::Packed* to = between + (rows.first + row) * packed_stride<Kernel>(call.down.padded_width());
    for (int64_t i = 0; i < columns; ++i) to[places[i]] = values[i];
  }
}

// The results of all experts in some columns, mixed in the order of choices. `multiply_block(rows, panels, results)` makes those
// of one expert.
template <class T, class Weight, class Multiply>
void mix_columns(const ExpertsCall<Weight>& call, const Routing& routing, int64_t panel, const Multiply& multiply_block) {
  const int64_t panels = smaller(result_panels, call.down.panels() - panel), width = panels * panel_rows;
  const int64_t column = panel * panel_rows, columns = smaller(width, call.down.rows - column);
  const Buffer<float> results(routing.used * width);
  for (int64_t b = 0; b < routing.count; ++b) {
    const Rows& rows = routing.blocks[b];
    multiply_block(rows, panels, results + rows.first * width);
  }
  for (int64_t token = 0; token < call.tokens; ++token) {
    float total[result_panels * panel_rows] = {};
    for (int64_t choice = token * call.choices; choice < (token + 1) * call.choices; ++choice) {
      if (routing.place[choice] < 0) continue;
      const float* result = results + routing.place[choice] * width;
      const F32 route_weight = F32::broadcast(call.route_weights[choice]);
      for (int64_t i = 0; i < width; i += F32::width) (F32::load(total + i) + F32::load(result + i) * route_weight).store(total + i);
    }
    store_row(total, columns, static_cast<T*>(call.y) + token * call.down.rows + column);
  }
}

// The tokens of one chunk.
template <class Kernel, class T, class Weight>
void mix_tokens(const ExpertsCall<Weight>& call) {
  using Packed = typename Kernel::Packed;
  const Routing routing(call.ids, call.tokens * call.choices, call.experts);
  const int64_t width = packed_stride<Kernel>(call.gate.padded_width()), between_width = packed_stride<Kernel>(call.down.padded_width());
  const int threads = threads_for(3 * routing.used * call.gate.width * call.down.width, call.threads);
  const Buffer<Packed> hidden(call.tokens * width), between(routing.used * between_width);
  const Buffer<const Packed*> hidden_rows(routing.used), between_rows(routing.used);
  parallel_for(threads, blocks_of(call.tokens, row_block), [&](int64_t block) {
    for (int64_t token = block * row_block; token < smaller((block + 1) * row_block, call.tokens); ++token) {
      pack_row<Kernel>(static_cast<const T*>(call.hidden) + token * call.stride, call.gate, hidden + token * width);
    }
  });
  for (int64_t row = 0; row < routing.used; ++row) {
    hidden_rows[row] = hidden + routing.order[row] / call.choices * width;
    between_rows[row] = between + row * between_width;
  }
  if (call.down.padded_width() != call.down.width) std::memset(between, 0, routing.used * between_width * sizeof(Packed));
  const int64_t tasks = blocks_of(call.gate.panels(), between_panels);
  parallel_for(threads, routing.count * tasks, [&](int64_t task) {
    fill_between<Kernel>(call, routing.blocks[task / tasks], task % tasks * between_panels, hidden_rows, between);
  });
  parallel_for(threads, blocks_of(call.down.panels(), result_panels), [&](int64_t task) {
    const int64_t panel = task * result_panels;
    mix_columns<T>(call, routing, panel, [&](const Rows& rows, int64_t panels, float* results) {
      const Weight down = call.down.of_expert(rows.expert);
      multiply<Kernel>(down, panel, panels, between_rows + rows.first, rows.count, results, panels * panel_rows);
    });
  });
}

// Calls mix(chunk) for chunks of tokens whose activations, `token_bytes` each, keep to chunk_bytes.
template <class T, class Weight, class Mix>
void in_chunks(const ExpertsCall<Weight>& call, int64_t token_bytes, const Mix& mix) {
  const int64_t most = larger(1, chunk_bytes / token_bytes);
  for (int64_t first = 0; first < call.tokens; first += most) {
    ExpertsCall<Weight> chunk = call;
    chunk.tokens = smaller(most, call.tokens - first);
    chunk.hidden = static_cast<const T*>(call.hidden) + first * call.stride;
    chunk.route_weights += first * call.choices;
    chunk.ids += first * call.choices;
    chunk.y = static_cast<T*>(call.y) + first * call.down.rows;
    mix(chunk);
  }
}

template <class Kernel, class T, class Weight>
void mix_experts(const ExpertsCall<Weight>& call) {
  const int64_t token_bytes = (call.gate.padded_width() + call.choices * call.down.padded_width()) * sizeof(typename Kernel::Packed);
  in_chunks<T>(call, token_bytes, mix_tokens<Kernel, T, Weight>);
}

}  // namespace
}  // namespace glm5
