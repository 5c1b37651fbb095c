#include "attention/attention.h"
#include "tests/harness.h"
#include "tests/paging.h"

namespace glm5::tests {
namespace {

constexpr RowFormat formats[] = {RowFormat::float32, RowFormat::bfloat16, RowFormat::fp8, RowFormat::int8};

struct Shape {
  RowFormat format;
  bool is_bf16;
  int64_t heads, latent, rope, gap;

  bool quantised() const { return format == RowFormat::fp8 || format == RowFormat::int8; }
  int64_t number() const { return format == RowFormat::float32 ? 4 : 2; }
  int64_t latent_bytes() const { return quantised() ? quantised_row_bytes : latent * number(); }
  int64_t rope_bytes() const { return quantised() ? 0 : rope * number(); }
};

template <class T>
void store(T x, uint8_t* to) {
  std::memcpy(to, &x, sizeof x);
}

// Numbers of the type of activations, in bytes: float or bfloat16.
struct Numbers {
  Numbers(bool is_bf16_, int64_t count, int64_t shift, std::mt19937& random, float deviation = 1)
      : is_bf16(is_bf16_), size(is_bf16 ? 2 : 4), bytes(count * size, shift * size) {
    std::normal_distribution<float> normal(0, deviation);
    for (int64_t i = 0; i < count; ++i) set(i, normal(random));
  }
  void set(int64_t i, float x) const { is_bf16 ? store(round_to_bf16(x), &bytes[i * size]) : store(x, &bytes[i * size]); }
  float operator[](int64_t i) const {
    float x;
    bf16 half;
    std::memcpy(&x, &bytes[i * size], size);
    std::memcpy(&half, &bytes[i * size], 2);
    return is_bf16 ? widen(half) : x;
  }
  int64_t count() const { return bytes.size() / size; }
  bool is_bf16;
  int64_t size;
  Exact<uint8_t> bytes;
};

// What a call of either kind reads; rows of the cache lie at any byte, and those that no sequence has reached hold NaN.
struct Case {
  Case(const Shape& shape_, Paging paging_, std::mt19937& random)
      : shape(shape_), paging(std::move(paging_)), latent_stride(shape.latent_bytes() + shape.gap), rope_stride(shape.rope_bytes() + shape.gap),
        latent_page(paging.page_size * latent_stride + shape.gap), rope_page(paging.page_size * rope_stride + shape.gap),
        latent_rows(extent(paging.pages, latent_page, extent(paging.page_size, latent_stride, shape.latent_bytes())), shape.gap),
        rope_rows(extent(paging.pages, rope_page, extent(paging.page_size, rope_stride, shape.rope_bytes())), shape.gap),
        rope_query(queries(shape.rope, random)) {
    for (int64_t i = 0; i < latent_rows.size(); ++i) latent_rows[i] = 0xFF;
    for (int64_t i = 0; i < rope_rows.size(); ++i) rope_rows[i] = 0xFF;
    for (int64_t i = 0; i < paging.sequences; ++i)
      for (int64_t position = 0; position < paging.lengths[i]; ++position) write_row(i, position, random);
  }

  int64_t head_stride(int64_t width) const { return width + shape.gap; }
  int64_t token_stride(int64_t width) const { return shape.heads * head_stride(width) + shape.gap; }
  Numbers queries(int64_t width, std::mt19937& random) const {
    return Numbers(shape.is_bf16, extent(paging.tokens, token_stride(width), extent(shape.heads, head_stride(width), width)), shape.gap, random);
  }

  uint8_t* latent_row(int64_t sequence, int64_t position) const { return place(latent_rows, latent_page, latent_stride, sequence, position); }
  uint8_t* rope_row(int64_t sequence, int64_t position) const { return place(rope_rows, rope_page, rope_stride, sequence, position); }
  uint8_t* place(const Exact<uint8_t>& rows, int64_t page_stride, int64_t row_stride, int64_t sequence, int64_t position) const {
    const int64_t page = paging.table[sequence * paging.table_stride + position / paging.page_size];
    return rows.data() + page * page_stride + position % paging.page_size * row_stride;
  }
  void write_number(uint8_t* row, int64_t i, float x) const {
    shape.format == RowFormat::float32 ? store(x, row + 4 * i) : store(round_to_bf16(x), row + 2 * i);
  }

