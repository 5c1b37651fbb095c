"""What a checkpoint holds, for a person: bf16, block-FP8 or INT4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.config_file import read_json
from glm5_port.errors import CheckpointError, did_you_mean
from glm5_port.model.stored_tensors import StoredTensors
from glm5_port.model.tensors import expected_tensors, layer_prefix
from glm5_port.quant.config_text import KEY
from glm5_port.quant.files import Reader
from glm5_port.quant.formats import Format, find_format, format_of, formats, stored_group_size
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.manifest import read_manifest
from glm5_port.quant.packing import unpack_int4
from glm5_port.quant.structure import read_structure

OTHER, CANONICAL = "not known here", "compressed-tensors"


def inspect_checkpoint(path: str | PathLike[str], tensor: str | None = None) -> dict[str, Any]:
    """What `inspect --json` prints. Reads headers, and the one tensor.

    Args:
        path: directory of a checkpoint.
        tensor: name of a tensor, or of a quantised weight ("....weight"), to summarise.

    Raises:
        ConfigError, CheckpointError: not a checkpoint, or no such tensor.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory\n  expected: the directory of a checkpoint")
    raw = read_json(directory)
    config = Glm5Config.from_dict({key: value for key, value in raw.items() if key != KEY})
    manifest, block = read_manifest(directory), raw.get(KEY) or {}
    stored_format = _stored_format(block, manifest, directory)
    stored = stored_format.container.read(directory)
    weights = stored_format.weights(stored.tensors)
    rule = Int4Rule("signed8", stored_group_size(stored_format, stored.tensors))
    owners = read_structure(config, None, stored, rule, stored_format, check_config=False).owners
    found: dict[str, Any] = {
        "path": str(directory),
        "family": config.family_member,
        "format": _format(block, stored_format.name if manifest or stored_format.name != CANONICAL else None, bool(weights)),
        "group_size": _group(block) if manifest is None else manifest["rule"]["group_size"],
        "rule": None if manifest is None else manifest.get("rule"),
        "made_by": None if manifest is None else manifest.get("tool"),
        "files": len(stored.files),
        "tensors": len(stored.tensors),
        "bytes": sum(entry.bytes for entry in stored.tensors.values()),
        "quantized_weights": len(weights),
        "components": _components(config, stored, set(weights), owners),
        "ignore": list(block.get("ignore") or block.get("modules_to_not_convert") or block.get("dynamic") or []),
        "problems": list(stored.faults),
    }
    return found if tensor is None else found | {"tensor": _tensor(directory, stored, stored_format, weights, owners, tensor)}


def _stored_format(block: dict[str, Any], manifest: dict[str, Any] | None, directory: Path) -> Format:
    """The format that the manifest or else config.json names, or that the files look like; the canonical one where config.json
    names one that is not known here."""
    method = block.get("quant_method") if manifest is None else manifest.get("format")
    return format_of(block, manifest, directory) if method is None or method in formats() else find_format(CANONICAL)


def _format(block: dict[str, Any], by_manifest: str | None, has_weights: bool) -> str:
    method = block.get("quant_method", by_manifest)
    if method is None:
        return "INT4 tensors without a quantization_config" if has_weights else "not quantised"
    return f"{method}{' ' + str(block['format']) if 'format' in block else ''}"


def _group(block: dict[str, Any]) -> Any:
    try:
        (group,) = block["config_groups"].values()
        return group["weights"]["group_size"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return block.get("group_size", block.get("weight_block_size"))


def _components(config: Glm5Config, stored: StoredTensors, weights: set[str], owners: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tensors and bytes of each part of the model and storage."""
    specs = expected_tensors(config, mtp=config.mtp_layer is not None)
    mtp = None if config.mtp_layer is None else layer_prefix(config.mtp_layer)
    counted: dict[tuple[str, str], set[str]] = {}
    sizes: Counter[tuple[str, str]] = Counter()
    for name, entry in stored.tensors.items():
        owner = _owner(name, owners)
        part = specs[owner].component if owner in specs else OTHER
        if mtp is not None and owner.startswith(mtp):
            part += " (MTP layer)"
        key = (part, "INT4" if owner in weights else entry.dtype)
        counted.setdefault(key, set()).add(owner if owner in specs else name)
        sizes[key] += entry.bytes
    return [{"component": p, "stored": s, "weights": len(counted[p, s]), "bytes": sizes[p, s]} for p, s in sizes]


def _owner(name: str, owners: Mapping[str, str]) -> str:
    """The tensor of the model that a stored one belongs to: the parts of a quantised weight share its module."""
    return owners.get(name) or f"{name.rpartition('.')[0]}.weight"


def _tensor(
    directory: Path, stored: StoredTensors, stored_format: Format, weights: list[str], owners: Mapping[str, str], name: str
) -> dict[str, Any]:
    pieces = {key: entry for key, entry in stored.tensors.items() if _owner(key, owners) == name}
    with Reader(directory) as reader:
        if name in weights:
            packed, scales = stored_format.decode({key: reader.whole(entry) for key, entry in pieces.items()}, name)
            codes = unpack_int4(packed)
            histogram = torch.bincount(codes.flatten().to(torch.int64) + 8, minlength=16)
            return {
                "name": name,
                "shape": list(codes.shape),
                "group_size": codes.shape[1] // scales.shape[1],
                "file": pieces[next(iter(pieces))].file,
                "codes": {str(code - 8): int(count) for code, count in enumerate(histogram)},
                "scales": _summary(scales),
                "first_codes": codes[0, :16].tolist(),
            }
        if name not in stored.tensors and len(pieces) != 1:
            known = [*weights, *stored.tensors, *owners.values()]
            hint = f": here it is {', '.join(pieces)}" if pieces else did_you_mean(name, known)
            raise CheckpointError(f"{directory} holds no tensor {name}{hint}")
        entry = stored.tensors[name] if name in stored.tensors else next(iter(pieces.values()))
        values = _summary(reader.whole(entry))
        return {"name": name, "shape": list(entry.shape), "dtype": entry.dtype, "file": entry.file, "values": values}


def _summary(tensor: Tensor) -> dict[str, float]:
    wide = tensor.to(torch.float64).flatten()
    return {
        "smallest": float(wide.min()),
        "largest": float(wide.max()),
        "mean": float(wide.mean()),
        "not_finite": int((~wide.isfinite()).sum()),
        "zeros": int((wide == 0).sum()),
    }
