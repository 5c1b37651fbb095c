"""Writes small checkpoints of random tensors in any storage: bf16, shards, block-FP8. Nothing of the reader is used but the
list of names and shapes, and that list is checked against transformers in test_checkpoint.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.tensors import FLOAT32, PROJECTION, expected_tensors

SMALL: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 4,
    "indexer_types": ["full", "full", "shared", "shared"],
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 8e6, "rope_type": "default"},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [90, 91],
    "pad_token_id": 90,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
}


def random_tensors(config: Glm5Config, *, mtp: bool = True, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """One random tensor for each expected name; routers' biases in float32."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(spec.shape, generator=generator).to(torch.float32 if spec.kind == FLOAT32 else dtype)
        for name, spec in expected_tensors(config, mtp=mtp).items()
    }


def quantized(tensors: Mapping[str, Tensor], config: Glm5Config, block: int = 128) -> dict[str, Tensor]:
    """The tensors as block-FP8, block by block in plain loops: scale = amax / 448, value = x / scale."""
    stored: dict[str, Tensor] = {}
    kinds = {name: spec.kind for name, spec in expected_tensors(config, mtp=True).items()}
    for name, tensor in tensors.items():
        if kinds[name] != PROJECTION:
            stored[name] = tensor
            continue
        values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty([-(-edge // block) for edge in tensor.shape])
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scales[i, j] = tensor[part].float().abs().max() / 448
                values[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
        stored[name], stored[name + "_scale_inv"] = values, scales
    return stored


def write(directory: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **changes: Any) -> Path:
    """Writes config.json and the tensors, in one file or dealt over shards with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMALL, **changes}))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: tensor for name, tensor in tensors.items() if placed[name] == file}, directory / file)
    write_index(directory, placed)
    return directory


def write_index(directory: Path, placed: Mapping[str, str]) -> None:
    """The index.json of a sharded checkpoint."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(placed)}))


def read_index(directory: Path) -> dict[str, str]:
    """name -> file of a sharded checkpoint."""
    return dict(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
