#include "indexer/indexer.h"
#include "tests/harness.h"
#include "tests/paging.h"

namespace glm5::tests {
namespace {

constexpr KeyFormat formats[] = {KeyFormat::float32, KeyFormat::bfloat16, KeyFormat::fp8, KeyFormat::int8};
constexpr int64_t code_bytes[] = {4, 2, 1, 1}, scale_bytes[] = {0, 0, 4, 2};

const IndexerKernels& specification = indexer_for(Isa::scalar);

// The kernels of this machine's instruction sets, the specification first, and those of AMX over an emulated tile unit.
std::vector<const IndexerKernels*> usable_kernels() {
  std::vector<const IndexerKernels*> found;
  for (const Isa isa : usable_isas()) {
    found.push_back(&indexer_for(isa));
#if defined(__x86_64__)
    if (isa == Isa::avx512_bf16) found.push_back(&avx512_bf16::indexer_by_emulated_tiles);
#endif
  }
  return found;
}

// Whole numbers: every instruction set must compute the same numbers. Normal ones: they differ by what float rounds.
enum class Numbers { whole, normal };

struct Shape {
  KeyFormat format;
  bool query_is_bf16;
  int64_t heads, head_dim, page_size, gap;
  Numbers numbers;
};

// Of numbers that e4m3 holds.
e4m3 code_of(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80, magnitude = bits & INT32_MAX;
  if (magnitude >= 121u << 23) return {static_cast<uint8_t>(sign | (magnitude - (120u << 23)) >> 20)};
  return {static_cast<uint8_t>(sign | static_cast<uint32_t>(std::fabs(x) * 0x1p9f))};
}

// What a call reads. Rows of the cache that no sequence has reached hold NaN.
struct Case {
  Case(const Shape& shape_, Paging paging_, std::mt19937& random)
      : shape(shape_), paging(std::move(paging_)), head_stride(shape.head_dim + shape.gap), token_stride(shape.heads * head_stride + shape.gap),
        weights_stride(shape.heads + shape.gap), row_stride(shape.head_dim + 2 * shape.gap),
        page_stride(paging.page_size * row_stride + shape.gap),
        query(extent(paging.tokens, token_stride, extent(shape.heads, head_stride, shape.head_dim)) * (shape.query_is_bf16 ? 2 : 4),
              shape.gap * (shape.query_is_bf16 ? 2 : 4)),
        weights(extent(paging.tokens, weights_stride, shape.heads), shape.gap),
        keys(extent(paging.pages, page_stride, extent(paging.page_size, row_stride, shape.head_dim)) * code_bytes[format()],
             shape.gap * code_bytes[format()]),
        scales(paging.pages * paging.page_size * scale_bytes[format()]) {
    for (int64_t i = 0; i < query.size(); i += shape.query_is_bf16 ? 2 : 4) {
      const float x = draw(random);
      shape.query_is_bf16 ? store(round_to_bf16(x), &query[i]) : store(x, &query[i]);
    }
    for (int64_t i = 0; i < weights.size(); ++i) weights[i] = draw(random) / 4;
    for (int64_t i = 0; i < paging.sequences; ++i)
      for (int64_t position = 0; position < paging.lengths[i]; ++position) write_row(i, position, random);
  }

  int format() const { return static_cast<int>(shape.format); }
  float draw(std::mt19937& random) const {
    return shape.numbers == Numbers::whole ? static_cast<float>(std::uniform_int_distribution<int>(-2, 2)(random))
                                           : std::normal_distribution<float>()(random);
  }
  template <class T>
  static void store(T x, uint8_t* to) {
    std::memcpy(to, &x, sizeof x);
  }

  void write(int64_t sequence, int64_t position, int64_t channel, float x) const {
    const int64_t page = paging.table[sequence * paging.table_stride + position / paging.page_size];
    uint8_t* to = &keys[(page * page_stride + position % paging.page_size * row_stride + channel) * code_bytes[format()]];
    switch (shape.format) {
      case KeyFormat::float32: return store(x, to);
      case KeyFormat::bfloat16: return store(round_to_bf16(x), to);
      case KeyFormat::fp8: return store(code_of(x), to);
      case KeyFormat::int8: return store(static_cast<int8_t>(x), to);
    }
  }

