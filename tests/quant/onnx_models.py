"""Checkpoints for the tests of ONNX decoders: small models of every shape of the family, with weights of a sane size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.config_file import read_json
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant.config_text import KEY
from glm5_port.quant.export import export
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.plan import Options
from tests.model import checkpoint_files
from tests.quant import exports

GLM_5: dict[str, Any] = {"indexer_types": ["full"] * 4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
"""Every layer runs an indexer of its own."""
GLM_52: dict[str, Any] = {"indexer_types": ["full", "full", "shared", "shared"]}
"""Two layers attend to what the second selected."""


def write_float(directory: Path, **changes: Any) -> Path:
    """A bfloat16 checkpoint; with an MTP layer unless the changes say otherwise."""
    fields = {**exports.WIDTHS, **changes}
    config = Glm5Config.from_dict({**checkpoint_files.SMALL, **fields})
    mtp = config.mtp_layer is not None
    read = random_weights(config, dtype=torch.bfloat16, mtp=mtp)
    checkpoint_files.write(directory, {name: read(name) for name in expected_tensors(config, mtp=mtp)}, **fields)
    return directory


def write_int4(root: Path, *, options: Options | None = None, **changes: Any) -> Path:
    """A canonical INT4 checkpoint of it. Scales are cut to five bits, with which bf16(q * s) is q * s, so that engines which
    round weights to bfloat16 and those which do not compute the same function.

    Args:
        root: a directory to work in.
        options: of the export.
        changes: of the config.
    """
    export(write_float(root / "float", **changes), root / "int4", options or Options(rule=Int4Rule("amax7", 32)))
    exports.change(root / "int4", cut_scales)
    return root / "int4"


def unrounded(checkpoint: Path) -> Glm5Model:
    """The torch model in float32 with q * s, not bf16(q * s), for its INT4 weights."""
    stored = exports.read_all(checkpoint)

    def read(name: str) -> Tensor:
        if name in stored:
            return stored[name].float()
        codes, scales = unpack_int4(stored[f"{name}_packed"]).float(), stored[f"{name}_scale"].float()
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)

    raw = {key: value for key, value in read_json(checkpoint).items() if key != KEY}
    return build(Glm5Config.from_dict(raw), read, backend="cpu", dtype="float32")


def cut_scales(tensors: dict[str, Tensor]) -> None:
    """Clears the last three bits of every scale."""
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = (tensor.view(torch.int16) & ~7).view(torch.bfloat16)
