// The indexer in vectors of floats: queries and keys are widened, a product is a fused multiply and add for each channel.
#include "indexer/score.h"

namespace glm5 {
namespace {

struct FloatProduct {
  using Element = float;
  static constexpr int64_t channels = 1, round = 1;
  static constexpr int keys = F32::width == 16 ? 8 : 6;  // twice as many sums as fit the registers, beside query and key

  static bool direct(KeyFormat format) { return format == KeyFormat::float32; }

  static void widen_query(const IndexerCall& call, int64_t place, int64_t count, int64_t depth, float* to) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = call.query_is_bf16 ? widen(static_cast<const bf16*>(call.query)[place + i]) : static_cast<const float*>(call.query)[place + i];
    }
    for (int64_t i = count; i < depth; ++i) to[i] = 0.0f;
  }

  static void widen_key(KeyFormat format, const void* row, int64_t count, int64_t, float* to) {
    switch (format) {
      case KeyFormat::float32: return;
      case KeyFormat::bfloat16: return widen_row(static_cast<const bf16*>(row), count, to, [](const bf16* x) { return F32::load(x); });
      case KeyFormat::fp8: return widen_row(static_cast<const e4m3*>(row), count, to, [](const e4m3* x) { return load_codes(x); });
      case KeyFormat::int8: return widen_row(static_cast<const int8_t*>(row), count, to, [](const int8_t* x) { return load_codes(x); });
    }
  }

  static void multiply(const float* query, const float* const* rows, int64_t depth, const void* const*, F32 (&dots)[keys][2]) {
    F32 sums[keys][2];
#pragma GCC unroll 16
    for (int k = 0; k < keys; ++k) sums[k][0] = sums[k][1] = F32::zero();
    for (int64_t i = 0; i < depth; ++i) {
      const F32 first = F32::load(query + i * heads_of_group), second = F32::load(query + i * heads_of_group + F32::width);
#pragma GCC unroll 16
      for (int k = 0; k < keys; ++k) {
        const F32 key = F32::broadcast(rows[k][i]);
        sums[k][0] = multiply_add(first, key, sums[k][0]);
        sums[k][1] = multiply_add(second, key, sums[k][1]);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < keys; ++k) {
      dots[k][0] = sums[k][0];
      dots[k][1] = sums[k][1];
    }
  }

 private:
  template <class T, class Load>
  static void widen_row(const T* row, int64_t count, float* to, const Load& load) {
    int64_t i = 0;
    for (; i + F32::width <= count; i += F32::width) load(row + i).store(to + i);
    for (; i < count; ++i) to[i] = widen(row[i]);
  }
};

void indexer_scores(const IndexerCall& call) { score_all<FloatProduct>(call); }
void lightning_indexer(const IndexerCall& call) { index_all<FloatProduct>(call); }

template <class T>
void select_row(const SelectCall& call, int64_t row, const Buffer<int32_t>& memory, int64_t kept) {
  const T* scores = static_cast<const T*>(call.scores) + row * call.stride;
  Candidates best;
  best.begin(memory, kept);
  for (int64_t first = 0; first < call.columns; first += Candidates::chunk) {
    best.offer(scores + first, first, smaller(Candidates::chunk, call.columns - first));
  }
  best.finish();
  write_indices(best, call.top_k, call.indices + row * call.top_k);
}

void select_top_k(const SelectCall& call) {
  const int64_t kept = smaller(call.top_k, larger(1, call.columns));
  parallel_for(call.threads, call.rows, [&](int64_t row) {
    const Buffer<int32_t> memory(Candidates::room(kept));
    call.is_bf16 ? select_row<bf16>(call, row, memory, kept) : select_row<float>(call, row, memory, kept);
  });
}

}  // namespace

namespace GLM5_ISA {
const IndexerKernels indexer = {indexer_scores, lightning_indexer, select_top_k};
}
}  // namespace glm5