  void write_row(int64_t sequence, int64_t position, std::mt19937& random) const {
    std::normal_distribution<float> normal;
    uint8_t* row = latent_row(sequence, position);
    if (!shape.quantised()) {
      for (int64_t c = 0; c < shape.latent; ++c) write_number(row, c, normal(random));
      for (int64_t r = 0; r < shape.rope; ++r) write_number(rope_row(sequence, position), r, normal(random));
      return;
    }
    const bool fp8 = shape.format == RowFormat::fp8;
    for (int64_t c = 0; c < quantised_latent; ++c) row[c] = static_cast<uint8_t>(random()) & (fp8 ? 0xBF : 0xFF);  // below 2, or any
    uint8_t* behind = row + quantised_latent;
    for (int64_t r = 0; r < quantised_rope; ++r)
      store(round_to_bf16(normal(random)), behind + (fp8 ? 4 * quantised_groups : 0) + 2 * r);
    for (int64_t g = 0; g < quantised_groups; ++g)
      store((fp8 ? 1.0f : 0.01f) * (1 + static_cast<float>(g)), behind + (fp8 ? 0 : 2 * quantised_rope) + 4 * g);
  }

  AttentionCall call(const Numbers& query, int64_t width, const Exact<uint8_t>& out, int threads) const {
    const LatentCache cache = {shape.format, {latent_rows.data(), latent_page, latent_stride}, {rope_rows.data(), rope_page, rope_stride},
                               paging.pages, paging.page_size, shape.latent, shape.rope};
    const Batch batch = {paging.starts.data(), paging.lengths.data(), paging.table.data(), paging.sequences, paging.columns, paging.table_stride};
    return {{query.bytes.data(), token_stride(width), head_stride(width)}, {rope_query.bytes.data(), token_stride(shape.rope), head_stride(shape.rope)},
            shape.is_bf16, paging.tokens, shape.heads, cache, batch, nullptr, -1, 0, scale, out.data(), threads};
  }

  Shape shape;
  Paging paging;
  int64_t latent_stride, rope_stride, latent_page, rope_page;
  Exact<uint8_t> latent_rows, rope_rows;
  Numbers rope_query;
  float scale = 0.1f;
};

// The same call for one token of the batch.
AttentionCall alone(const AttentionCall& call, const Alone& token, int64_t number, const Exact<uint8_t>& out) {
  const int64_t size = call.is_bf16 ? 2 : 4;
  AttentionCall one = call;
  one.query.data = static_cast<const uint8_t*>(call.query.data) + number * call.query.token_stride * size;
  one.query_rope.data = static_cast<const uint8_t*>(call.query_rope.data) + number * call.query_rope.token_stride * size;
  one.batch = {token.starts.data(), token.length.data(), token.table, 1, call.batch.columns, call.batch.table_stride};
  if (call.indices) one.indices += number * call.index_stride;
  one.tokens = 1;
  one.out = out.data();
  return one;
}

float at(bool is_bf16, const Exact<uint8_t>& bytes, int64_t i) {
  float x = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&x) + (is_bf16 ? 2 : 0), &bytes[i * (is_bf16 ? 2 : 4)], is_bf16 ? 2 : 4);
  return x;
}

// Results are rounded once to their type, and float sums differ from those in double; pairs of bfloat16 also round weights, and
// expanded keys and values.
void close(Isa isa, const Shape& shape, const Exact<uint8_t>& result, const Exact<uint8_t>& expected) {
  const int64_t count = expected.size() / (shape.is_bf16 ? 2 : 4);
  float most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::fmax(most, std::fabs(at(shape.is_bf16, expected, i)));
  const bool pairs = isa >= Isa::avx512_bf16 && shape.is_bf16 && shape.format != RowFormat::float32;
  for (int64_t i = 0; i < count; ++i) {
    const float theirs = at(shape.is_bf16, expected, i), error = std::fabs(at(shape.is_bf16, result, i) - theirs);
    CHECK(error <= (shape.is_bf16 ? std::fabs(theirs) / 128 : 0) + most * (pairs ? 0.01f : 1e-5f));
  }
}

