#include <sys/mman.h>

#include "binding.h"
#include "matmul/matmul.h"
#include "parallel.h"

namespace glm5 {
namespace {

// Whole pages of two megabytes inside a new tensor: fewer look-ups of addresses while weights stream. Refusal costs speed only.
void advise_huge_pages(Address address, int64_t bytes) {
  constexpr Address page = 2 << 20;
  const Address first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
#ifdef MADV_HUGEPAGE
  if (first < last) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#endif
}

void prepare_int4(Address packed, Address scales, int64_t row_bytes, int64_t row_scales, Address codes, Address panel_scales, int64_t rows,
                  int64_t width, int64_t group, int threads) {
  const Int4Weight weight = {at<uint8_t>(codes), at<bf16>(panel_scales), rows, width, group};
  parallel_for(threads, weight.panels(), [&](int64_t panel) {
    fill_panels(at<uint8_t>(packed), at<bf16>(scales), row_bytes, row_scales, weight, panel, panel + 1);
  });
}

}  // namespace

void bind_matmul(nanobind::module_& module) {
  module.attr("matmul_panel_rows") = panel_rows;
  module.attr("matmul_unit_inputs") = unit_inputs;
  module.def("advise_huge_pages", advise_huge_pages);
  module.def("prepare_int4", prepare_int4, released());
  module.def(
      "int4_matmul",
      [](int isa, Address x, bool is_bf16, int64_t rows, int64_t stride, Address codes, Address scales, int64_t outputs, int64_t width,
         int64_t group, Address y, int threads) {
        matmul_for(static_cast<Isa>(isa)).int4_matmul(
            {at<void>(x), is_bf16, rows, stride, {at<uint8_t>(codes), at<bf16>(scales), outputs, width, group}, at<void>(y), threads});
      },
      released());
  module.def(
      "int4_experts",
      [](int isa, Address hidden, bool is_bf16, int64_t tokens, int64_t stride, Address route_weights, Address ids, int64_t choices,
         int64_t experts, Address gate_up_codes, Address gate_up_scales, Address down_codes, Address down_scales, int64_t width,
         int64_t between, int64_t group, Address y, int threads) {
        Int4ExpertsCall call = {};
        call.hidden = at<void>(hidden);
        call.is_bf16 = is_bf16;
        call.tokens = tokens;
        call.stride = stride;
        call.route_weights = at<float>(route_weights);
        call.ids = at<int32_t>(ids);
        call.choices = choices;
        call.experts = experts;
        const int64_t width_group = group == per_channel ? width : group, between_group = group == per_channel ? between : group;
        call.gate = {at<uint8_t>(gate_up_codes), at<bf16>(gate_up_scales), between, width, width_group};
        call.down = {at<uint8_t>(down_codes), at<bf16>(down_scales), width, between, between_group};
        const int64_t half_codes = call.gate.panels() * call.gate.units() * unit_bytes;
        const int64_t half_scales = call.gate.panels() * call.gate.groups() * panel_rows;
        call.up = call.gate;
        call.up.codes += half_codes;
        call.up.scales += half_scales;
        call.gate_up_codes = 2 * half_codes;
        call.gate_up_scales = 2 * half_scales;
        call.down_codes = call.down.panels() * call.down.units() * unit_bytes;
        call.down_scales = call.down.panels() * call.down.groups() * panel_rows;
        call.y = at<void>(y);
        call.threads = threads;
        matmul_for(static_cast<Isa>(isa)).int4_experts(call);
      },
      released());
}

}  // namespace glm5
