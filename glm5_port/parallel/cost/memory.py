"""Bytes of a device: weights and cache exactly (sharding.py), and what a runtime and its buffers take."""

from __future__ import annotations

from dataclasses import dataclass

from glm5_port.config import Glm5Config
from glm5_port.parallel.plan import ALL_REDUCE, DECODE, Layout
from glm5_port.parallel.sharding import rank_cache_bytes_per_token, rank_weights
from glm5_port.parallel.topology import Topology

RUNTIME = 4 * 10**9
"""Driver context, allocator, captured graphs and the collective library's own buffers: 3-4 GB in vLLM and SGLang."""
BLOCK_SIZE = 64
"""Tokens of a cache page."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the fullest device of a role.

    Attributes:
        stage: of the pipeline that has least room.
        capacity: as the driver reports it.
        weights: exact, as stored.
        buffers: activations of a step and of the exchange of experts.
        runtime: `RUNTIME`.
        cache_per_token: of a token of one attention group.
    """

    stage: int
    capacity: int
    weights: int
    buffers: int
    runtime: int
    cache_per_token: int

    @property
    def pool(self) -> int:
        """Bytes that are left for the cache; below zero where the weights do not fit."""
        return self.capacity - self.weights - self.buffers - self.runtime

    def tokens(self) -> int:
        """Tokens of an attention group that can be cached: whole pages."""
        return max(self.pool, 0) // (self.cache_per_token * BLOCK_SIZE) * BLOCK_SIZE

    def sequences(self, context: int) -> int:
        """Sequences of an attention group that fit with all their pages."""
        pages = -(-context // BLOCK_SIZE) * BLOCK_SIZE
        return self.tokens() // pages


def buffers(config: Glm5Config, layout: Layout, tokens: int) -> int:
    """Activations of a step of T tokens of an attention group, at their widest, and the exchange of experts twice (both ways).

    T / context (4 h + 2 heads / tensor (C + R + V) + top_k 2) 2 bytes + received tokens x (h + 2 expert_width) 2 bytes

    Source: tensors that are alive at once in our decoder layer; DeepEP and MC2 hold both directions.
    """
    own = -(-tokens // layout.context)
    heads = config.num_attention_heads // layout.tensor
    attention = 4 * config.hidden_size + 2 * heads * (config.kv_lora_rank + config.qk_rope_head_dim + config.v_head_dim)
    widest = own * (attention + 2 * config.index_topk) * 2
    if layout.exchange == ALL_REDUCE:
        received = tokens * config.num_experts_per_tok / layout.expert
    else:
        received = tokens * layout.data * config.num_experts_per_tok / layout.expert
    return int(widest + received * (config.hidden_size + 2 * config.moe_intermediate_size / layout.expert_tensor) * 2)


def device_memory(
    config: Glm5Config,
    topology: Topology,
    layout: Layout,
    weights: str,
    kv_format: str,
    role: str,
    chunk: int,
    sequences: int = 256,
) -> DeviceMemory:
    """Memory of the stage that has least room for the cache.

    Args:
        config, topology, layout, weights, kv_format: what runs on what, how.
        role: "decode" never computes a chunk of a prompt.
        chunk: tokens of a prompt that are computed at once.
        sequences: of a decode step, for its buffers.
    """
    tokens = (1 + layout.drafts) * sequences if role == DECODE else chunk
    capacity = int(topology.chip.memory.value or 0)
    found = []
    for stage in range(layout.pipeline):
        found.append(
            DeviceMemory(
                stage=stage,
                capacity=capacity,
                weights=rank_weights(config, weights, layout, stage).total,
                buffers=buffers(config, layout, tokens),
                runtime=RUNTIME,
                cache_per_token=rank_cache_bytes_per_token(config, kv_format, layout, stage),
            )
        )
    return min(found, key=lambda each: each.pool / each.cache_per_token)
