"""What is timed: each operator at GLM-5 widths, one decode step and one prefill chunk, with the floor written beside it.

`bytes` are what must cross memory at least once (weights, cache rows, activations in and out), `operations` multiply-adds times
two. The floor of a workload is the larger of bytes / bandwidth and operations / matmul rate of the machine at hand.

Shape legend as in the operators; T tokens, S cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.dispatch import Operator
from glm5_port.operators.cache import cache_layout
from glm5_port.testing.cases import Make

PAGE_SIZE = 64
EXPERTS = 16
"""Experts of a timed MoE layer: all 256 in bf16 are 19 GB. A step of T tokens still reads min(T * 8, 16) of them."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One timed call.

    Attributes:
        operator: what is called.
        name: "decode" or "prefill", with its sizes.
        build: makes the arguments on the CPU, in the working dtype.
        bytes: (arguments) -> bytes that must be moved.
        operations: floating-point operations.
    """

    operator: Operator
    name: str
    build: Callable[[Make], dict[str, Any]]
    bytes: Callable[[dict[str, Any]], int]
    operations: float


def workloads(config: Glm5Config, *, prefill: int, context: int) -> Iterator[Workload]:
    """Every operator, for one token at `context` cached tokens, and for a chunk of `prefill` tokens that ends there."""
    for tokens, name in ((1, f"decode, context {context}"), (prefill, f"prefill {prefill}, context {context}")):
        yield from _dense_workloads(config, tokens, name)
        yield from _attention_workloads(config, tokens, context, name)
        yield from _moe_workloads(config, tokens, name)


def _dense_workloads(config: Glm5Config, T: int, name: str) -> Iterator[Workload]:
    D, F = config.hidden_size, config.intermediate_size

    def norm(make: Make) -> dict[str, Any]:
        return {"x": make.normal(T, D), "weight": make.normal(D), "eps": 1e-5}

    yield Workload(ops.rms_norm, name, norm, lambda a: 2 * size_of(a["x"]) + size_of(a["weight"]), 4.0 * T * D)
    yield Workload(
        ops.add_rms_norm,
        name,
        lambda make: {**norm(make), "residual": make.normal(T, D)},
        lambda a: 4 * size_of(a["x"]) + size_of(a["weight"]),
        5.0 * T * D,
    )
    yield Workload(
        ops.rotate,
        name,
        lambda make: {
            "x": make.normal(T, config.num_attention_heads, config.qk_rope_head_dim),
            **angles(make, T, config),
            "interleaved": True,
            "start": 0,
        },
        lambda a: 2 * size_of(a["x"]) + size_of(a["cos"], a["sin"]),
        6.0 * T * config.num_attention_heads * config.qk_rope_head_dim / 2,
    )
    H, V = config.num_attention_heads, config.v_head_dim
    yield Workload(
        ops.linear,
        name,
        lambda make: {"x": make.normal(T, H * V), "weight": make.normal(D, H * V, std=0.01)},
        lambda a: size_of(a["x"], a["weight"]) + T * D * a["x"].element_size(),
        2.0 * T * H * V * D,
    )
    N, C = config.qk_nope_head_dim, config.kv_lora_rank
    yield Workload(
        ops.linear_per_head,
        name,
        lambda make: {"x": make.normal(T, H, N), "weight": make.normal(H, C, N, std=0.05)},
        lambda a: size_of(a["x"], a["weight"]) + T * H * C * a["x"].element_size(),
        2.0 * T * H * N * C,
    )
    yield Workload(
        ops.gated_mlp,
        name,
        lambda make: {"x": make.normal(T, D), "gate_up": make.normal(2 * F, D, std=0.01), "down": make.normal(D, F, std=0.01)},
        lambda a: 2 * size_of(a["x"]) + size_of(a["gate_up"], a["down"]),
        6.0 * T * D * F,
    )


def prologue_arguments(config: Glm5Config, make: Make, T: int) -> dict[str, Any]:
    """Of mla_prologue."""
    D, Q, N, H = config.hidden_size, config.q_lora_rank, config.qk_nope_head_dim, config.num_attention_heads
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    return {
        "hidden": make.normal(T, D),
        "q_a": make.normal(Q, D, std=0.01),
        "q_a_norm": make.normal(Q, mean=1.0, std=0.1),
        "q_b": make.normal(H * (N + R), Q, std=0.02),
        "kv_a": make.normal(C + R, D, std=0.01),
        "kv_a_norm": make.normal(C, mean=1.0, std=0.1),
        "w_uk": make.normal(H, N, C, std=0.05),
        **angles(make, T, config),
        "latent_norm_eps": 1e-5,
        "rope_interleaved": True,
    }


def prologue_bytes(config: Glm5Config, arguments: dict[str, Any]) -> int:
    """Weights, hidden states, and queries and a row of the cache for each of them."""
    hidden = arguments["hidden"]
    row = (config.num_attention_heads + 1) * (config.kv_lora_rank + config.qk_rope_head_dim)
    weights = [arguments[n] for n in ("q_a", "q_b", "kv_a", "w_uk") if n in arguments]
    return size_of(*weights, hidden) + len(hidden) * row * hidden.element_size()


def prologue_operations(config: Glm5Config, T: int) -> float:
    """Four products."""
    D, Q, N, H = config.hidden_size, config.q_lora_rank, config.qk_nope_head_dim, config.num_attention_heads
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    return 2.0 * T * (Q * D + H * (N + R) * Q + (C + R) * D + H * N * C)


def _attention_workloads(config: Glm5Config, T: int, S: int, name: str) -> Iterator[Workload]:
    H, C, R, V, K = (
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.index_topk,
    )
    D, Q, J, X = config.hidden_size, config.q_lora_rank, config.index_n_heads, config.index_head_dim
    keys = min(K, S)

    yield Workload(
        ops.mla_prologue_into_cache,
        name,
        lambda make: {
            **prologue_arguments(config, make, T),
            "latent_cache": plain_cache("latent", (C, R), S, make),
            "slots": torch.arange(S - T, S),
            "cache_format": "plain",
        },
        lambda a: prologue_bytes(config, a),
        prologue_operations(config, T),
    )
    yield Workload(
        ops.indexer_prologue,
        name,
        lambda make: {
            "hidden": make.normal(T, D),
            "query_residual": make.normal(T, Q),
            "wq_b": make.normal(J * X, Q, std=0.02),
            "wk": make.normal(X, D, std=0.01),
            "k_norm_weight": make.normal(X, mean=1.0, std=0.1),
            "k_norm_bias": make.normal(X, std=0.1),
            "weights_proj": make.normal(J, D, std=0.01),
            **angles(make, T, config),
            "k_norm_eps": 1e-6,
            "rope_interleaved": True,
        },
        lambda a: size_of(*(a[n] for n in ("hidden", "query_residual", "wq_b", "wk", "weights_proj"))),
        2.0 * T * (J * X * Q + X * D + J * D),
    )
    yield Workload(
        ops.lightning_indexer,
        name,
        lambda make: {
            "index_query": make.normal(T, J, X),
            "head_weights": make.normal(T, J, std=0.02, dtype=torch.float32),
            "index_cache": plain_cache("index", (X,), S, make),
            **one_sequence(T, S),
            "top_k": K,
            "cache_format": "plain",
        },
        lambda a: size_of(a["index_query"], a["head_weights"], *a["index_cache"]) + 4 * T * K,
        2.0 * T * S * J * (X + 1),
    )

    def attention(make: Make) -> dict[str, Any]:
        return {
            "query_latent": make.normal(T, H, C, std=0.1),
            "query_rope": make.normal(T, H, R, std=0.1),
            "latent_cache": plain_cache("latent", (C, R), S, make),
            **one_sequence(T, S),
            "scale": config.softmax_scale,
            "cache_format": "plain",
        }

    yield Workload(
        ops.sparse_mla_attention,
        name,
        lambda make: {**attention(make), "indices": chosen_positions(make, T, S, K)},
        # Rows that several queries select may be read once: at least the smaller of all selected rows and the whole cache.
        lambda a: (
            size_of(a["query_latent"], a["query_rope"])
            + size_of(a["query_latent"])
            + min(T * keys, S) * (C + R) * a["query_rope"].element_size()
        ),
        2.0 * T * H * keys * (2 * C + R),
    )
    yield Workload(
        ops.attention_output,
        name,
        lambda make: {
            "latent_out": make.normal(T, H, C),
            "w_uv": make.normal(H, V, C, std=0.05),
            "o": make.normal(D, H * V, std=0.01),
        },
        lambda a: size_of(a["latent_out"], a["w_uv"], a["o"]) + T * D * a["o"].element_size(),
        2.0 * T * (H * V * C + D * H * V),
    )


def routed(config: Glm5Config, make: Make, T: int) -> dict[str, Tensor]:
    """Hidden states, and the experts of each."""
    K = config.num_experts_per_tok
    ids = torch.stack([torch.randperm(EXPERTS, generator=make.generator)[:K] for _ in range(T)])
    return {
        "hidden": make.normal(T, config.hidden_size),
        "route_weights": make.uniform(T, K, dtype=torch.float32),
        "ids": ids.to(torch.int32),
    }


def _moe_workloads(config: Glm5Config, T: int, name: str) -> Iterator[Workload]:
    D, F, K = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    yield Workload(
        ops.route_experts,
        name,
        lambda make: {
            "hidden": make.normal(T, D),
            "gate": make.normal(config.n_routed_experts, D, std=0.02),
            "correction_bias": make.normal(config.n_routed_experts, std=0.1, dtype=torch.float32),
            "top_k": K,
            "groups": config.n_group,
            "groups_kept": config.topk_group,
            "renormalise": config.norm_topk_prob,
            "scale": config.routed_scaling_factor,
        },
        lambda a: size_of(a["hidden"], a["gate"]),
        2.0 * T * D * config.n_routed_experts,
    )

    def experts(make: Make) -> dict[str, Any]:
        return {
            **routed(config, make, T),
            "gate_up": make.normal(EXPERTS, 2 * F, D, std=0.01),
            "down": make.normal(EXPERTS, D, F, std=0.02),
        }

    yield Workload(
        ops.expert_mlp,
        f"{name}, {EXPERTS} experts",
        experts,
        lambda a: 2 * size_of(a["hidden"]) + int(a["ids"].unique().numel()) * size_of(a["gate_up"][0], a["down"][0]),
        6.0 * T * K * D * F,
    )


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def angles(make: Make, T: int, config: Glm5Config) -> dict[str, Tensor]:
    """cos and sin of T tokens."""
    angles = make.uniform(T, config.qk_rope_head_dim // 2, high=6.28, dtype=torch.float32)
    return {"cos": angles.cos(), "sin": angles.sin()}


def plain_cache(kind: str, widths: tuple[int, ...], S: int, make: Make) -> list[Tensor]:
    """The fields of an unquantised cache of S rows, filled."""
    fields = cache_layout(kind, "plain").allocate(-(-S // PAGE_SIZE), PAGE_SIZE, widths, make.dtype, "cpu")
    return [make.normal(*field.shape, std=0.5) for field in fields]


def one_sequence(T: int, S: int) -> dict[str, Tensor]:
    """One sequence whose last T of S tokens are new."""
    return {
        "block_table": torch.arange(-(-S // PAGE_SIZE), dtype=torch.int32).unsqueeze(0),
        "query_starts": torch.tensor([0, T], dtype=torch.int32),
        "lengths": torch.tensor([S], dtype=torch.int32),
    }


def chosen_positions(make: Make, T: int, S: int, K: int) -> Tensor:
    """K positions a token, ascending, -1 padded, all at or before the token."""
    rows = []
    for token in range(T):
        visible = S - T + token + 1
        chosen = torch.randperm(visible, generator=make.generator)[:K].sort().values
        rows.append(torch.nn.functional.pad(chosen, (0, K - len(chosen)), value=-1))
    return torch.stack(rows).to(torch.int32)
