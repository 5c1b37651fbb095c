"""What each operator means: contract, reference, static facts, fake, error budget. Imports no backend.

norm              rms_norm, add_rms_norm
linear            linear, linear_per_head, gated_mlp
moe               route_experts, expert_mlp
exchange          dispatch_tokens, combine_tokens
int4              int4_quantize, int4_dequantize, int4_matmul, int8_matmul, expert_mlp_int4, expert_mlp_int4_w4a8
int4_measured     int4_quantize_measured
rope              rotate, and the plain function rotary_angles
indexer           indexer_prologue, indexer_scores, select_top_k, lightning_indexer
cache             write_cache, CacheLayout; the built-in layouts are in cache_layouts
mla               mla_project, mla_prologue, mla_prologue_into_cache, mla_attention_expanded, mla_attention_absorbed,
                  attention_output
sparse_attention  sparse_mla_attention
"""

from glm5_port.operators import cache_layouts as cache_layouts
from glm5_port.operators.cache import write_cache
from glm5_port.operators.exchange import combine_tokens, dispatch_tokens
from glm5_port.operators.indexer import indexer_prologue, indexer_scores, lightning_indexer, select_top_k
from glm5_port.operators.int4 import (
    expert_mlp_int4,
    expert_mlp_int4_w4a8,
    int4_dequantize,
    int4_matmul,
    int4_quantize,
    int8_matmul,
)
from glm5_port.operators.int4_measured import int4_quantize_measured
from glm5_port.operators.linear import gated_mlp, linear, linear_per_head
from glm5_port.operators.mla import (
    attention_output,
    mla_attention_absorbed,
    mla_attention_expanded,
    mla_project,
    mla_prologue,
    mla_prologue_into_cache,
)
from glm5_port.operators.moe import expert_mlp, route_experts
from glm5_port.operators.norm import add_rms_norm, rms_norm
from glm5_port.operators.rope import rotate
from glm5_port.operators.sparse_attention import sparse_mla_attention

__all__ = [
    "add_rms_norm",
    "attention_output",
    "combine_tokens",
    "dispatch_tokens",
    "expert_mlp",
    "expert_mlp_int4",
    "expert_mlp_int4_w4a8",
    "gated_mlp",
    "indexer_prologue",
    "indexer_scores",
    "int4_dequantize",
    "int4_matmul",
    "int4_quantize",
    "int4_quantize_measured",
    "int8_matmul",
    "lightning_indexer",
    "linear",
    "linear_per_head",
    "mla_attention_absorbed",
    "mla_attention_expanded",
    "mla_project",
    "mla_prologue",
    "mla_prologue_into_cache",
    "rms_norm",
    "rotate",
    "route_experts",
    "select_top_k",
    "sparse_mla_attention",
    "write_cache",
]
