"""Small checkpoints whose experts can be quantised, and what a test needs to look at an export."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.quant.plan import Options
from tests.model import checkpoint_files

WIDTHS: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 96}
"""So that an expert has whole groups of 32 in both directions, and gate and down do not look alike."""
SMALL_SHARDS = Options(max_shard_bytes=100_000)
"""Makes five shards of the small model."""


def write_source(directory: Path, *, shards: int = 3, fp8: bool = False, **changes: Any) -> Path:
    """A random checkpoint with an MTP layer, a tokenizer and a generation config."""
    fields = {**WIDTHS, **changes, **({"quantization_config": checkpoint_files.FP8} if fp8 else {})}
    config = Glm5Config.from_dict({**checkpoint_files.SMALL, **fields})
    tensors = checkpoint_files.random_tensors(config)
    checkpoint_files.write(directory, checkpoint_files.quantized(tensors, config) if fp8 else tensors, shards=shards, **fields)
    (directory / "tokenizer.json").write_text('{"tokens": "é"}', encoding="utf-8")
    (directory / "generation_config.json").write_text('{"eos_token_id": [90]}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by the safetensors library."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
    return found


def change(directory: Path, edit: Callable[[dict[str, Tensor]], object], file: str | None = None) -> None:
    """Rewrites the shard files of a checkpoint after `edit` changed their tensors: all as one dict, or those of one file."""
    for path in [directory / file] if file else sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def digests(directory: Path) -> dict[str, str]:
    """Every file of a directory and its sha256."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def expert(layer: int, number: int, projection: str) -> str:
    """The name of an expert's weight."""
    return f"model.layers.{layer}.mlp.experts.{number}.{projection}_proj.weight"


def plain_quantize(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Rule amax7 by exact rational arithmetic in float64, for weights without near-denormal groups: codes and scales."""
    groups = weight.to(torch.bfloat16).to(torch.float64).unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7).to(torch.float32).to(torch.bfloat16)
    codes = (groups / scales.to(torch.float64).unsqueeze(-1)).round().to(torch.int8)
    return codes.flatten(-2), scales
