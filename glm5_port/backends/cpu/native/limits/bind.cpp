#include "binding.h"
#include "limits/limits.h"

namespace glm5 {

void bind_limits(nanobind::module_& module) {
  module.def(
      "limit_read",
      [](int isa, Address from, int64_t bytes, int threads) {
        return limits_for(static_cast<Isa>(isa)).read(at<void>(from), bytes, threads);
      },
      released());
  module.def(
      "limit_multiply",
      [](int isa, int kind, int64_t repeats, int threads) {
        return limits_for(static_cast<Isa>(isa)).multiply(static_cast<Product>(kind), repeats, threads);
      },
      released());
}

}  // namespace glm5
