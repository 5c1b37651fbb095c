// The emulated tile unit does what the instructions are documented to do.
#include "tests/harness.h"
#include "tiles.h"

namespace glm5::tests {
namespace {

// Tiles 0 and 1 as the processor shapes them; what is multiplied by what.
TileShapes shapes_of(int64_t rows, int64_t words, int64_t columns) {
  TileShapes shapes;
  shapes.of[0] = {rows, 4 * columns};
  shapes.of[1] = {rows, 4 * words};
  shapes.of[2] = {words, 4 * columns};
  return shapes;
}

TEST(tiles_bytes) {
  std::mt19937 random(1);
  for (const int64_t rows : {1, 3, 16})
    for (const int64_t words : {1, 8, 16})
      for (const int64_t columns : {1, 5, 16}) {
        const Exact<int8_t> a(rows * words * 4), b(words * columns * 4);
        const Exact<int32_t> sums(rows * columns), start(rows * columns);
        for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(i % 7 == 0 ? -128 : random());
        for (int64_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(i % 5 == 0 ? -128 : random());
        for (int64_t i = 0; i < start.size(); ++i) start[i] = i % 2 ? INT32_MAX : static_cast<int32_t>(i);  // some begin anew
        TileUnit unit(shapes_of(rows, words, columns));
        unit.load<0>(start.data(), 4 * columns);
        unit.load<1>(a.data(), 4 * words);
        unit.load<2>(b.data(), 4 * columns);
        unit.add_byte_products<0, 1, 2>();
        unit.store<0>(sums.data(), 4 * columns);
        for (int64_t m = 0; m < rows; ++m)
          for (int64_t n = 0; n < columns; ++n) {
            int64_t expected = start[m * columns + n];
            for (int64_t i = 0; i < 4 * words; ++i) expected += a[m * words * 4 + i] * b[(i / 4 * columns + n) * 4 + i % 4];
            CHECK(sums[m * columns + n] == static_cast<int32_t>(static_cast<uint32_t>(expected)));
          }
      }
}

// One output of two pairs: what instructions compute from `a`, `b` and a sum so far.
float pairs(const float (&a)[4], const float (&b)[4], float so_far) {
  bf16 left[4], right[4];
  for (int i = 0; i < 4; ++i) left[i] = round_to_bf16(a[i]), right[i] = round_to_bf16(b[i]);
  TileUnit unit(shapes_of(1, 2, 1));
  unit.load<0>(&so_far, 4);
  unit.load<1>(left, 8);
  unit.load<2>(right, 4);
  unit.add_products<0, 1, 2>();
  float sum;
  unit.store<0>(&sum, 4);
  return sum;
}

TEST(tiles_pairs) {
  CHECK(pairs({1, 2, 3, 4}, {5, 6, 7, 8}, 9) == 79);
  CHECK(pairs({0x1p24f, 1, -0x1p24f, 1}, {1, 1, 1, 1}, 0.5f) == 2.5f);  // first numbers and second ones have sums of their own
  CHECK(pairs({1, 0, 1, 0}, {0x1p24f, 0, 1, 0}, -0x1p24f) == 0);        // which begin at zero, and enter the tile in the end
  CHECK(pairs({1 + 0x1p-7f, 0, 1 + 0x1p-7f, 0}, {1 - 0x1p-8f, 0, -1, 0}, 0) == (1 + 0x1p-7f) * (1 - 0x1p-8f) - (1 + 0x1p-7f));
  CHECK(pairs({0x1p-127f, 0, 0, 0}, {0x1p100f, 0, 0, 0}, 0) == 0);      // subnormal numbers are zeros
  CHECK(pairs({0x1p-100f, 0, 0, 0}, {0x1p-30f, 0, 0, 0}, 0) == 0);      // sums too
  CHECK(pairs({0, 0, 0, 0}, {0, 0, 0, 0}, 0x1p-127f) == 0);
  CHECK(std::isnan(pairs({INFINITY, 0, 0, 0}, {0, 0, 0, 0}, 1)));
}

// A tile is empty where its shape ends, and nothing beyond is touched.
TEST(tiles_shapes) {
  TileShapes shapes;
  shapes.of[3] = {2, 8};
  TileUnit unit(shapes);
  const Exact<int32_t> all(256), corner(4);
  for (int64_t i = 0; i < 256; ++i) all[i] = static_cast<int32_t>(i);
  unit.load<3>(all.data(), 64);
  unit.store<3>(corner.data(), 8);
  CHECK(corner[0] == 0 && corner[1] == 1 && corner[2] == 16 && corner[3] == 17);
  unit.load<4>(all.data(), 64);
  unit.zero<4>();
  unit.store<4>(all.data(), 64);
  for (int64_t i = 0; i < 256; ++i) CHECK(all[i] == 0);
}

}  // namespace
}  // namespace glm5::tests
