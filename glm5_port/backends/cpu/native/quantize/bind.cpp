#include "binding.h"
#include "quantize/quantize.h"

namespace glm5 {

void bind_quantize(nanobind::module_& module) {
  module.attr("quantize_statistics_count") = statistics_count;
  module.def(
      "int4_quantize",
      [](int isa, Address weight, bool is_bf16, int64_t rows, int64_t width, int64_t stride, int64_t group, Address packed, Address scales,
         Address statistics, int threads) {
        quantize_for(static_cast<Isa>(isa)).int4_quantize(
            {at<void>(weight), is_bf16, rows, width, stride, group, at<uint32_t>(packed), at<bf16>(scales),
             at<float>(statistics), threads});
      },
      released());
  module.def(
      "int4_dequantize",
      [](int isa, Address packed, int64_t packed_stride, Address scales, int64_t scale_stride, int64_t rows, int64_t width, int64_t group,
         Address values, int threads) {
        quantize_for(static_cast<Isa>(isa)).int4_dequantize(
            {at<uint32_t>(packed), packed_stride, at<bf16>(scales), scale_stride, rows, width, group, at<bf16>(values), threads});
      },
      released());
}

}  // namespace glm5
