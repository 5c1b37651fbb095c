"""Work on a device: rooflines, max(operations / (F e), bytes / (W e_memory)). Letters as in step.py.

Constants are from public kernels on H200 (aiconfigurator's tables, Apache-2.0); docs/parallel.md says which of its rows were
used to fit them and which test them.
"""

from __future__ import annotations

import math

from glm5_port.parallel.cost.step import COMPUTE_DTYPE, WEIGHT_BYTES, Step, cache_row
from glm5_port.parallel.cost.terms import COMPUTE, FIXED, NOTHING, Cost, term
from glm5_port.parallel.plan import ALL_REDUCE

ELEMENTWISE_PASSES = 30
"""Times that norms, rotations, quantisation, residuals and gates read or write a token's hidden state, in a layer."""
TOP_K_PASSES = 4
"""Times that a radix selection reads float32 scores: 4,096 x 128K scores in 1.8 ms on H200."""
IMBALANCE_PER_DOUBLING, LARGEST_IMBALANCE, BALANCED = 0.05, 1.30, 1.05


def imbalance(step: Step) -> float:
    """Largest load of an expert group over the mean: 1 + 0.05 log2(groups), at most 1.30; 1.05 with redundant experts.

    Source: SGLang on 96 H100: 1.18 with 1.49x by EPLB in prefill; 1.25-1.3 without EPLB at 32-72 groups, 1.0-1.05 with it.
    """
    if step.layout.expert == 1:
        return 1.0
    free = min(1 + IMBALANCE_PER_DOUBLING * math.log2(step.layout.expert), LARGEST_IMBALANCE)
    return min(BALANCED, free) if step.layout.redundant_experts else free


def _matmul(step: Step, parameters: float, tokens: float, layers: int) -> Cost:
    """Dense projections of `layers` layers: 2 parameters tokens operations, weights once a call."""
    operations, read = 2 * parameters * tokens, parameters * WEIGHT_BYTES[step.weights][0] * step.calls
    seconds = step.roofline(operations, read, "dense", COMPUTE_DTYPE[step.weights])
    return Cost(seconds * layers, operations * layers, read * layers)


@term("attention projections", COMPUTE)
def attention_projections(step: Step) -> Cost:
    """(whole + heads / tensor) parameters a layer: roofline(2 parameters T / context, parameters w).

    whole = h (q_lora + latent + rope) is computed on every rank of a tensor group; heads = the up-projections and o_proj.

    Source: shapes of the checkpoint; DESIGN of MLA (arXiv 2405.04434).
    """
    size = step.size
    return _matmul(step, size.attention_whole + size.attention_heads / step.layout.tensor, step.rank_tokens, size.layers)


@term("sparse attention", COMPUTE)
def sparse_attention(step: Step) -> Cost:
    """Absorbed attention over the c latents that a token selects: 2 H (2 C + R) c operations a token, H heads of a rank, at
    least the block
    that a kernel always computes; reads c latent rows a token in decode (drafts select for themselves), the cache once a call in
    prefill. A prompt within top_k is attended densely, expanded: 2 H (K + V) s / 2.

    Source: FlashMLA's sparse kernels; 4,096 tokens in 2.0 ms on H200 (aiconfigurator, GLM-5) are reproduced at e = 0.60.
    """
    config, layout = step.config, step.layout
    heads = config.num_attention_heads / layout.tensor * layout.decode_context
    block = step.topology.chip.head_block.value or 1
    selected, row = step.mean_selected, cache_row(config, step.kv_format)[0]
    absorbed = 2 * max(heads, block) * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    if step.is_decode:
        selected /= layout.decode_context
        read = step.tokens * selected * row
        operations = absorbed * selected * step.tokens
    else:
        read = step.calls * step.sequences * step.context * row
        expanded = 2 * heads * (config.qk_head_dim + config.v_head_dim) * step.mean_keys
        dense = step.context <= config.index_topk
        operations = (min(expanded, absorbed * selected) if dense else absorbed * selected) * step.rank_tokens
    seconds = step.roofline(operations, read, "attention", "bf16")
    return Cost(seconds, operations, read) * step.size.layers


@term("indexer projections", COMPUTE)
def indexer_projections(step: Step) -> Cost:
    """Queries, key and head weights of the indexer, on layers that own one: roofline(2 parameters T / context, parameters w). Not
    divided by `tensor`.

    Source: shapes of the checkpoint; GLM-5.2 runs it on 21 of 78 layers (IndexShare).
    """
    return _matmul(step, step.size.indexer, step.rank_tokens, step.size.indexed)


