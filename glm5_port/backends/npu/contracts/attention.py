"""The prologue of latent attention, the indexer, sparse and dense attention."""

from __future__ import annotations

import torch

from glm5_port.backends.npu.contracts.kinds import (
    A2_A3,
    EVERY_CHIP,
    HALF,
    HEAD_COUNTS,
    NO_LIMIT,
    dense,
    filled,
    of_dims,
    of_dtype,
    page_rows,
    same_dtype,
    value,
)
from glm5_port.backends.npu.rules import Rule, VendorOperator

INDEX_HEADS = (8, 16, 24, 32, 64)
"""Index heads that the indexer's 8-bit form takes on every chip; A2 and A3 take any number up to 64."""
_PAGED_LENGTHS = (
    of_dtype("actual_seq_lengths_query", torch.int32),
    of_dtype("block_table", torch.int32),
    of_dims("block_table", 2),
    value("pre_tokens", NO_LIMIT),
    value("next_tokens", NO_LIMIT),
)
MLA_PROLOG = VendorOperator(
    "npu_mla_prolog_v3",
    ("aclnnMlaPrologV3WeightNz",),
    (
        "token_x",
        "weight_dq",
        "weight_uq_qr",
        "weight_uk",
        "weight_dkv_kr",
        "rmsnorm_gamma_cq",
        "rmsnorm_gamma_ckv",
        "rope_sin",
        "rope_cos",
        "kv_cache",
        "kr_cache",
    ),
    EVERY_CHIP,
    explicit=(
        "rmsnorm_epsilon_cq",
        "rmsnorm_epsilon_ckv",
        "cache_mode",
        "query_norm_flag",
        "weight_quant_mode",
        "kv_cache_quant_mode",
    ),
    cann=(9, 0),  # the widths of GLM-5 entered the documents in April 2026
    rules=(
        of_dtype("token_x", torch.bfloat16),
        of_dtype("weight_dq", torch.bfloat16),
        of_dtype("weight_uq_qr", torch.bfloat16),
        of_dtype("weight_uk", torch.bfloat16),
        of_dtype("weight_dkv_kr", torch.bfloat16),
        of_dtype("rmsnorm_gamma_cq", torch.bfloat16),
        of_dtype("rmsnorm_gamma_ckv", torch.bfloat16),
        of_dtype("rope_sin", torch.bfloat16),
        of_dtype("rope_cos", torch.bfloat16),
        of_dtype("kv_cache", torch.bfloat16),
        of_dtype("kr_cache", torch.bfloat16),
        of_dims("token_x", 2),
        dense("token_x", "weight_uk", "rmsnorm_gamma_cq", "rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache"),
        Rule(
            "rope shape",
            "rope_sin and rope_cos [T, 64]",
            lambda token_x, rope_sin, rope_cos, **_: rope_sin.shape == rope_cos.shape == (token_x.shape[0], 64),
        ),
        value("cache_mode", "TND"),  # of those that are documented, the one whose rows we put into the pages ourselves
        filled("kv_cache", "kr_cache"),
        value("weight_quant_mode", 0),
        value("kv_cache_quant_mode", 0),
    ),
)
LIGHTNING_INDEXER = VendorOperator(
    "npu_lightning_indexer",
    ("aclnnLightningIndexer",),
    ("query", "key", "weights"),
    A2_A3,  # the Ascend950 takes head weights of 16 bits only, which would reorder near-ties
    explicit=(
        "actual_seq_lengths_query",
        "actual_seq_lengths_key",
        "block_table",
        "layout_query",
        "layout_key",
        "sparse_count",
        "sparse_mode",
        "pre_tokens",
        "next_tokens",
        "return_value",
    ),
    rules=(
        of_dtype("query", *HALF),
        same_dtype("key", "query"),
        Rule(
            "weights dtype",
            "weights in the dtype of query, or float32",
            lambda query, weights, **_: weights.dtype in (query.dtype, torch.float32),
        ),
        of_dims("query", 3),
        of_dims("key", 4),
        dense("query", "weights", "key"),
        page_rows("key", 1),
        Rule("key heads", "one key head", lambda key, **_: key.shape[2] == 1),
        Rule("head width", "heads of 128 channels", lambda query, key, **_: query.shape[-1] == key.shape[-1] == 128),
        Rule("query heads", "up to 64 query heads", lambda query, **_: query.shape[1] <= 64),
        *_PAGED_LENGTHS,
        of_dtype("actual_seq_lengths_key", torch.int32),
        value("layout_query", "TND"),
        value("layout_key", "PA_BSND"),
        value("sparse_mode", 3),
        value("return_value", False),
        Rule(
            "sparse_count",
            "sparse_count of 1 to 2048, or 3072 to 8192 in whole 1024s",
            lambda sparse_count, **_: sparse_count_fits(sparse_count),
        ),
    ),
)


