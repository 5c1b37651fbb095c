// Sequences of packed tokens over a paged cache, for the families that read one.
#pragma once

#include <algorithm>
#include <numeric>

#include "tests/harness.h"

namespace glm5::tests {

// A sequence of `tokens` new tokens, the last of which is the `length`th.
struct Sequence {
  int32_t tokens, length;
};

// Pages lie in no order, and the table has -1 where a sequence needs none. Rows of the table are `gap` entries apart.
struct Paging {
  Paging(const std::vector<Sequence>& sequences_, int64_t padding, int64_t page_size_, int64_t gap, std::mt19937& random)
      : sequences(sequences_.size()), page_size(page_size_), starts(sequences + 1), lengths(sequences), table(0) {
    starts[0] = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      starts[i + 1] = starts[i] + sequences_[i].tokens;
      lengths[i] = sequences_[i].length;
      columns = larger(columns, blocks_of(sequences_[i].length, page_size));
      pages += blocks_of(sequences_[i].length, page_size);
    }
    tokens = starts[sequences] + padding;
    table_stride = columns + gap;
    table = Exact<int32_t>(extent(sequences, table_stride, columns));
    std::vector<int32_t> free(pages);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random);
    for (int64_t i = 0; i < table.size(); ++i) table[i] = -1;
    for (int64_t i = 0, next = 0; i < sequences; ++i)
      for (int64_t j = 0; j < blocks_of(lengths[i], page_size); ++j) table[i * table_stride + j] = free[next++];
  }

  // How many of its own sequence's keys a token sees; 0 for padding.
  int64_t visible(int64_t token) const {
    for (int64_t i = 0; i < sequences; ++i)
      if (token < starts[i + 1]) return larger(0, lengths[i] - starts[i + 1] + token + 1);
    return 0;
  }

  int64_t sequences, page_size, pages = 0, columns = 0, table_stride = 0, tokens = 0;
  Exact<int32_t> starts, lengths, table;
};

// One token of a batch as a batch of its own.
struct Alone {
  Alone(const Paging& paging, int64_t token) : starts(2), length(1) {
    while (token >= paging.starts[sequence + 1]) ++sequence;
    starts[1] = 1;
    length[0] = static_cast<int32_t>(paging.visible(token));
    table = paging.table.data() + sequence * paging.table_stride;
  }
  int64_t sequence = 0;
  Exact<int32_t> starts, length;
  const int32_t* table;
};

}  // namespace glm5::tests
