// Attention on float operands, whatever the dtype of queries and cache.
#include "attention/expanded.h"

namespace glm5 {
namespace {

void attend(const AttentionCall& call) { attend_latent<FloatUnit>(call); }
void attend_expanded(const ExpandedCall& call) { attend_expanded_heads<FloatUnit>(call); }

}  // namespace

namespace GLM5_ISA {
const AttentionKernels attention = {attend, attend_expanded};
}
}  // namespace glm5
