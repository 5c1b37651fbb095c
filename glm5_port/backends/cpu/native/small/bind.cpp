#include "small/small.h"

#include "binding.h"

namespace glm5 {

void bind_small(nanobind::module_& module) {
  module.def(
      "norm",
      [](int isa, Address x, bool is_bf16, int64_t rows, int64_t width, int64_t stride, Address residual, int64_t residual_stride, Address sum,
         Address weight, Address bias, bool centred, float eps, Address y, int threads) {
        small_for(static_cast<Isa>(isa)).norm({at<void>(x), is_bf16, rows, width, stride, at<void>(residual), residual_stride, at<void>(sum),
                                               at<float>(weight), at<float>(bias), centred, eps, at<void>(y), threads});
      },
      released());
  module.def(
      "rotate",
      [](int isa, Address x, bool is_bf16, int64_t tokens, int64_t heads, int64_t width, int64_t token_stride, int64_t head_stride,
         Address cosine, Address sine, int64_t pairs, int64_t start, bool interleaved, Address y, int threads) {
        small_for(static_cast<Isa>(isa)).rotate({at<void>(x), is_bf16, tokens, heads, width, token_stride, head_stride, at<float>(cosine),
                                                 at<float>(sine), pairs, start, interleaved, at<void>(y), threads});
      },
      released());
  module.def(
      "route_experts",
      [](int isa, Address hidden, bool is_bf16, int64_t tokens, int64_t width, int64_t stride, Address gate, int64_t gate_stride,
         int64_t experts, Address correction_bias, int64_t top_k, int64_t groups, int64_t groups_kept, bool renormalise, float scale,
         Address weights, Address ids, int threads) {
        small_for(static_cast<Isa>(isa)).route({at<void>(hidden), is_bf16, tokens, width, stride, at<void>(gate), gate_stride, experts,
                                                at<float>(correction_bias), top_k, groups, groups_kept, renormalise, scale,
                                                at<float>(weights), at<int32_t>(ids), threads});
      },
      released());
}

}  // namespace glm5
