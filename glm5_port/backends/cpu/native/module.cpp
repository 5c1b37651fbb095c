#include "binding.h"

NB_MODULE(_native, module) {
  using namespace glm5;
  module.doc() = "Native CPU kernels; glm5_port.backends.cpu.native is the interface.";
  module.def("isa_name", [](int isa) { return isa_name(static_cast<Isa>(isa)); });
  module.def("isa_missing", [](int isa) { return isa_missing(static_cast<Isa>(isa)); });
  module.attr("isa_count") = isa_count;
  bind_limits(module);
  bind_quantize(module);
  bind_matmul(module);
  bind_indexer(module);
  bind_small(module);
  bind_attention(module);
  bind_cache(module);
}
