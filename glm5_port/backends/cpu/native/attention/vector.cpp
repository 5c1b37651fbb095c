// Attention on float operands, whatever the dtype of queries and cache.
#include "attention/expanded.h"
#include "attention/heads.h"

namespace glm5 {
namespace {

void attend(const AttentionCall& call) { attend_latent<FloatUnit>(call); }
void attend_expanded(const ExpandedCall& call) { attend_expanded_heads<FloatUnit>(call); }
void multiply_heads(const HeadsCall& call) {
  call.is_bf16 ? multiply_heads<FloatUnit, bf16>(call) : multiply_heads<FloatUnit, float>(call);
}

}  // namespace

namespace GLM5_ISA {
const AttentionKernels attention = {attend, attend_expanded, multiply_heads};
}
}  // namespace glm5
