#include <nanobind/stl/tuple.h>

#include <tuple>

#include "binding.h"
#include "cache/cache.h"

namespace glm5 {
namespace {

using RowsIn = std::tuple<Address, int64_t, int64_t, bool>;  // as NewRows
using FieldIn = std::tuple<Address, int64_t, int64_t>;  // as CacheTensor
using SlotsIn = std::tuple<Address, int64_t, int64_t>;  // as Slots

NewRows rows_of(const RowsIn& in) {
  const auto [data, stride, width, is_bf16] = in;
  return {at<void>(data), stride, width, is_bf16};
}

CacheTensor field_of(const FieldIn& in) {
  const auto [data, page_stride, row_stride] = in;
  return {at<uint8_t>(data), page_stride, row_stride};
}

Slots slots_of(const SlotsIn& in) {
  const auto [slots, tokens, page_size] = in;
  return {at<int64_t>(slots), tokens, page_size};
}

const CacheKernels& kernels(int isa) { return cache_for(static_cast<Isa>(isa)); }

}  // namespace

void bind_cache(nanobind::module_& module) {
  module.def(
      "cache_copy",
      [](int isa, Address rows, int64_t stride, int64_t bytes, const FieldIn& field, const SlotsIn& slots, int threads) {
        kernels(isa).copy({at<uint8_t>(rows), stride, bytes, field_of(field), slots_of(slots), threads});
      },
      released());
  module.def(
      "cache_write_latent",
      [](int isa, const RowsIn& latent, const RowsIn& rope, const FieldIn& row, bool is_fp8, const SlotsIn& slots, int threads) {
        kernels(isa).write_latent({rows_of(latent), rows_of(rope), field_of(row), is_fp8, slots_of(slots), threads});
      },
      released());
  module.def(
      "cache_write_index",
      [](int isa, const RowsIn& key, const FieldIn& values, const FieldIn& scale, bool is_fp8, const SlotsIn& slots,
         int threads) {
        kernels(isa).write_index({rows_of(key), field_of(values), field_of(scale), is_fp8, slots_of(slots), threads});
      },
      released());
}

}  // namespace glm5
