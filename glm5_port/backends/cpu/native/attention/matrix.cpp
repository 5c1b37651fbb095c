// Attention on pairs of bfloat16 numbers, where queries and cache are made of such; weights are rounded to bfloat16, sums are
// float.
#include "attention/expanded.h"
#include "attention/heads.h"

namespace glm5 {
namespace {

struct PairUnit {
  using Word = uint32_t;
  static constexpr int64_t depth = 2;
  struct Operand {
    __m512bh v;
  };
  static Operand broadcast(const Word* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))};
  }
  static Operand load(const Word* from) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(from))}; }
  static F32 multiply_add(Operand a, Operand b, F32 sum) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
  static Operand load_row(const bf16* numbers) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(numbers))}; }

  static F32 words(const bf16* numbers) { return {_mm512_castsi512_ps(_mm512_loadu_si512(numbers))}; }

  using Numbers = __m256i;  // bfloat16
  static Numbers numbers(F32 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }
  static Numbers numbers(const bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  template <class T>
  static Numbers numbers(const T* from) {
    return numbers(glm5::load_numbers(from));
  }
  static Numbers load_numbers(const Word* row, int64_t first) { return numbers(reinterpret_cast<const bf16*>(row) + first); }
  static void store_numbers(Numbers numbers, Word* row, int64_t first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(row) + first), numbers);
  }
  static void store_words(const Numbers* rows, Word* to) {
    const __m512i even = _mm512_cvtepu16_epi32(rows[0]), odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rows[1]), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(even, odd));
  }
};

const AttentionKernels& floats() { return avx512::attention; }

bool is_made_of_pairs(const AttentionCall& call) { return call.is_bf16 && call.cache.format != RowFormat::float32; }

void attend(const AttentionCall& call) { is_made_of_pairs(call) ? attend_latent<PairUnit>(call) : floats().attend(call); }

void attend_expanded(const ExpandedCall& call) {
  is_made_of_pairs(call.attention) ? attend_expanded_heads<PairUnit>(call) : floats().attend_expanded(call);
}

void multiply_heads(const HeadsCall& call) {
  call.is_bf16 ? multiply_heads<PairUnit, bf16>(call) : floats().multiply_heads(call);
}

}  // namespace

namespace GLM5_ISA {
const AttentionKernels attention = {attend, attend_expanded, multiply_heads};
}
}  // namespace glm5
