#include "binding.h"
#include "matmul/matmul.h"
#include "parallel.h"

namespace glm5 {
namespace {

constexpr int emulated_tiles = isa_count;  // beside the instruction sets, for tests

const MatmulKernels& kernels_of(int isa) {
#if defined(__x86_64__)
  if (isa == emulated_tiles) return avx512_bf16::matmul_by_emulated_tiles;
#endif
  return matmul_for(static_cast<Isa>(isa));
}

Int4Weight int4_weight(Address codes, Address scales, int64_t rows, int64_t width, int64_t group) {
  return {{rows, width, group == per_channel ? width : group}, at<uint8_t>(codes), at<bf16>(scales)};
}

DenseWeight dense_weight(Address data, bool is_bf16, int64_t rows, int64_t width, int64_t stride) {
  const int64_t bytes = is_bf16 ? sizeof(bf16) : sizeof(float);
  return {{rows, width, width}, at<uint8_t>(data), bytes, stride * bytes};
}

void prepare_int4(Address packed, Address scales, int64_t row_bytes, int64_t row_scales, Address codes, Address panel_scales, int64_t rows,
                  int64_t width, int64_t group, int threads) {
  const Int4Weight weight = int4_weight(codes, panel_scales, rows, width, group);
  parallel_for(threads, weight.panels(), [&](int64_t panel) {
    fill_panels(at<uint8_t>(packed), at<bf16>(scales), row_bytes, row_scales, weight, panel, panel + 1);
  });
}

// gate and up of INT4 experts lie one behind the other, then those of the next expert.
void int4_experts(int isa, bool int8_activations, bool activation_groups, Address hidden, bool is_bf16, int64_t tokens, int64_t stride, Address route_weights,
                  Address ids, int64_t choices, int64_t experts, Address gate_up_codes, Address gate_up_scales, Address down_codes,
                  Address down_scales, int64_t width, int64_t between, int64_t group, Address y, int threads) {
  Int4Weight gate = int4_weight(gate_up_codes, gate_up_scales, between, width, group), up = gate;
  Int4Weight down = int4_weight(down_codes, down_scales, width, between, group);
  const int64_t half_codes = gate.panels() * gate.units() * unit_bytes, half_scales = gate.panels() * gate.groups() * panel_rows;
  up.codes += half_codes;
  up.scales += half_scales;
  gate.expert_codes = up.expert_codes = 2 * half_codes;
  gate.expert_scales = up.expert_scales = 2 * half_scales;
  down.expert_codes = down.panels() * down.units() * unit_bytes;
  down.expert_scales = down.panels() * down.groups() * panel_rows;
  const MatmulKernels& kernels = kernels_of(isa);
  (int8_activations ? kernels.int4_int8_experts : kernels.int4_experts)({at<void>(hidden), is_bf16, tokens, stride, at<float>(route_weights),
                                                                         at<int32_t>(ids), choices, experts, gate, up, down, at<void>(y),
                                                                         threads, activation_groups});
}

// Strides in elements; `up` begins where the gate's `between` rows end.
void dense_experts(int isa, Address hidden, bool is_bf16, int64_t tokens, int64_t stride, Address route_weights, Address ids,
                   int64_t choices, int64_t experts, Address gate_up, int64_t gate_up_stride, int64_t gate_up_expert, Address down,
                   int64_t down_stride, int64_t down_expert, int64_t width, int64_t between, Address y, int threads) {
  DenseWeight gate = dense_weight(gate_up, is_bf16, between, width, gate_up_stride), up = gate;
  DenseWeight down_weight = dense_weight(down, is_bf16, width, between, down_stride);
  up.data += between * up.row_bytes;
  gate.expert_bytes = up.expert_bytes = gate_up_expert * gate.element_bytes;
  down_weight.expert_bytes = down_expert * gate.element_bytes;
  kernels_of(isa)
      .dense_experts({at<void>(hidden), is_bf16, tokens, stride, at<float>(route_weights), at<int32_t>(ids), choices, experts, gate, up,
                      down_weight, at<void>(y), threads});
}

}  // namespace

void bind_matmul(nanobind::module_& module) {
  module.attr("emulated_tiles") = emulated_tiles;
  module.def("prepare_int4", prepare_int4, released());
  module.def("int4_experts", int4_experts, released());
  module.def("dense_experts", dense_experts, released());
  module.def(
      "int4_matmul",
      [](int isa, Address x, bool is_bf16, int64_t rows, int64_t stride, Address codes, Address scales, int64_t outputs, int64_t width,
         int64_t group, Address y, int threads) {
        const Int4Weight weight = int4_weight(codes, scales, outputs, width, group);
        kernels_of(isa).int4_matmul({at<void>(x), is_bf16, rows, stride, weight, at<void>(y), threads});
      },
      released());
  module.def(
      "int8_matmul",
      [](int isa, Address x, bool is_bf16, int64_t rows, int64_t stride, Address codes, int64_t row_bytes, Address scales, int64_t outputs,
         int64_t width, Address y, int threads) {
        const Int8Weight weight = {{outputs, width, width}, at<int8_t>(codes), row_bytes, at<float>(scales)};
        kernels_of(isa).int8_matmul({at<void>(x), is_bf16, rows, stride, weight, at<void>(y), threads});
      },
      released());
  module.def(
      "linear",
      [](int isa, Address x, bool is_bf16, int64_t rows, int64_t stride, Address data, int64_t row_stride, int64_t outputs, int64_t width,
         Address y, int threads) {
        const DenseWeight weight = dense_weight(data, is_bf16, outputs, width, row_stride);
        kernels_of(isa).linear({at<void>(x), is_bf16, rows, stride, weight, at<void>(y), threads});
      },
      released());
}

}  // namespace glm5
