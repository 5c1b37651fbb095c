// Rows of the cache that will be read soon. Selected rows lie anywhere, so no hardware foresees them: their lines are asked for a
// few at a time between the products of the block before, and arrive behind its arithmetic.
#pragma once

#include "attention/attention.h"

namespace glm5 {
namespace {

class Upcoming {
 public:
  static constexpr int64_t line = 64;

  Upcoming(const LatentCache& cache, const LatentRow* rows, int64_t count) : rows_(rows), count_(count) {
    const int64_t number = cache.format == RowFormat::float32 ? 4 : 2;
    const bool whole = cache.format == RowFormat::fp8 || cache.format == RowFormat::int8;
    latent_bytes_ = whole ? quantised_row_bytes : cache.latent_width * number;
    rope_bytes_ = whole ? 0 : cache.rope_width * number;
  }

  // Spreads all lines over this many calls of `fetch`.
  void spread(int64_t calls) {
    const int64_t lines = count_ * (blocks_of(latent_bytes_, line) + blocks_of(rope_bytes_, line));
    lines_of_call_ = blocks_of(lines, larger(1, calls));
  }

  void fetch() { fetch(lines_of_call_); }
  void fetch_all() { fetch(INT64_MAX); }

 private:
  void fetch(int64_t lines) {
    for (; lines > 0 && row_ < count_; --lines) {
      const bool in_latent = byte_ < latent_bytes_;
      __builtin_prefetch(in_latent ? rows_[row_].latent + byte_ : rows_[row_].rope + byte_ - latent_bytes_, 0, 2);
      byte_ = in_latent && byte_ + line > latent_bytes_ ? latent_bytes_ : byte_ + line;
      if (byte_ >= latent_bytes_ + rope_bytes_) byte_ = 0, ++row_;
    }
  }

  const LatentRow* rows_;
  int64_t count_, latent_bytes_, rope_bytes_, lines_of_call_ = 0, row_ = 0, byte_ = 0;
};

}  // namespace
}  // namespace glm5
