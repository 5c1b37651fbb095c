// The best scores of a stream, kept while it passes: a bar rises, and what does not reach it is dropped at once. For files that are
// compiled for a vector instruction set.
#pragma once

#include "indexer/indexer.h"
#include "simd.h"

namespace glm5 {
namespace {

// -- one bit a lane ----------------------------------------------------------------------------------------------------

inline uint32_t first_lanes(int64_t count) { return count >= I32::width ? (1u << I32::width) - 1 : (1u << count) - 1; }

#if defined(__AVX512F__)
inline uint32_t greater(I32 a, I32 b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
inline uint32_t equal(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
// Writes a whole vector: the chosen lanes first, in order, and anything behind them. Storing through the mask itself is slow.
inline void store_chosen(I32 x, uint32_t lanes, int32_t* to) { I32{_mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), x.v)}.store(to); }
inline I32 lane_numbers() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

// Numbers in the order of selection as integers: NaN, of any sign, is the highest; zeros are equal.
inline I32 order_of(F32 score) {
  const __m512 one_zero = _mm512_add_ps(score.v, _mm512_setzero_ps());
  const __m512i bits = _mm512_castps_si512(one_zero);
  const __m512i flipped = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
  return {_mm512_mask_mov_epi32(flipped, _mm512_cmp_ps_mask(score.v, score.v, _CMP_UNORD_Q), _mm512_set1_epi32(INT32_MAX))};
}
#else
inline uint32_t mask_of(__m256i x) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }
inline uint32_t greater(I32 a, I32 b) { return mask_of(_mm256_cmpgt_epi32(a.v, b.v)); }
inline uint32_t equal(I32 a, I32 b) { return mask_of(_mm256_cmpeq_epi32(a.v, b.v)); }
// Writes a whole vector: the chosen lanes first, in order, and anything behind them.
inline void store_chosen(I32 x, uint32_t lanes, int32_t* to) {
  const uint64_t bytes = _pdep_u64(lanes, 0x0101010101010101) * 0xFF;
  const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(_pext_u64(0x0706050403020100, bytes)));
  I32{_mm256_permutevar8x32_epi32(x.v, _mm256_cvtepu8_epi32(order))}.store(to);
}
inline I32 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }

// Numbers in the order of selection as integers: NaN, of any sign, is the highest; zeros are equal.
inline I32 order_of(F32 score) {
  const __m256 one_zero = _mm256_add_ps(score.v, _mm256_setzero_ps());
  const __m256i bits = _mm256_castps_si256(one_zero);
  const __m256i flipped = _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(score.v, score.v, _CMP_UNORD_Q));
  return {_mm256_blendv_epi8(flipped, _mm256_set1_epi32(INT32_MAX), nan)};
}
#endif

constexpr int32_t order_of_nothing = static_cast<int32_t>(0xFF800000 ^ 0x7FFFFFFF);  // of -inf, which is never selected

// -- the best of a stream ----------------------------------------------------------------------------------------------

// The `kept` best of what is offered, by the tie rule. Positions are offered in ascending order, so a later score that only
// equals the bar loses by its position. What is kept stays in order of position.
class Candidates {
 public:
  static constexpr int64_t chunk = 256;  // offered at once, at most

  // Integers of memory that one needs.
  static int64_t room(int64_t kept) { return 2 * capacity(kept); }

  void begin(int32_t* memory, int64_t kept) {
    orders_ = memory;
    positions_ = memory + capacity(kept);
    kept_ = kept;
    full_ = capacity(kept) - chunk - I32::width;
  }

  // Scores of the positions from `first` on.
  template <class T>
  void offer(const T* scores, int64_t first, int64_t count) {
    make_room();
    const I32 lanes = lane_numbers();
    int64_t i = 0;
    for (; i + I32::width <= count; i += I32::width) {
      take(order_of(F32::load(scores + i)), I32::broadcast(static_cast<int32_t>(first + i)) + lanes, first_lanes(I32::width));
    }
    if (i < count) {
      const F32 rest = load_first(scores + i, count - i);
      take(order_of(rest), I32::broadcast(static_cast<int32_t>(first + i)) + lanes, first_lanes(count - i));
    }
  }