def sparse_count_fits(count: int) -> bool:
    return 1 <= count <= 2048 or (3072 <= count <= 8192 and count % 1024 == 0)


QUANT_LIGHTNING_INDEXER = VendorOperator(
    "npu_quant_lightning_indexer",
    ("aclnnQuantLightningIndexer",),
    ("query", "key", "weights", "query_dequant_scale", "key_dequant_scale", "query_quant_mode", "key_quant_mode"),
    EVERY_CHIP,
    explicit=(
        "actual_seq_lengths_query",
        "actual_seq_lengths_key",
        "block_table",
        "layout_query",
        "layout_key",
        "sparse_count",
        "sparse_mode",
        "pre_tokens",
        "next_tokens",
    ),
    rules=(
        of_dtype("query", torch.int8),
        of_dtype("key", torch.int8),
        of_dtype("weights", torch.float16),
        of_dtype("query_dequant_scale", torch.float16),
        of_dtype("key_dequant_scale", torch.float16),
        of_dims("query", 3),
        of_dims("key", 4),
        of_dims("key_dequant_scale", 3),
        dense("query", "weights", "query_dequant_scale", "key"),
        page_rows("key", 1),
        Rule("key heads", "one key head", lambda key, **_: key.shape[2] == 1),
        Rule("head width", "heads of 128 channels", lambda query, key, **_: query.shape[-1] == key.shape[-1] == 128),
        Rule("query heads", "8, 16, 24, 32 or 64 query heads", lambda query, **_: query.shape[1] in INDEX_HEADS),
        *_PAGED_LENGTHS,
        of_dtype("actual_seq_lengths_key", torch.int32),
        value("layout_query", "TND"),
        value("layout_key", "PA_BSND"),
        value("sparse_mode", 3),
        value("query_quant_mode", 0),
        value("key_quant_mode", 0),
        Rule("sparse_count", "sparse_count of 1 to 2048", lambda sparse_count, **_: 1 <= sparse_count <= 2048),
    ),
)


