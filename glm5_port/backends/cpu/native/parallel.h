// Work shared among threads. It is cut into blocks that do not depend on the number of threads, and every block is computed by
// one thread from beginning to end: the bits are the same for any number of threads, and for any order of the blocks.
#pragma once

#include <cstdint>

namespace glm5 {
namespace {

// Calls body(block) for each of 0 .. blocks-1. Free threads take the next block, so blocks may differ in cost.
// `threads` is torch.get_num_threads(): OpenMP itself does not know what torch was told.
template <class Body>
void parallel_for(int threads, int64_t blocks, const Body& body) {
  if (threads <= 1 || blocks <= 1) {
    for (int64_t block = 0; block < blocks; ++block) body(block);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) body(block);
}

}  // namespace
}  // namespace glm5