  // What others kept of earlier positions than will be offered next. Whole vectors are read.
  void offer(const int32_t* orders, const int32_t* positions, int64_t count) {
    for (int64_t i = 0; i < count; i += I32::width) {
      if (i % chunk == 0) make_room();
      take(I32::load(orders + i), I32::load(positions + i), first_lanes(count - i));
    }
  }

  // Leaves exactly what is selected.
  void finish() { raise_bar(kept_); }

  int64_t count() const { return count_; }
  const int32_t* orders() const { return orders_; }
  const int32_t* positions() const { return positions_; }

 private:
  static int64_t capacity(int64_t kept) { return blocks_of(kept + larger(kept, 512) + chunk, I32::width) * I32::width + I32::width; }

  void take(I32 orders, I32 positions, uint32_t lanes) {
    const uint32_t chosen = greater(orders, I32::broadcast(bar_)) & lanes;
    if (!chosen) return;
    store_chosen(orders, chosen, orders_ + count_);
    store_chosen(positions, chosen, positions_ + count_);
    count_ += __builtin_popcount(chosen);
  }

  void make_room() {
    if (count_ > full_) raise_bar(kept_ + kept_ / 8);  // a bar that is found sooner, and keeps some more
  }

  int64_t count_above(int32_t bound) const {
    const I32 bounds = I32::broadcast(bound);
    int64_t above = 0, i = 0;
    for (; i + I32::width <= count_; i += I32::width) above += __builtin_popcount(greater(I32::load(orders_ + i), bounds));
    if (i < count_) above += __builtin_popcount(greater(I32::load(orders_ + i), bounds) & first_lanes(count_ - i));
    return above;
  }

  int32_t highest() const {
    I32 most = I32::broadcast(order_of_nothing);
    int64_t i = 0;
    for (; i + I32::width <= count_; i += I32::width) most = maximum(most, I32::load(orders_ + i));
    int32_t highest = most.largest();
    for (; i < count_; ++i) highest = orders_[i] > highest ? orders_[i] : highest;
    return highest;
  }

  // Drops until `most` are left at most, never one of the `kept` best: halves the range of bars until one leaves few enough, or
  // until a single value is left, whose lowest positions fill up to `kept`.
  void raise_bar(int64_t most) {
    if (count_ <= most) return;
    // Bars above which there are at least, and fewer than, `kept`. What equals the present bar is among the kept.
    int64_t enough = static_cast<int64_t>(bar_) - 1, few = highest();
    while (few - enough > 1) {
      const int64_t middle = enough + (few - enough) / 2;
      const int64_t above = count_above(static_cast<int32_t>(middle));
      if (above < kept_) {
        few = middle;
      } else {
        enough = middle;
        if (above <= most) return drop(static_cast<int32_t>(enough), 0);
      }
    }
    drop(static_cast<int32_t>(few), kept_ - count_above(static_cast<int32_t>(few)));
  }

  // Keeps what is above the bar, and the first `ties` that equal it.
  void drop(int32_t bar, int64_t ties) {
    const I32 bars = I32::broadcast(bar);
    const int64_t offered = count_;
    count_ = 0;
    for (int64_t i = 0; i < offered; i += I32::width) {
      const I32 orders = I32::load(orders_ + i), positions = I32::load(positions_ + i);
      const uint32_t lanes = first_lanes(offered - i);
      uint32_t tied = equal(orders, bars) & lanes;
      if (__builtin_popcount(tied) > ties) tied = _pdep_u32((1u << ties) - 1, tied);
      ties -= __builtin_popcount(tied);
      const uint32_t chosen = (greater(orders, bars) & lanes) | tied;
      store_chosen(orders, chosen, orders_ + count_);
      store_chosen(positions, chosen, positions_ + count_);
      count_ += __builtin_popcount(chosen);
    }
    bar_ = bar;
  }

  int32_t *orders_ = nullptr, *positions_ = nullptr;
  int64_t kept_ = 0, full_ = 0, count_ = 0;
  int32_t bar_ = order_of_nothing;
};

// A row of indices: what was selected, then -1.
inline void write_indices(const Candidates& best, int64_t top_k, int32_t* indices) {
  std::memcpy(indices, best.positions(), best.count() * sizeof(int32_t));
  for (int64_t i = best.count(); i < top_k; ++i) indices[i] = -1;
}

}  // namespace
}  // namespace glm5
