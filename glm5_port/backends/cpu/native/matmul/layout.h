// How the kernels find weights. Those in floating point and INT8 are as the operators declare them. INT4 weights are kept in
// panels of 16 output rows, so that a panel is read from beginning to end as one stream.
//
// A unit is 32 consecutive inputs of one group. Groups whose length is no multiple of 32 are padded with zeros up to one.
//
//     codes   [panels][groups * units][16 rows][16 bytes]   the canonical bytes: q + 8 of input 2i and 2i + 1 in byte i
//     scales  [panels][groups][16 rows]                     bfloat16; zero in rows beyond the last
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace glm5 {

constexpr int64_t per_channel = -1;  // as a group size: a whole row
constexpr int64_t panel_rows = 16, unit_inputs = 32, unit_bytes = panel_rows * unit_inputs / 2;

// What any weight is cut into.
struct Shape {
  int64_t rows, width, group;  // outputs, inputs, inputs of a group (all of them where there are no groups)

  int64_t panels() const { return (rows + panel_rows - 1) / panel_rows; }
  int64_t groups() const { return width / group; }
  int64_t units_of_group() const { return (group + unit_inputs - 1) / unit_inputs; }
  int64_t units() const { return groups() * units_of_group(); }
  int64_t padded_width() const { return units() * unit_inputs; }
};

struct Int4Weight : Shape {
  const uint8_t* codes;
  const bf16* scales;
  int64_t expert_codes = 0, expert_scales = 0;  // from one expert to the next

  const uint8_t* at(int64_t panel, int64_t unit) const { return codes + (panel * units() + unit) * unit_bytes; }
  const bf16* scales_of(int64_t panel) const { return scales + panel * groups() * panel_rows; }
  Int4Weight of_expert(int64_t expert) const {
    Int4Weight mine = *this;
    mine.codes += expert * expert_codes;
    mine.scales += expert * expert_scales;
    return mine;
  }
};

// Rows of float or bfloat16, `row_bytes` apart.
struct DenseWeight : Shape {
  const uint8_t* data;
  int64_t element_bytes, row_bytes, expert_bytes = 0;

  const uint8_t* at(int64_t panel, int64_t unit) const { return data + panel * panel_rows * row_bytes + unit * unit_inputs * element_bytes; }
  DenseWeight of_expert(int64_t expert) const {
    DenseWeight mine = *this;
    mine.data += expert * expert_bytes;
    return mine;
  }
};

// Rows of codes, `row_bytes` apart, and a scale for each.
struct Int8Weight : Shape {
  const int8_t* codes;
  int64_t row_bytes;
  const float* scales;
};

namespace {

// Canonical words and scales of one matrix into panels first .. last - 1; memory is written from beginning to end.
inline void fill_panels(const uint8_t* packed, const bf16* scales, int64_t row_bytes, int64_t row_scales, const Int4Weight& weight,
                        int64_t first, int64_t last) {
  const int64_t groups = weight.groups(), units = weight.units_of_group(), group_bytes = weight.group / 2;
  for (int64_t panel = first; panel < last; ++panel) {
    uint8_t* codes = const_cast<uint8_t*>(weight.at(panel, 0));
    bf16* steps = const_cast<bf16*>(weight.scales_of(panel));
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t row = 0; row < panel_rows; ++row, ++steps) {
        const int64_t from = panel * panel_rows + row;
        *steps = from < weight.rows ? scales[from * row_scales + group] : bf16{0};
      }
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t start = unit * unit_inputs / 2, bytes = smaller(group_bytes - start, unit_inputs / 2);
        for (int64_t row = 0; row < panel_rows; ++row, codes += unit_inputs / 2) {
          const int64_t from = panel * panel_rows + row;
          if (bytes < unit_inputs / 2 || from >= weight.rows) std::memset(codes, 0x88, unit_inputs / 2);
          if (from < weight.rows) std::memcpy(codes, packed + from * row_bytes + group * group_bytes + start, bytes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace glm5
