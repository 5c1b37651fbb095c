"""Small checkpoints whose projections are INT8 (compressed-tensors `int-quantized`), with experts in floating point."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.build import build
from glm5_port.model.decoder import Glm5Model
from glm5_port.operators.int4 import quantize_rows
from tests.model.int4_checkpoints import int4_source
from tests.quant.exports import read_all

IGNORE = ["lm_head", r"re:.*\.mlp\.experts\.", r"re:.*\.mlp\.gate$", r"re:.*indexer\.weights_proj", "re:.*eh_proj"]
EVERYTHING = r"_proj(_with_mqa)?\.weight$|indexer\.(wq_b|wk)\.weight$"


def scheme(ignore: list[str] | None = None, *, weights: dict[str, Any] | None = None, **activations: Any) -> dict[str, Any]:
    """The quantization_config that compressed-tensors writes for W8A8."""
    number = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False, **(weights or {})},
        "input_activations": {**number, "strategy": "token", "dynamic": True, **activations},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": IGNORE if ignore is None else ignore,
    }


def int8_checkpoint(directory: Path, ignore: tuple[str, ...] = (), **changes: Any) -> Path:
    """Every projection that `ignore` (beside the experts) does not name in INT8."""
    source = int4_source(directory / "source", **changes)
    kept = [*IGNORE, *ignore]
    patterns = [entry.removeprefix("re:") for entry in kept]
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if re.search(EVERYTHING, name) and not any(re.match(pattern, module) for pattern in patterns):
            stored[name], stored[f"{name}_scale"] = quantize_rows(tensor)
        else:
            stored[name] = tensor
    made = directory / "int8"
    made.mkdir()
    save_file(stored, made / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "quantization_config": scheme(kept)}))
    return made


def decoded_weights(directory: Path, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Every weight in floating point, decoded by hand."""
    stored = read_all(directory)

    def read(name: str) -> Tensor:
        scale = stored.get(f"{name}_scale")
        tensor = stored[name] if scale is None else stored[name].float() * scale
        return tensor.to(torch.float32 if name.endswith("bias") else dtype)

    return read


def decoded_model(directory: Path, **options: Any) -> Glm5Model:
    """The same model with its weights decoded and its activations in float32."""
    config = dataclasses.replace(Glm5Config.from_json(directory), int8=None)
    return build(config, decoded_weights(directory, torch.float32), backend="cpu", dtype="float32", **options)
