"""Small INT4 checkpoints: random weights written as bf16, exported, and the same weights decoded beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant.export import export
from glm5_port.quant.int4 import Int4Rule, dequantize
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from tests.model.models import quick_config
from tests.quant.exports import read_all

WIDTHS: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
    "index_topk": 6,
    "n_routed_experts": 4,
}
"""Every projection has whole groups of 32 inputs."""
EVERYTHING = (r"_proj(_with_mqa)?\.weight$", r"indexer\.(wq_b|wk)\.weight$")
"""Finds every projection that can be quantised; what is no projection is left out by the plan."""


def int4_source(directory: Path, **changes: Any) -> Path:
    """A bf16 checkpoint with an MTP layer."""
    config = quick_config(**{**WIDTHS, **changes})
    read = random_weights(config, dtype=torch.bfloat16, seed=4, mtp=True)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: read(name).contiguous() for name in expected_tensors(config, mtp=True)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**config.as_dict(), "dtype": "bfloat16"}, indent=2))
    return directory


def int4_export(directory: Path, include: tuple[str, ...] = EVERYTHING, group_size: int = 32, **changes: Any) -> Path:
    """An export of it, in `directory / "int4"`."""
    source = int4_source(directory / "source", **changes)
    export(source, directory / "int4", Options(rule=Int4Rule(group_size=group_size), include=include))
    return directory / "int4"


def decoded_weights(directory: Path, dtype: torch.dtype = torch.float32) -> Callable[[str], Tensor]:
    """Every weight of an export in floating point, decoded by hand."""
    stored = read_all(directory)

    def read(name: str) -> Tensor:
        if name in stored:
            return stored[name].to(torch.float32 if name.endswith("bias") else dtype)
        return dequantize(unpack_int4(stored[f"{name}_packed"]), stored[f"{name}_scale"]).to(dtype)

    return read


def decoded_model(directory: Path, **options: Any) -> Glm5Model:
    """The same model with every weight decoded to float32 beforehand."""
    config = dataclasses.replace(Glm5Config.from_json(directory), int4=None)
    return build(config, decoded_weights(directory), backend="cpu", dtype="float32", **options)