// `run(isa, call)` computes; every instruction set is close to the specification, has the same bits on any number of threads,
// and gives a token alone the bits that it has in the batch.
template <class Run>
void compare(const Case& made, const Numbers& query, int64_t query_width, int64_t out_width, const Exact<int32_t>* indices, int64_t index_count,
             const Run& run) {
  const int64_t row = made.shape.heads * out_width * query.size, stride = index_count + made.shape.gap;
  const auto result_of = [&](Isa isa, int threads) {
    Exact<uint8_t> out(made.paging.tokens * row);
    for (int64_t i = 0; i < out.size(); ++i) out[i] = 0xFF;
    AttentionCall call = made.call(query, query_width, out, threads);
    if (indices) call.indices = indices->data(), call.index_count = index_count, call.index_stride = stride;
    run(isa, call);
    return out;
  };
  const Exact<uint8_t> expected = result_of(Isa::scalar, 1);
  for (const Isa isa : usable_isas()) {
    const Exact<uint8_t> result = result_of(isa, 1);
    close(isa, made.shape, result, expected);
    for (const int threads : {2, 3}) CHECK(result_of(isa, threads) == result);
    if (made.paging.tokens == 0 || made.paging.starts[made.paging.sequences] == 0) continue;
    const int64_t token = made.paging.starts[made.paging.sequences] - 1;
    const Exact<uint8_t> one(row);
    AttentionCall call = made.call(query, query_width, result, 1);
    if (indices) call.indices = indices->data(), call.index_count = index_count, call.index_stride = stride;
    const Alone place(made.paging, token);
    run(isa, alone(call, place, token, one));
    CHECK(std::memcmp(one.data(), &result[token * row], row) == 0);
  }
}

void attend_everywhere(const Case& made, std::mt19937& random, int64_t index_count) {
  const int64_t width = made.shape.latent, stride = index_count + made.shape.gap;
  const Numbers query = made.queries(width, random);
  const auto run = [](Isa isa, const AttentionCall& call) { attention_for(isa).attend(call); };
  if (index_count < 0) return compare(made, query, width, width, nullptr, -1, run);
  const Exact<int32_t> indices(extent(made.paging.tokens, stride, index_count), made.shape.gap);
  for (int64_t i = 0; i < indices.size(); ++i) {  // seen and not seen, more than once, nothing, and far away
    const int32_t most = static_cast<int32_t>(made.paging.columns * made.paging.page_size);
    indices[i] = random() % 5 == 0 ? -1 : random() % 19 == 0 ? INT32_MAX : static_cast<int32_t>(random() % (most + 2));
  }
  compare(made, query, width, width, &indices, index_count, run);
}

void expand_everywhere(const Case& made, std::mt19937& random, int64_t nope, int64_t value) {
  const Shape& shape = made.shape;
  const Numbers query = made.queries(nope, random);
  const float deviation = 1 / std::sqrt(static_cast<float>(shape.latent));
  const Numbers keys(shape.is_bf16, shape.heads * nope * shape.latent, shape.gap, random, deviation);
  const Numbers values(shape.is_bf16, shape.heads * value * shape.latent, shape.gap, random, deviation);
  compare(made, query, nope, value, nullptr, -1, [&](Isa isa, const AttentionCall& call) {
    attention_for(isa).attend_expanded({call, keys.bytes.data(), values.bytes.data(), nope, value});
  });
}

Shape shape_of(RowFormat format, bool is_bf16, int64_t heads, int64_t latent, int64_t rope, int64_t gap) {
  const bool plain = format == RowFormat::float32 || format == RowFormat::bfloat16;
  return {format, is_bf16, heads, plain ? latent : quantised_latent, plain ? rope : quantised_rope, gap};
}

const std::vector<Sequence> unequal = {{1, 5}, {0, 9}, {2, 2}, {3, 21}};

TEST(attention_widths) {
  std::mt19937 random(1);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16}) {
    for (const bool is_bf16 : {false, true}) {
      int64_t gap = 0;
      for (const int64_t latent : {1, 8, 9, 15, 17, 33, 64, 65, 130}) {
        const Shape shape = shape_of(format, is_bf16, 2, latent, 1 + latent % 19, gap = (gap + 1) % 3);
        for (const int64_t index_count : {-1, 7})
          attend_everywhere(Case(shape, Paging(unequal, 2, 3, gap, random), random), random, index_count);
      }
    }
  }
}

