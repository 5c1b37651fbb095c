"""What the vendor's documents ask of each operator, by name: chips, arguments that are always passed, rules of a call.

Written down a second time, so that a chip, an argument or a rule that disappears from the backend's tables is missed here.
"""

DOCUMENTED = {
    "npu_rms_norm": (
        "A2 | A3",
        "epsilon",
        "self dtype | gamma dtype",
    ),
    "npu_add_rms_norm": (
        "A2 | A3 | 950DT",
        "epsilon",
        "x1 dtype | x2 dtype | gamma dtype | x1, x2, gamma filled",
    ),
    "npu_rotary_mul": (
        "A2 | A3",
        "rotary_mode",
        "self dtype | r1 dtype | r2 dtype | self dims | r1 dims | rotary_mode | even width | self filled",
    ),
    "npu_swiglu": (
        "A2 | A3",
        "dim",
        "self dtype | self contiguous | self filled | two halves",
    ),
    "npu_transpose_batchmatmul": (
        "A2 | A3",
        "perm_x1 | perm_x2 | perm_y",
        (
            "input dtype | weight dtype | input dims | weight dims | input width | weight width | perm_x1 | perm_x2 | "
            "perm_y | row of all heads | whole 16s"
        ),
    ),
    "npu_format_cast": (
        "A2 | A3 | 950DT",
        "",
        "acl_format | self contiguous",
    ),
    "npu_scatter_nd_update_": (
        "A2 | A3",
        "",
        "self dtype | updates dtype | indices dtype | indices dims | indices width | updates shape",
    ),
    "npu_mla_prolog_v3": (
        "A2 | A3 | 950PR | 950DT",
        ("rmsnorm_epsilon_cq | rmsnorm_epsilon_ckv | cache_mode | query_norm_flag | weight_quant_mode | kv_cache_quant_mode"),
        (
            "token_x dtype | weight_dq dtype | weight_uq_qr dtype | weight_uk dtype | weight_dkv_kr dtype | "
            "rmsnorm_gamma_cq dtype | rmsnorm_gamma_ckv dtype | rope_sin dtype | rope_cos dtype | kv_cache dtype | "
            "kr_cache dtype | token_x dims | "
            "token_x, weight_uk, rmsnorm_gamma_cq, rmsnorm_gamma_ckv, rope_sin, rope_cos, kv_cache, kr_cache contiguous | "
            "rope shape | cache_mode | kv_cache, kr_cache filled | weight_quant_mode | kv_cache_quant_mode"
        ),
    ),
    "npu_lightning_indexer": (
        "A2 | A3",
        (
            "actual_seq_lengths_query | actual_seq_lengths_key | block_table | layout_query | layout_key | "
            "sparse_count | sparse_mode | pre_tokens | next_tokens | return_value"
        ),
        (
            "query dtype | key dtype | weights dtype | query dims | key dims | query, weights, key contiguous | "
            "page size | key heads | head width | query heads | actual_seq_lengths_query dtype | block_table dtype | "
            "block_table dims | pre_tokens | next_tokens | actual_seq_lengths_key dtype | layout_query | layout_key | "
            "sparse_mode | return_value | sparse_count"
        ),
    ),
    "npu_quant_lightning_indexer": (
        "A2 | A3 | 950PR | 950DT",
        (
            "actual_seq_lengths_query | actual_seq_lengths_key | block_table | layout_query | layout_key | "
            "sparse_count | sparse_mode | pre_tokens | next_tokens"
        ),
        (
            "query dtype | key dtype | weights dtype | query_dequant_scale dtype | key_dequant_scale dtype | "
            "query dims | key dims | key_dequant_scale dims | query, weights, query_dequant_scale, key contiguous | "
            "page size | key heads | head width | query heads | actual_seq_lengths_query dtype | block_table dtype | "
            "block_table dims | pre_tokens | next_tokens | actual_seq_lengths_key dtype | layout_query | layout_key | "
            "sparse_mode | query_quant_mode | key_quant_mode | sparse_count"
        ),
    ),
    "npu_sparse_flash_attention": (
        "A2 | A3 | 950PR | 950DT",
        (
            "block_table | actual_seq_lengths_query | actual_seq_lengths_kv | sparse_block_size | layout_query | "
            "layout_kv | sparse_mode | pre_tokens | next_tokens | attention_mode | query_rope | key_rope | "
            "return_softmax_lse"
        ),
        (
            "query dtype | key dtype | value dtype | query_rope dtype | key_rope dtype | "
            "query_rope, key_rope contiguous | latent width | rope width | query dims | key dims | "
            "query, key, sparse_indices contiguous | page size | key heads | sparse_indices dtype | "
            "sparse_indices dims | sparse_indices filled | actual_seq_lengths_query dtype | block_table dtype | "
            "block_table dims | pre_tokens | next_tokens | actual_seq_lengths_kv dtype | layout_query | layout_kv | "
            "sparse_mode | sparse_block_size | attention_mode | return_softmax_lse"
        ),
    ),
    "npu_kv_quant_sparse_flash_attention": (
        "A2 | A3 | 950PR | 950DT",
        (
            "block_table | actual_seq_lengths_query | actual_seq_lengths_kv | sparse_block_size | layout_query | "
            "layout_kv | sparse_mode | pre_tokens | next_tokens | attention_mode | quant_scale_repo_mode | tile_size | "
            "rope_head_dim"
        ),
        (
            "query dtype | key dtype | value dtype | query width | key width | query dims | key dims | "
            "query, key, sparse_indices contiguous | page size | key heads | sparse_indices dtype | "
            "sparse_indices dims | sparse_indices filled | actual_seq_lengths_query dtype | block_table dtype | "
            "block_table dims | pre_tokens | next_tokens | actual_seq_lengths_kv dtype | layout_query | layout_kv | "
            "sparse_mode | sparse_block_size | attention_mode | key_quant_mode | value_quant_mode | "
            "quant_scale_repo_mode | tile_size | rope_head_dim"
        ),
    ),
    "npu_fused_infer_attention_score": (
        "A2 | A3",
        (
            "atten_mask | actual_seq_lengths | actual_seq_lengths_kv | block_table | query_rope | key_rope | num_heads | "
            "scale | input_layout | num_key_value_heads | sparse_mode | block_size | softmax_lse_flag"
        ),
        (
            "query dtype | key dtype | value dtype | query_rope dtype | key_rope dtype | "
            "query, key, query_rope, key_rope, atten_mask contiguous | query dims | key dims | latent width | "
            "rope width | heads | num_key_value_heads | atten_mask | sparse_mode | input_layout | softmax_lse_flag | "
            "page size | block_size | block_table dtype | block_table shape | lengths"
        ),
    ),
    "npu_moe_gating_top_k": (
        "A2 | A3",
        ("bias | k_group | group_count | group_select_mode | renorm | norm_type | out_flag | routed_scaling_factor | eps"),
        (
            "x dtype | x dims | bias dtype | bias dims | x filled | x width | renorm | norm_type | group_select_mode | "
            "k_group | k | group size | padded groups"
        ),
    ),
    "npu_moe_init_routing_v2": (
        "A2 | A3",
        (
            "active_num | expert_num | drop_pad_mode | expert_tokens_num_type | expert_tokens_num_flag | quant_mode | "
            "active_expert_range | row_idx_type"
        ),
        (
            "x dtype | x dims | expert_idx dtype | expert_idx dims | x, expert_idx filled | drop_pad_mode | "
            "expert_tokens_num_type | expert_tokens_num_flag | row_idx_type | quant_mode | expert_num | "
            "active_expert_range"
        ),
    ),
    "npu_moe_finalize_routing": (
        "A2",
        "drop_pad_mode",
        (
            "expanded_permuted_rows dtype | scales dtype | expanded_src_to_dst_row dtype | drop_pad_mode | "
            "expanded_permuted_rows dims | scales dims | skip2"
        ),
    ),
    "npu_grouped_matmul": (
        "A2 | A3",
        "group_list | split_item | group_type | group_list_type | output_dtype",
        (
            "dtypes | x dims | weight dims | x contiguous | x filled | x width | weight width | group_list dtype | "
            "group_list dims | groups | split_item | group_type | group_list_type | antiquant_offset | "
            "groups of inputs | assist bias"
        ),
    ),
    "npu_convert_weight_to_int4pack": (
        "A2 | A3",
        "",
        "weight dtype | weight dims | weight contiguous | weight unit",
    ),
    "npu_weight_quant_batchmatmul": (
        "A2 | A3",
        "antiquant_group_size | inner_precise",
        (
            "x dtype | x dims | weight dtype | weight dims | antiquant_scale dtype | antiquant_offset dtype | "
            "antiquant_offset shape | x, weight filled | x width | outputs | group size | inner_precise"
        ),
    ),
    "npu_dynamic_quant": (
        "A2 | A3",
        "dst_type",
        "input dtype | input dims | input filled | dst_type",
    ),
    "npu_quant_matmul": (
        "A2 | A3",
        "pertoken_scale | output_dtype",
        (
            "x1 dtype | x2 dtype | x1 dims | x2 dims | x1, x2, scale filled | scale dtype | scale dims | "
            "pertoken_scale dtype | pertoken_scale dims | output_dtype | x1 width | x2 width"
        ),
    ),
}
