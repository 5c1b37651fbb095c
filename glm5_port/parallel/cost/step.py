"""Step: one forward pass of one attention group, and everything that a term may look at.

T tokens of an attention group in this pass, B sequences, n attention groups that work at the same time, h hidden size, k experts
of a token, E routed experts, P ranks of a stage, G devices of a machine, F operations a second, W bytes a second of memory, a
and b latency and bandwidth of a link, e_x the share of a peak that is reached.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from glm5_port.config import Glm5Config
from glm5_port.model.accounting import cache_bytes_per_token
from glm5_port.parallel.plan import DECODE, Layout
from glm5_port.parallel.topology import Topology

DEFAULT_EFFICIENCY = {"dense": 0.65, "grouped": 0.55, "attention": 0.60, "indexer": 0.45, "memory": 0.80}
"""Share of a chip's peak that kernels reach, where the chip's file does not say. dense, grouped, attention, memory: the usual
values for Hopper kernels; indexer: 4,096 queries against 128K keys in 5.0 ms on H200 (aiconfigurator's GLM-5 tables)."""
WEIGHT_BYTES = {"bf16": (2.0, 2.0), "fp8": (1.0, 1.0), "int4": (2.0, 0.5625), "w4a8": (1.0, 0.52)}
"""Bytes of a weight (attention and dense, routed experts), scales included, for the roofline. Memory is counted exactly
elsewhere."""
COMPUTE_DTYPE = {"bf16": "bf16", "fp8": "fp8", "int4": "bf16", "w4a8": "int8"}


class ModelSize(NamedTuple):
    """Parameters and layers that set the work of a step.

    Attributes:
        attention_whole: attention parameters of a layer that every rank of a tensor group multiplies.
        attention_heads: those that are divided by heads.
        indexer: parameters of an indexer.
        expert, shared, dense: parameters of a routed expert, the shared expert and a dense MLP.
        layers, indexed, moe: layers in all, with an indexer, and with experts.
    """

    attention_whole: int
    attention_heads: int
    indexer: int
    expert: int
    shared: int
    dense: int
    layers: int
    indexed: int
    moe: int


@lru_cache(maxsize=16)
def model_size(config: Glm5Config) -> ModelSize:
    """The sizes of a model's trunk."""
    h, heads = config.hidden_size, config.num_attention_heads
    return ModelSize(
        attention_whole=h * (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim),
        attention_heads=heads
        * (
            config.q_lora_rank * config.qk_head_dim
            + config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
            + config.v_head_dim * h
        ),
        indexer=config.index_n_heads * config.index_head_dim * config.q_lora_rank
        + h * (config.index_head_dim + config.index_n_heads),
        expert=3 * h * config.moe_intermediate_size,
        shared=3 * h * config.shared_intermediate_size,
        dense=3 * h * config.intermediate_size,
        layers=config.num_hidden_layers,
        indexed=len(config.full_layers),
        moe=len(config.moe_layers),
    )


@lru_cache(maxsize=16)
def mtp_size(config: Glm5Config) -> ModelSize:
    """The sizes of the MTP layer: one layer with an indexer and experts."""
    return model_size(config)._replace(layers=1, indexed=1, moe=1)


@lru_cache(maxsize=64)
def cache_row(config: Glm5Config, kv_format: str) -> tuple[float, float]:
    """Bytes of a token in one layer: latent and rope key, index key."""
    import torch

    total = cache_bytes_per_token(config, torch.bfloat16, kv_format)
    return total.latent / config.num_hidden_layers, total.index / max(len(config.full_layers), 1)


@dataclass(frozen=True)
class Step:
    """One forward pass.

    Attributes:
        config, topology, layout, weights, kv_format: what runs on what, how.
        phase: "prefill" or "decode".
        tokens: T, of one attention group; all chunks of a prompt together.
        sequences: B, of one attention group.
        context: tokens that are cached when the step ends, of each sequence.
        groups: attention groups that work at the same time.
        calls: kernel launches for each layer: chunks of the prompt.
        size: parameters and layers; of the MTP layer for a draft.
    """

    config: Glm5Config
    topology: Topology
    layout: Layout
    weights: str
    kv_format: str
    phase: str
    tokens: float
    sequences: float
    context: float
    groups: int
    calls: int
    size: ModelSize

    @property
    def work(self) -> tuple[Hashable, ...]:
        """What sets the work of a device, whatever the links: equal steps of one question compute the same."""
        return self.layout, self.phase, self.tokens, self.sequences, self.context, self.groups, self.calls, self.size

    @property
    def is_decode(self) -> bool:
        """Whether every sequence adds only its next tokens."""
        return self.phase == DECODE

    @property
    def rank_tokens(self) -> float:
        """Tokens whose attention a rank takes part in."""
        return self.tokens / self.layout.context

    @property
    def stage_tokens(self) -> float:
        """Tokens of all attention groups of a stage."""
        return self.tokens * self.groups

    @property
    def mean_keys(self) -> float:
        """Cached tokens before a token of this step, on average."""
        return self.context if self.is_decode else self.context - self.tokens / self.sequences / 2

    @property
    def mean_selected(self) -> float:
        """Tokens that a token of this step attends to, on average: the mean of min(position, top_k)."""
        top_k, last = self.config.index_topk, self.context
        if self.is_decode:
            return min(last, top_k)
        first = last - self.tokens / self.sequences
        ramp_first, ramp_last = min(first, top_k), min(last, top_k)
        ramp = (ramp_last**2 - ramp_first**2) / 2
        return (ramp + top_k * ((last - first) - (ramp_last - ramp_first))) / (last - first)

    @property
    def experts_per_rank(self) -> float:
        """Routed experts on a rank, redundant ones included."""
        return (self.config.n_routed_experts + self.layout.redundant_experts) / self.layout.expert

    @cached_property
    def memory_rate(self) -> float:
        """Bytes a second that kernels get from memory."""
        return (self.topology.chip.memory_bandwidth.value or 0.0) * self.share("memory")

    def share(self, name: str) -> float:
        """Share of a peak that is reached."""
        own = self.topology.chip.efficiency.get(name)
        return own.value if own is not None and own.value is not None else DEFAULT_EFFICIENCY[name]

    def compute_rate(self, kernel: str, dtype: str) -> float:
        """Operations a second of a kind of kernel."""
        return self.topology.chip.peak(dtype) * self.share(kernel)

    def roofline(self, operations: float, memory_bytes: float, kernel: str, dtype: str) -> float:
        """Seconds: max(operations / (F e), bytes / (W e_memory))."""
        return max(operations / self.compute_rate(kernel, dtype), memory_bytes / self.memory_rate)