  void write_row(int64_t sequence, int64_t position, std::mt19937& random) const {
    std::uniform_int_distribution<int> byte(-126, 126);
    for (int64_t c = 0; c < shape.head_dim; ++c) {
      float x = draw(random);
      if (shape.numbers == Numbers::normal && shape.format == KeyFormat::int8) x = static_cast<float>(byte(random));
      if (shape.numbers == Numbers::normal && shape.format == KeyFormat::fp8) x = widen(e4m3{static_cast<uint8_t>(byte(random))});
      write(sequence, position, c, std::isnan(x) ? 0 : x);
    }
    const int64_t page = paging.table[sequence * paging.table_stride + position / paging.page_size];
    const int64_t place = (page * paging.page_size + position % paging.page_size) * scale_bytes[format()];
    const int exponent = static_cast<int>((position + sequence) % 3);
    if (shape.format == KeyFormat::fp8) store(shape.numbers == Numbers::whole ? std::ldexp(1.0f, exponent) : 0.013f * (exponent + 1), &scales[place]);
    if (shape.format == KeyFormat::int8) store(fp16{static_cast<uint16_t>((15 + exponent - 2) << 10 | (shape.numbers == Numbers::whole ? 0 : 333))}, &scales[place]);
  }

  IndexerCall call(int threads) const {
    const IndexCache cache = {keys.data(), shape.format, page_stride, row_stride, scales.data(), paging.page_size, 1, paging.pages, paging.page_size};
    return {query.data(), shape.query_is_bf16, token_stride, head_stride, weights.data(), weights_stride, cache, paging.table.data(),
            paging.table_stride, paging.columns, paging.starts.data(), paging.lengths.data(), paging.sequences, paging.tokens,
            shape.heads, shape.head_dim, nullptr, nullptr, 0, threads};
  }

  Exact<float> scores(const IndexerKernels& kernels, int threads) const {
    Exact<float> result(paging.tokens * paging.columns * paging.page_size);
    IndexerCall made = call(threads);
    made.scores = result.data();
    kernels.indexer_scores(made);
    return result;
  }

  Exact<int32_t> indices(const IndexerKernels& kernels, int threads, int64_t top_k) const {
    Exact<int32_t> result(paging.tokens * top_k);
    IndexerCall made = call(threads);
    made.indices = result.data();
    made.top_k = top_k;
    kernels.lightning_indexer(made);
    return result;
  }