@term("indexer scores", COMPUTE)
def indexer_scores(step: Step) -> Cost:
    """2 heads width s operations a token against every cached key (half of them on average in a prompt), in 8 bits where the
    chip has them; decode reads every index key once a sequence. The only term that grows with the context.

    Source: arXiv 2512.02556 (DSA); e = 0.45 is 4,096 queries x 128K keys in 5.0 ms on H200 (aiconfigurator).
    """
    config = step.config
    if step.context <= config.index_topk:
        return NOTHING  # everything is selected
    keys = step.mean_keys
    operations = 2 * config.index_n_heads * config.index_head_dim * keys * step.rank_tokens
    read = step.sequences * step.context * cache_row(config, step.kv_format)[1] * step.calls
    dtype = "bf16" if step.kv_format == "plain" else step.kv_format
    return Cost(step.roofline(operations, read, "indexer", dtype), operations, read) * step.size.indexed


@term("top-k selection", COMPUTE)
def top_k_selection(step: Step) -> Cost:
    """Four passes over float32 scores: 16 s bytes a token / (W e_memory).

    Source: four passes are 4,096 x 128K scores in 1.8 ms on H200 (aiconfigurator); the time depends on the data by up to 2.8x.
    """
    if step.context <= step.config.index_topk:
        return NOTHING
    read = 4.0 * TOP_K_PASSES * step.mean_keys * step.rank_tokens
    return Cost(read / step.memory_rate, 0.0, read) * step.size.indexed


@term("elementwise", COMPUTE)
def elementwise(step: Step) -> Cost:
    """Thirty passes over the bf16 hidden states: 60 h T / context / (W e_memory) a layer.

    Source: counted in our own portable layer: norms, rotations, gates, residuals, quantisation, routing.
    """
    read = 2.0 * ELEMENTWISE_PASSES * step.config.hidden_size * step.rank_tokens
    return Cost(read / step.memory_rate, 0.0, read) * step.size.layers


@term("dense MLP", COMPUTE)
def dense_mlp(step: Step) -> Cost:
    """3 h intermediate / tensor parameters, on the layers without experts: roofline(2 parameters T, parameters w).

    Source: shapes of the checkpoint.
    """
    dense_layers = step.size.layers - step.size.moe
    return _matmul(step, step.size.dense / step.layout.tensor, step.rank_tokens, dense_layers) if dense_layers else NOTHING


@term("shared expert", COMPUTE)
def shared_expert(step: Step) -> Cost:
    """3 h shared parameters a layer with experts: roofline(2 parameters T / context, parameters w). Where every rank has every
    token (all_reduce) a rank has 1 / tensor of the parameters, elsewhere 1 / tensor of the tokens.

    Source: shapes of the checkpoint; the whole shared expert on each rank as in SGLang with DeepEP.
    """
    tensor = step.layout.tensor
    if step.layout.exchange == ALL_REDUCE:
        return _matmul(step, step.size.shared / tensor, step.rank_tokens, step.size.moe)
    return _matmul(step, step.size.shared, step.rank_tokens / tensor, step.size.moe)


@term("routed experts", COMPUTE)
def routed_experts(step: Step) -> Cost:
    """N = n T tokens of the stage meet the experts of a rank: imbalance x 2 N k / expert x parameters / expert_tensor
    operations; reads the experts that any token chose, E (1 - (1 - k / E)^N) / expert of them, once a call.

    Source: uniform routing (GLM-5 has one routing group); imbalance as measured by SGLang on 96 H100.
    """
    config, layout = step.config, step.layout
    k, routed = config.num_experts_per_tok, config.n_routed_experts
    width = step.size.expert / layout.expert_tensor
    operations = imbalance(step) * 2 * step.stage_tokens * k / layout.expert * width
    chosen = -math.expm1(step.stage_tokens / step.calls * math.log1p(-k / routed)) if k < routed else 1.0
    read = step.experts_per_rank * chosen * width * WEIGHT_BYTES[step.weights][1] * step.calls
    return Cost(step.roofline(operations, read, "grouped", COMPUTE_DTYPE[step.weights]), operations, read) * step.size.moe


@term("LM head", COMPUTE)
def lm_head(step: Step) -> Cost:
    """vocabulary h / tensor parameters in 16 bits, for every token of a decode step and the last of a prompt.

    Source: shapes of the checkpoint; no release quantises the head.
    """
    parameters = step.config.vocab_size * step.config.hidden_size / step.layout.tensor
    tokens = step.tokens if step.is_decode else step.sequences
    operations, read = 2 * parameters * tokens, 2 * parameters
    return Cost(step.roofline(operations, read, "dense", "bf16"), operations, read)


@term("launches", FIXED)
def launches(step: Step) -> Cost:
    """Time that every layer takes however little there is to do: layers x calls x the chip's layer_overhead.

    Source: fitted by chip (data/chips); 40-130 us on NVIDIA. It is the least known term.
    """
    return Cost((step.topology.chip.layer_overhead.value or 0.0) * step.size.layers * step.calls)