_SPARSE_ATTENTION = (
    "block_table",
    "actual_seq_lengths_query",
    "actual_seq_lengths_kv",
    "sparse_block_size",
    "layout_query",
    "layout_kv",
    "sparse_mode",
    "pre_tokens",
    "next_tokens",
    "attention_mode",
)
_SPARSE_ATTENTION_RULES = (
    of_dims("query", 3),
    of_dims("key", 4),
    dense("query", "key", "sparse_indices"),
    page_rows("key", 1),
    Rule("key heads", "one key head", lambda key, **_: key.shape[2] == 1),
    of_dtype("sparse_indices", torch.int32),
    of_dims("sparse_indices", 3),
    filled("sparse_indices"),
    *_PAGED_LENGTHS,
    of_dtype("actual_seq_lengths_kv", torch.int32),
    value("layout_query", "TND"),
    value("layout_kv", "PA_BSND"),
    value("sparse_mode", 0, 3),
    value("sparse_block_size", 1),
    value("attention_mode", 2),  # 0 by default, which no chip supports
)
SPARSE_FLASH_ATTENTION = VendorOperator(
    "npu_sparse_flash_attention",
    ("aclnnSparseFlashAttention",),
    ("query", "key", "value", "sparse_indices", "scale_value"),
    EVERY_CHIP,
    explicit=(*_SPARSE_ATTENTION, "query_rope", "key_rope", "return_softmax_lse"),
    rules=(
        of_dtype("query", *HALF),
        same_dtype("key", "query"),
        same_dtype("value", "query"),
        same_dtype("query_rope", "query"),
        same_dtype("key_rope", "query"),
        dense("query_rope", "key_rope"),
        Rule("latent width", "a latent of 512", lambda query, key, **_: query.shape[-1] == key.shape[-1] == 512),
        Rule(
            "rope width", "a rope part of 64", lambda query_rope, key_rope, **_: query_rope.shape[-1] == key_rope.shape[-1] == 64
        ),
        *_SPARSE_ATTENTION_RULES,
        value("return_softmax_lse", False),
    ),
)
KV_QUANT_SPARSE_FLASH_ATTENTION = VendorOperator(
    "npu_kv_quant_sparse_flash_attention",
    ("aclnnKvQuantSparseFlashAttention",),
    ("query", "key", "value", "sparse_indices", "scale_value", "key_quant_mode", "value_quant_mode"),
    EVERY_CHIP,
    explicit=(*_SPARSE_ATTENTION, "quant_scale_repo_mode", "tile_size", "rope_head_dim"),
    rules=(
        of_dtype("query", *HALF),
        of_dtype("key", torch.int8),
        same_dtype("value", "key"),
        Rule("query width", "queries of 512 + 64", lambda query, **_: query.shape[-1] == 576),
        Rule("key width", "rows of 656 bytes", lambda key, **_: key.shape[-1] == 656),
        *_SPARSE_ATTENTION_RULES,
        value("key_quant_mode", 2),
        value("value_quant_mode", 2),
        value("quant_scale_repo_mode", 1),
        value("tile_size", 128),
        value("rope_head_dim", 64),
    ),
)
FUSED_INFER_ATTENTION = VendorOperator(
    "npu_fused_infer_attention_score",
    ("aclnnFusedInferAttentionScoreV2", "aclnnFusedInferAttentionScoreV3", "aclnnFusedInferAttentionScoreV4"),
    ("query", "key", "value"),
    A2_A3,
    explicit=(
        "atten_mask",
        "actual_seq_lengths",
        "actual_seq_lengths_kv",
        "block_table",
        "query_rope",
        "key_rope",
        "num_heads",
        "scale",
        "input_layout",
        "num_key_value_heads",
        "sparse_mode",
        "block_size",
        "softmax_lse_flag",
    ),
    cann=(8, 1),
    rules=(
        of_dtype("query", *HALF),
        same_dtype("key", "query"),
        same_dtype("value", "query"),
        same_dtype("query_rope", "query"),
        same_dtype("key_rope", "query"),
        dense("query", "key", "query_rope", "key_rope", "atten_mask"),
        of_dims("query", 3),
        of_dims("key", 4),
        Rule("latent width", "a latent of 512", lambda query, key, **_: query.shape[-1] == key.shape[-1] == 512),
        Rule(
            "rope width", "a rope part of 64", lambda query_rope, key_rope, **_: query_rope.shape[-1] == key_rope.shape[-1] == 64
        ),
        Rule(
            "heads",
            "1, 2, 4, ... 128 heads",
            lambda query, num_heads, **_: num_heads == query.shape[1] and num_heads in HEAD_COUNTS,
        ),
        value("num_key_value_heads", 1),
        Rule(
            "atten_mask",
            "a mask [2048, 2048] of bool",
            lambda atten_mask, **_: atten_mask.dtype == torch.bool and atten_mask.shape == (2048, 2048),
        ),
        value("sparse_mode", 3),
        value("input_layout", "TND"),
        value("softmax_lse_flag", False),
        page_rows("key", 2),
        Rule("block_size", "block_size, the rows of a page", lambda key, block_size, **_: block_size == key.shape[2]),
        of_dtype("block_table", torch.int32),
        Rule(
            "block_table shape",
            "a block_table with a row for each length, wide enough for the longest",
            lambda block_table, block_size, actual_seq_lengths_kv, **_: (
                block_table.shape[0] == len(actual_seq_lengths_kv)
                and max(actual_seq_lengths_kv) <= block_table.shape[1] * block_size
            ),
        ),
        Rule(
            "lengths",
            "as many lengths of queries as of keys, 4096 at most, those of queries cumulative",
            lambda actual_seq_lengths, actual_seq_lengths_kv, **_: (
                len(actual_seq_lengths) == len(actual_seq_lengths_kv) <= 4096 and actual_seq_lengths == sorted(actual_seq_lengths)
            ),
        ),
    ),
)