TEST(attention_numbers_of_heads) {
  std::mt19937 random(2);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16})
    for (const int64_t heads : {1, 5, 6, 7, 15, 17, 31, 32, 33, 49, 64, 65, 70})
      attend_everywhere(Case(shape_of(format, true, heads, 20, 6, 1), Paging({{2, 9}}, 1, 4, 0, random), random), random, 6);
}

TEST(attention_numbers_of_keys) {
  std::mt19937 random(3);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16})
    for (const int32_t length : {1, 2, 3, 5, 6, 7, 63, 64, 65, 127, 128, 129, 130, 257, 511, 512, 513, 1100})
      for (const int64_t index_count : {int64_t{-1}, int64_t{length}})
        attend_everywhere(Case(shape_of(format, true, 3, 10, 4, 0), Paging({{1, length}, {1, 3}}, 0, 16, 0, random), random), random, index_count);
}

TEST(attention_quantised_rows) {
  std::mt19937 random(4);
  for (const RowFormat format : {RowFormat::fp8, RowFormat::int8})
    for (const bool is_bf16 : {false, true})
      for (const int64_t index_count : {-1, 1, 6, 70})
        for (const int64_t gap : {0, 1})
          attend_everywhere(Case(shape_of(format, is_bf16, 3, 0, 0, gap), Paging({{2, 3}, {1, 71}}, 1, 8, gap, random), random), random, index_count);
}

TEST(attention_expanded) {
  std::mt19937 random(5);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16}) {
    for (const bool is_bf16 : {false, true}) {
      int64_t gap = 0;
      for (const int64_t width : {1, 7, 8, 9, 16, 17, 33, 63, 65, 130}) {
        const Shape shape = shape_of(format, is_bf16, 2, 1 + width * 3 % 50, 1 + width % 19, gap = (gap + 1) % 3);
        expand_everywhere(Case(shape, Paging(unequal, 2, 3, gap, random), random), random, width, 1 + width * 7 % 90);
      }
    }
  }
}

TEST(attention_expanded_numbers_of_keys) {
  std::mt19937 random(6);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16})
    for (const int32_t length : {1, 63, 64, 65, 129, 257, 600}) {
      const std::vector<Sequence> sequences = {{std::min(length, 70), length}, {2, 3}};
      expand_everywhere(Case(shape_of(format, true, 2, 10, 4, 0), Paging(sequences, 0, 16, 0, random), random), random, 6, 9);
    }
}

TEST(attention_expanded_quantised_rows) {
  std::mt19937 random(7);
  for (const RowFormat format : {RowFormat::fp8, RowFormat::int8})
    for (const bool is_bf16 : {false, true})
      expand_everywhere(Case(shape_of(format, is_bf16, 2, 0, 0, 1), Paging({{2, 3}, {3, 20}}, 1, 8, 1, random), random), random, 20, 9);
}

// More tokens than are computed in one run; only the last of them see a key.
TEST(attention_expanded_runs) {
  std::mt19937 random(8);
  expand_everywhere(Case(shape_of(RowFormat::bfloat16, true, 1, 8, 2, 0), Paging({{4100, 20}}, 1, 8, 0, random), random), random, 4, 3);
}

TEST(attention_nothing) {
  std::mt19937 random(9);
  for (const RowFormat format : formats) {
    const Shape shape = shape_of(format, true, 2, 8, 4, 0);
    for (const int64_t padding : {0, 3}) {
      for (const std::vector<Sequence>& sequences : {std::vector<Sequence>{}, {{0, 5}}, {{2, 0}}}) {
        attend_everywhere(Case(shape, Paging(sequences, padding, 4, 0, random), random), random, -1);
        attend_everywhere(Case(shape, Paging(sequences, padding, 4, 0, random), random), random, 0);
        expand_everywhere(Case(shape, Paging(sequences, padding, 4, 0, random), random), random, 4, 3);
      }
    }
  }
}