  Shape shape;
  Paging paging;
  int64_t head_stride, token_stride, weights_stride, row_stride, page_stride;
  Exact<uint8_t> query;
  Exact<float> weights;
  Exact<uint8_t> keys, scales;
};

void same_everywhere(const Case& made, const std::vector<int64_t>& top_ks) {
  const Exact<float> scores = made.scores(specification, 2);
  for (const IndexerKernels* kernels : usable_kernels())
    for (const int threads : {1, 3}) CHECK(same_numbers(made.scores(*kernels, threads), scores));
  for (const int64_t top_k : top_ks) {
    const Exact<int32_t> indices = made.indices(specification, 2, top_k);
    for (const IndexerKernels* kernels : usable_kernels())
      for (const int threads : {1, 3})
        if (kernels != &specification || top_k == top_ks[0]) CHECK(made.indices(*kernels, threads, top_k) == indices);
  }
}

// Whole numbers give many equal scores: the tie rule is in every one of these.
TEST(indexer_shapes) {
  std::mt19937 random(1);
  for (const KeyFormat format : formats) {
    for (const bool query_is_bf16 : {false, true}) {
      int64_t gap = 0;
      for (const int64_t head_dim : {1, 2, 7, 8, 15, 31, 32, 33, 64, 70}) {
        const int64_t heads = 1 + (head_dim * 5) % 19, page_size = 1 + head_dim % 5;
        const std::vector<Sequence> sequences = {{1, 9}, {0, 3}, {3, 3}, {9, 21}, {1, static_cast<int32_t>(head_dim) + 20}};
        const Shape shape = {format, query_is_bf16, heads, head_dim, page_size, gap = (gap + 1) % 3, Numbers::whole};
        same_everywhere(Case(shape, Paging(sequences, 2, page_size, gap, random), random), {5, 16, 100});
      }
    }
  }
}

TEST(indexer_blocks_of_keys) {
  std::mt19937 random(2);
  for (const KeyFormat format : formats) {
    for (const int32_t length : {1, 5, 6, 7, 8, 9, 11, 12, 13, 95, 96, 97, 191, 192, 193, 300}) {
      const Shape shape = {format, true, 3, 6, 16, 1, Numbers::whole};
      same_everywhere(Case(shape, Paging({{std::min(length, 10), length}}, 0, 16, 0, random), random), {8, 64});
    }
  }
}

TEST(indexer_heads) {
  std::mt19937 random(3);
  for (const KeyFormat format : {KeyFormat::float32, KeyFormat::bfloat16})
    for (const int64_t heads : {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65}) {
      const Shape shape = {format, format == KeyFormat::bfloat16, heads, 5, 4, 1, Numbers::whole};
      same_everywhere(Case(shape, Paging({{2, 14}}, 1, 4, 1, random), random), {3});
    }
}

// Enough keys for several splits, whose selections are merged; and plateaus longer than what is kept.
TEST(indexer_splits) {
  std::mt19937 random(4);
  const Shape shape = {KeyFormat::int8, true, 1, 2, 64, 0, Numbers::whole};
  same_everywhere(Case(shape, Paging({{2, 9100}, {1, 40}}, 1, 64, 0, random), random), {1, 512, 2048, 10000});
}

TEST(indexer_nothing) {
  std::mt19937 random(5);
  const Shape shape = {KeyFormat::bfloat16, true, 2, 8, 4, 0, Numbers::whole};
  same_everywhere(Case(shape, Paging({}, 0, 4, 0, random), random), {4});
  same_everywhere(Case(shape, Paging({}, 3, 4, 0, random), random), {4});
  same_everywhere(Case(shape, Paging({{0, 5}}, 2, 4, 0, random), random), {4});
  const Case before(shape, Paging({{4, 2}}, 0, 4, 0, random), random);  // two tokens that lie before the first position
  same_everywhere(before, {4});
  CHECK(before.indices(specification, 1, 4)[4 * 1] == -1);
  CHECK(before.indices(specification, 1, 4)[4 * 2] == 0);
}

TEST(indexer_not_finite) {
  std::mt19937 random(6);
  for (const bool query_is_bf16 : {false, true}) {
    const Shape shape = {KeyFormat::bfloat16, query_is_bf16, 5, 20, 8, 0, Numbers::whole};
    const Case made(shape, Paging({{3, 60}}, 0, 8, 0, random), random);
    for (int64_t position = 1; position < 50; position += 7) made.write(0, position, position % 20, NAN);
    for (int64_t position = 2; position < 50; position += 7) made.write(0, position, position % 20, INFINITY);
    for (int64_t position = 3; position < 50; position += 9) made.write(0, position, position % 20, -INFINITY);
    same_everywhere(made, {1, 7, 20, 60});
  }
}

// A page that is not there reads some row of the cache: nothing is promised but that nothing else is touched.
TEST(indexer_page_that_is_not_there) {
  std::mt19937 random(7);
  const Shape shape = {KeyFormat::float32, false, 2, 8, 4, 0, Numbers::whole};
  const Case made(shape, Paging({{2, 20}}, 0, 4, 0, random), random);
  made.paging.table[1] = 1000000;
  made.paging.table[2] = -7;
  same_everywhere(made, {6});
}

TEST(indexer_rounding) {
  std::mt19937 random(8);
  for (const KeyFormat format : formats) {
    for (const bool query_is_bf16 : {false, true}) {
      const Shape shape = {format, query_is_bf16, 33, 64, 16, 1, Numbers::normal};
      const Case made(shape, Paging({{9, 130}, {2, 40}}, 1, 16, 1, random), random);
      const Exact<float> expected = made.scores(specification, 1);
      float most = 0;
      for (int64_t i = 0; i < expected.size(); ++i) most = std::isfinite(expected[i]) ? std::fmax(most, std::fabs(expected[i])) : most;
      for (const IndexerKernels* kernels : usable_kernels()) {
        const Exact<float> scores = made.scores(*kernels, 1);
        for (int64_t i = 0; i < scores.size(); ++i) CHECK(scores[i] == expected[i] || std::fabs(scores[i] - expected[i]) <= 1e-5f * most);
        for (const int threads : {2, 3}) CHECK(made.scores(*kernels, threads) == scores);
        for (const int64_t token : {0, 5, 8, 10}) {
          const Alone alone(made.paging, token);
          IndexerCall call = made.call(1);
          call.query = made.query.data() + token * made.token_stride * (query_is_bf16 ? 2 : 4);
          call.head_weights += token * made.weights_stride;
          call.block_table = alone.table;
          call.query_starts = alone.starts.data(), call.lengths = alone.length.data();
          call.sequences = call.tokens = 1;
          const Exact<float> row(made.paging.columns * made.paging.page_size);
          call.scores = row.data();
          kernels->indexer_scores(call);
          CHECK(std::memcmp(row.data(), &scores[token * row.size()], row.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

// One head and one channel: the score is weight * relu(query * key) of known numbers.
TEST(indexer_meaning) {
  std::mt19937 random(9);
  const Shape shape = {KeyFormat::float32, false, 1, 1, 2, 0, Numbers::whole};
  const Case made(shape, Paging({{2, 5}}, 1, 2, 0, random), random);
  const float keys[] = {3, -4, 3, 5, 3}, nothing = -INFINITY;
  for (int64_t position = 0; position < 5; ++position) made.write(0, position, 0, keys[position]);
  for (int64_t token = 0; token < 3; ++token) {
    const float one = 1;
    Case::store(one, &made.query[token * 4]);
    made.weights[token] = 2;
  }
  const float expected[] = {6, 0, 6, 10, nothing, nothing, 6, 0, 6, 10, 6, nothing, nothing, nothing, nothing, nothing, nothing, nothing};
  const int32_t best[] = {0, 2, 3, 0, 2, 3, -1, -1, -1}, two[] = {0, 3, 0, 3, -1, -1};
  for (const IndexerKernels* kernels : usable_kernels()) {
    CHECK(std::memcmp(made.scores(*kernels, 1).data(), expected, sizeof expected) == 0);
    CHECK(std::memcmp(made.indices(*kernels, 1, 3).data(), best, sizeof best) == 0);
    CHECK(std::memcmp(made.indices(*kernels, 1, 2).data(), two, sizeof two) == 0);
  }
}

// -- selection ---------------------------------------------------------------------------------------------------------

template <class T>
Exact<int32_t> selected(const IndexerKernels& kernels, const Exact<T>& scores, int64_t rows, int64_t columns, int64_t stride, int64_t top_k, int threads) {
  Exact<int32_t> result(rows * top_k);
  kernels.select_top_k({scores.data(), sizeof(T) == 2, rows, columns, stride, result.data(), top_k, threads});
  return result;
}

template <class T>
void select_everywhere() {
  std::mt19937 random(10);
  const float strange[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, -3e38f};
  for (const int64_t columns : {0, 1, 7, 8, 9, 15, 16, 17, 255, 256, 257, 511, 513, 1500}) {
    for (const int kind : {0, 1, 2, 3, 4}) {
      const int64_t rows = 3, gap = kind, stride = columns + gap;
      const Exact<T> scores(extent(rows, stride, columns), gap);
      fill_normal(scores, random);
      if (kind == 1) fill_whole(scores, random, 3);
      for (int64_t i = 0; i < scores.size(); ++i) {
        if (kind == 2) narrow(strange[random() % 10], &scores[i]);
        if (kind == 3) narrow(static_cast<float>(i), &scores[i]);           // each beats all before it
        if (kind == 4) narrow(i % 100 < 98 ? -INFINITY : 0.0f, &scores[i]);  // hardly anything can be selected
      }
      for (const int64_t top_k : {1, 2, 15, 16, 17, 256, 600, 2048}) {
        const Exact<int32_t> expected = selected(specification, scores, rows, columns, stride, top_k, 1);
        for (const IndexerKernels* kernels : usable_kernels())
          for (const int threads : {1, 3}) CHECK(selected(*kernels, scores, rows, columns, stride, top_k, threads) == expected);
      }
    }
  }
}

TEST(indexer_select_float) { select_everywhere<float>(); }
TEST(indexer_select_bf16) { select_everywhere<bf16>(); }

TEST(indexer_select_meaning) {
  const float values[] = {1, NAN, -0.0f, 0.0f, -INFINITY, 1, -2, 1};
  const Exact<float> scores(8);
  std::memcpy(scores.data(), values, sizeof values);
  for (const IndexerKernels* kernels : usable_kernels()) {
    const int32_t three[] = {0, 1, 5}, five[] = {0, 1, 2, 5, 7}, all[] = {0, 1, 2, 3, 5, 6, 7, -1, -1};
    CHECK(std::memcmp(selected(*kernels, scores, 1, 8, 8, 3, 1).data(), three, sizeof three) == 0);
    CHECK(std::memcmp(selected(*kernels, scores, 1, 8, 8, 5, 1).data(), five, sizeof five) == 0);
    CHECK(std::memcmp(selected(*kernels, scores, 1, 8, 8, 9, 1).data(), all, sizeof all) == 0);
  }
}

}  // namespace
}  // namespace glm5::tests
