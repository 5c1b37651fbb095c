"""What is timed beside `workloads`: operators that a model calls in other configurations only, or that others are made of.

Dense attention, quantised caches, INT4 and INT8 weights, the quantiser, and the parts of fused operators. With them every
operator that a backend has kernels of its own for has a floor. Products of INT8 codes are counted at the rate of the working
dtype; a chip whose 8-bit products run at twice that rate has half of this floor. Shape legend as in `workloads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.operators.cache import cache_layout
from glm5_port.testing.cases import Make
from glm5_port.testing.workloads import (
    EXPERTS,
    PAGE_SIZE,
    Workload,
    chosen_positions,
    one_sequence,
    plain_cache,
    prologue_arguments,
    prologue_bytes,
    prologue_operations,
    routed,
    size_of,
    workloads,
)

GROUP, OF_WORD = 32, 8
"""INT4 weights that share a scale, and that share a word."""


def all_workloads(config: Glm5Config, *, prefill: int, context: int) -> Iterator[Workload]:
    """`workloads`, then the rest."""
    yield from workloads(config, prefill=prefill, context=context)
    for tokens, name in ((1, f"decode, context {context}"), (prefill, f"prefill {prefill}, context {context}")):
        yield from _parts(config, tokens, context, name)
        yield from _dense_attention(config, tokens, context, name)
        yield from _quantised_caches(config, tokens, context, f"{name}, fp8 rows")
        yield from _quantised_weights(config, tokens, name)
    yield from _quantiser(config)


# -- parts of fused operators ------------------------------------------------------------------------------------------


def _parts(config: Glm5Config, T: int, S: int, name: str) -> Iterator[Workload]:
    C, R, H, N = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads, config.qk_nope_head_dim
    J, X, K = config.index_n_heads, config.index_head_dim, config.index_topk
    yield Workload(
        ops.write_cache,
        name,
        lambda make: {
            "rows": [make.normal(T, C), make.normal(T, R)],
            "cache": plain_cache("latent", (C, R), S, make),
            "slots": torch.arange(S - T, S),
            "cache_format": "plain",
        },
        lambda a: 2 * size_of(*a["rows"]),
        0.0,
    )
    yield Workload(
        ops.mla_prologue,
        name,
        lambda make: prologue_arguments(config, make, T),
        lambda a: prologue_bytes(config, a),
        prologue_operations(config, T),
    )

    def project(make: Make) -> dict[str, Any]:
        made = prologue_arguments(config, make, T)
        del made["w_uk"]
        return {**made, "nope_dim": N}

    not_absorbed = prologue_operations(config, T) - 2.0 * T * H * N * C
    yield Workload(ops.mla_project, name, project, lambda a: prologue_bytes(config, a), not_absorbed)
    yield Workload(
        ops.indexer_scores,
        name,
        lambda make: _index(config, make, T, S, "plain"),
        lambda a: size_of(a["index_query"], a["head_weights"], *a["index_cache"]) + 4 * T * S,
        2.0 * T * S * J * (X + 1),
    )
    yield Workload(
        ops.select_top_k,
        name,
        lambda make: {"scores": make.normal(T, S, dtype=torch.float32), "top_k": K},
        lambda a: size_of(a["scores"]) + 4 * T * K,
        0.0,
    )


def _index(config: Glm5Config, make: Make, T: int, S: int, cache_format: str) -> dict[str, Any]:
    J, X = config.index_n_heads, config.index_head_dim
    return {
        "index_query": make.normal(T, J, X),
        "head_weights": make.normal(T, J, std=0.02, dtype=torch.float32),
        "index_cache": _quantised("index", (X,), S, make, cache_format),
        **one_sequence(T, S),
        "cache_format": cache_format,
    }


def _quantised(kind: str, widths: tuple[int, ...], S: int, make: Make, cache_format: str) -> list[Tensor]:
    if cache_format == "plain":
        return plain_cache(kind, widths, S, make)
    pages = -(-S // PAGE_SIZE)
    fields = cache_layout(kind, cache_format).encode([make.normal(pages * PAGE_SIZE, width, std=0.5) for width in widths])
    return [field.unflatten(0, (pages, PAGE_SIZE)) for field in fields]


# -- attention ---------------------------------------------------------------------------------------------------------


def _dense_attention(config: Glm5Config, T: int, S: int, name: str) -> Iterator[Workload]:
    """Absorbed for one token, expanded for many, as a model with a short context calls them."""
    H, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    N, V = config.qk_nope_head_dim, config.v_head_dim

    def common(make: Make) -> dict[str, Any]:
        return {
            "query_rope": make.normal(T, H, R, std=0.1),
            "latent_cache": plain_cache("latent", (C, R), S, make),
            **one_sequence(T, S),
            "scale": config.softmax_scale,
            "cache_format": "plain",
        }

    if T == 1:
        yield Workload(
            ops.mla_attention_absorbed,
            name,
            lambda make: {"query_latent": make.normal(T, H, C, std=0.1), **common(make)},
            lambda a: 2 * size_of(a["query_latent"]) + size_of(a["query_rope"], *a["latent_cache"]),
            2.0 * T * H * S * (2 * C + R),
        )
        return
    yield Workload(
        ops.mla_attention_expanded,
        name,
        lambda make: {
            "query_nope": make.normal(T, H, N, std=0.1),
            "w_uk": make.normal(H, N, C, std=0.05),
            "w_uv": make.normal(H, V, C, std=0.05),
            **common(make),
        },
        lambda a: (
            size_of(a["query_nope"], a["query_rope"], a["w_uk"], a["w_uv"], *a["latent_cache"])
            + T * H * V * a["query_nope"].element_size()
        ),
        2.0 * S * C * H * (N + V) + 2.0 * T * H * (S - (T - 1) / 2) * (N + R + V),
    )


def _quantised_caches(config: Glm5Config, T: int, S: int, name: str) -> Iterator[Workload]:
    H, C, R, K = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, config.index_topk
    J, X = config.index_n_heads, config.index_head_dim
    row = 656
    keys = min(K, S)
    yield Workload(
        ops.lightning_indexer,
        name,
        lambda make: {**_index(config, make, T, S, "fp8"), "top_k": K},
        lambda a: size_of(a["index_query"], a["head_weights"], *a["index_cache"]) + 4 * T * K,
        2.0 * T * S * J * (X + 1),
    )
    yield Workload(
        ops.sparse_mla_attention,
        name,
        lambda make: {
            "query_latent": make.normal(T, H, C, std=0.1),
            "query_rope": make.normal(T, H, R, std=0.1),
            "latent_cache": _quantised("latent", (C, R), S, make, "fp8"),
            "indices": chosen_positions(make, T, S, K),
            **one_sequence(T, S),
            "scale": config.softmax_scale,
            "cache_format": "fp8",
        },
        lambda a: 2 * size_of(a["query_latent"]) + size_of(a["query_rope"]) + min(T * keys, S) * row,
        2.0 * T * H * keys * (2 * C + R),
    )


# -- weights -----------------------------------------------------------------------------------------------------------


def _packed(make: Make, *shape: int) -> tuple[Tensor, Tensor]:
    """Any codes, and scales of the size that a trained weight's have."""
    *rows, width = shape
    words = torch.randint(-(2**31), 2**31, (*rows, width // OF_WORD), generator=make.generator, dtype=torch.int64)
    return words.to(torch.int32), make.uniform(*rows, width // GROUP, low=0.001, high=0.004, dtype=torch.bfloat16)


def _quantised_weights(config: Glm5Config, T: int, name: str) -> Iterator[Workload]:
    D, F, K = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok

    def experts(make: Make) -> dict[str, Any]:
        gate_up, down = _packed(make, EXPERTS, 2 * F, D), _packed(make, EXPERTS, D, F)
        return {
            **routed(config, make, T),
            "gate_up_packed": gate_up[0],
            "gate_up_scales": gate_up[1],
            "down_packed": down[0],
            "down_scales": down[1],
            "group_size": GROUP,
        }

    def bytes_of_experts(a: dict[str, Any]) -> int:
        weights = ("gate_up_packed", "gate_up_scales", "down_packed", "down_scales")
        return 2 * size_of(a["hidden"]) + int(a["ids"].unique().numel()) * size_of(*(a[n][0] for n in weights))

    for operator in (ops.expert_mlp_int4, ops.expert_mlp_int4_w4a8):
        yield Workload(operator, f"{name}, {EXPERTS} experts", experts, bytes_of_experts, 6.0 * T * K * D * F)

    def int4(make: Make) -> dict[str, Any]:
        words, scales = _packed(make, F, D)
        return {"x": make.normal(T, D), "packed": words, "scales": scales, "group_size": GROUP}

    yield Workload(
        ops.int4_matmul,
        name,
        int4,
        lambda a: size_of(a["x"], a["packed"], a["scales"]) + T * F * a["x"].element_size(),
        2.0 * T * D * F,
    )
    yield Workload(
        ops.int8_matmul,
        name,
        lambda make: {
            "x": make.normal(T, D),
            "weight": make.integers(F, D, low=-127, high=128, dtype=torch.int8),
            "weight_scale": make.uniform(F, low=0.001, high=0.004, dtype=torch.float32),
        },
        lambda a: size_of(a["x"], a["weight"], a["weight_scale"]) + T * F * a["x"].element_size(),
        2.0 * T * D * F,
    )


def _quantiser(config: Glm5Config) -> Iterator[Workload]:
    """One gate-and-up weight of an expert."""
    rows, width = 2 * config.moe_intermediate_size, config.hidden_size
    name = f"{rows} x {width}"
    packed_bytes = rows * width // 2 + rows * width // GROUP * 2

    def weight(make: Make) -> dict[str, Any]:
        return {"weight": make.normal(rows, width, std=0.02), "group_size": GROUP, "rule": "amax7"}

    for operator in (ops.int4_quantize, ops.int4_quantize_measured):
        yield Workload(operator, name, weight, lambda a: size_of(a["weight"]) + packed_bytes, 0.0)

    def packed(make: Make) -> dict[str, Any]:
        words, scales = _packed(make, rows, width)
        return {"packed": words, "scales": scales, "group_size": GROUP}

    yield Workload(ops.int4_dequantize, name, packed, lambda a: packed_bytes + 2 * rows * width, 0.0)