// Whole numbers: every instruction set must compute the same ones.
template <class T>
void multiply_heads(int64_t tokens, int64_t heads, int64_t width_in, int64_t width_out, std::mt19937& random) {
  const int64_t gap = tokens % 3, head_stride = width_in + gap, token_stride = heads * head_stride + gap, row_stride = width_in + width_out % 3;
  const int64_t weight_stride = width_out * row_stride + 1;
  const Exact<T> x(extent(tokens, token_stride, extent(heads, head_stride, width_in)), gap);
  const Exact<T> weight(extent(heads, weight_stride, extent(width_out, row_stride, width_in)), 1);
  fill_whole(x, random, 3), fill_whole(weight, random, 3);
  const auto multiplied = [&](Isa isa, int threads) {
    Exact<T> y(tokens * heads * width_out);
    attention_for(isa).multiply_heads({x.data(), token_stride, head_stride, sizeof(T) == 2, tokens, heads, width_in, width_out, weight.data(),
                                       weight_stride, row_stride, y.data(), threads});
    return y;
  };
  const Exact<T> expected = multiplied(Isa::scalar, 2);
  for (const Isa isa : usable_isas()) {
    for (const int threads : {1, 3}) {
      const Exact<T> y = multiplied(isa, threads);
      for (int64_t i = 0; i < y.size(); ++i) CHECK(widen(y[i]) == widen(expected[i]));
    }
  }
}

template <class T>
void multiply_heads_everywhere() {
  std::mt19937 random(11);
  for (const int64_t width_in : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) multiply_heads<T>(3, 2, width_in, 7, random);
  for (const int64_t width_out : {1, 2, 3, 4, 5, 6, 7, 11, 47, 48, 49, 100}) multiply_heads<T>(2, 3, 20, width_out, random);
  for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 257}) multiply_heads<T>(tokens, 2, 33, 8, random);
  multiply_heads<T>(3, 1, 4099, 7, random);  // more numbers than a span has
}

TEST(attention_heads_bf16) { multiply_heads_everywhere<bf16>(); }
TEST(attention_heads_float) { multiply_heads_everywhere<float>(); }

// With scale 0 every visible row counts the same: the result is the mean of their positions.
TEST(attention_meaning) {
  std::mt19937 random(10);
  for (const RowFormat format : {RowFormat::float32, RowFormat::bfloat16}) {
    Case made(shape_of(format, false, 2, 3, 2, 0), Paging({{2, 4}, {3, 7}}, 1, 2, 1, random), random);
    made.scale = 0;
    for (int64_t i = 0; i < made.paging.sequences; ++i)
      for (int64_t position = 0; position < made.paging.lengths[i]; ++position)
        for (int64_t c = 0; c < 3; ++c) made.write_number(made.latent_row(i, position), c, static_cast<float>(10 * i + position));
    const Numbers query = made.queries(3, random), weights(false, 2 * 1 * 3, 0, random);
    for (int64_t i = 0; i < 6; ++i) weights.set(i, i % 3 == 0 ? 2 : 0);
    const Exact<int32_t> indices(6 * 3);
    const int32_t chosen[] = {0, 2, 3, 0, 2, 3, -1, 4, 0, 5, 5, 1, 6, 7, -1, 0, 1, 2};
    std::memcpy(indices.data(), chosen, sizeof chosen);
    const float all[] = {1, 1.5f, 12, 12.5f, 13, 0}, some[] = {1, 5 / 3.0f, 12, 41 / 3.0f, 16, 0};
    for (const Isa isa : usable_isas()) {
      const Exact<uint8_t> out(6 * 2 * 3 * 4), narrow_out(6 * 2 * 1 * 4);
      attention_for(isa).attend(made.call(query, 3, out, 1));
      for (int64_t i = 0; i < 36; ++i) CHECK(std::fabs(at(false, out, i) - all[i / 6]) < 1e-5f);
      attention_for(isa).attend_expanded({made.call(query, 1, narrow_out, 1), weights.bytes.data(), weights.bytes.data(), 1, 1});
      for (int64_t i = 0; i < 12; ++i) CHECK(std::fabs(at(false, narrow_out, i) - 2 * all[i / 2]) < 1e-5f);
      AttentionCall sparse = made.call(query, 3, out, 1);
      sparse.indices = indices.data(), sparse.index_count = sparse.index_stride = 3;
      attention_for(isa).attend(sparse);
      for (int64_t i = 0; i < 36; ++i) CHECK(std::fabs(at(false, out, i) - some[i / 6]) < 1e-5f);
    }
  }
}

}  // namespace
}  // namespace glm5::tests
