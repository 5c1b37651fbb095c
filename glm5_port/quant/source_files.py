"""The files of a source beside its weights: what identifies it, and what is copied."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from glm5_port.model.stored_tensors import INDEX_FILE
from glm5_port.quant.plan import Plan

CONFIG = "config.json"
_QUANTIZATION = ("quantize_config.json", "quant_config.json", "quant_model_description.json")
"""What other formats say about their weights: it would not be true of ours."""
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".data",
    ".h5",
    ".msgpack",
)


def copied_files(plan: Plan) -> list[Path]:
    """Tokenizer, chat template, generation config and every other small file of the source: all but weights, config.json (which
    is written anew), hidden files and earlier exports' own records."""
    return small_files(plan.source) if plan.has_weights else []


def small_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that are copied."""
    return sorted(file for file in directory.iterdir() if _is_copied(file))


def source_identity(plan: Plan) -> dict[str, Any]:
    """What a source is, without reading its weights: sha256 of its config.json, and of each weight file the size and the sha256
    of its header (names, shapes, dtypes and places of the tensors)."""
    files = sorted(plan.source_files)
    return {
        "config_sha256": hashlib.sha256((plan.source / CONFIG).read_bytes()).hexdigest(),
        "files": {file: _header(plan.source / file) for file in files},
        "copied": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in copied_files(plan)},
    }


def _is_copied(file: Path) -> bool:
    own = file.name in (CONFIG, INDEX_FILE, *_QUANTIZATION) or file.name.startswith("int4_")
    return file.is_file() and not own and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(int.from_bytes(start, "little"))
    return {"bytes": file.stat().st_size, "header_sha256": hashlib.sha256(start + header).hexdigest()}
