"""Compares what a checkpoint stores with what the model expects, both ways, and says all differences at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8
from glm5_port.model.block_fp8 import SCALE_SUFFIX, scale_name, scale_shape
from glm5_port.model.stored_tensors import FLOATS, FP8, StoredTensor, StoredTensors
from glm5_port.model.tensors import (
    FLOAT32,
    INT4_CODES,
    INT4_SCALES,
    INT4_SHAPE,
    INT8_CODES,
    INT8_SCALES,
    PROJECTION,
    TensorSpec,
    mtp_tensors,
)

MOST_GROUPS = 10
"""Groups of similar names shown under each heading."""
MOST_NAMES = 3
"""Groups up to this size are shown by all their names."""

PART_DTYPES = {
    INT4_CODES: ("I32",),
    INT4_SCALES: ("BF16",),
    INT4_SHAPE: ("I32", "I64"),
    INT8_CODES: ("I8",),
    INT8_SCALES: ("BF16", "F32"),
}
"""Part of an INT4 or INT8 weight -> how it may be stored. Kimi-style exporters write the shape as I32, compressed-tensors
as I64."""

Finding = tuple[str, str]
"""(name of a tensor, what is wrong with it; empty when the heading says it all)"""


def differences(expected: Mapping[str, TensorSpec], stored: StoredTensors, config: Glm5Config) -> list[str]:
    """One block of text for each sort of difference; empty when the checkpoint fits.

    Args:
        expected: the tensors that the model needs.
        stored: what the directory holds.
        config: tells the quantisation, and which layer is the MTP layer: its tensors may be there without being needed.
    """
    tensors = stored.tensors
    needed = _with_scales(expected, tensors, config.quantization)
    unneeded = (
        {} if config.mtp_layer is None else _with_scales(mtp_tensors(config, config.mtp_layer), tensors, config.quantization)
    )
    missing = [(name, "") for name in needed if name not in tensors and name not in stored.unreadable]
    unexpected = [(name, _why_unexpected(name, tensors)) for name in tensors if name not in needed and name not in unneeded]
    shapes: list[Finding] = []
    dtypes: list[Finding] = []
    for name, spec in needed.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape != spec.shape:
            shapes.append((name, f"expected {list(spec.shape)}, got {list(tensor.shape)}"))
        if tensor is not None and (reason := _wrong_dtype(name, tensor.dtype, spec.kind, config.quantization)):
            dtypes.append((name, reason))
    headed = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes), ("wrong dtype", dtypes))
    files = [_section("files", [(fault, "") for fault in stored.faults])] if stored.faults else []
    return files + [_section(heading, found) for heading, found in headed if found]


def kept_in_float(name: str, quantization: BlockFp8) -> bool:
    """Whether `modules_to_not_convert` names the module of a tensor: an entry is one or more whole components of its path,
    so that "mlp.gate" means the router and not `gate_proj`, and "model.layers.1" not layer 10."""
    path = f".{name.rpartition('.')[0]}."
    return any(f".{entry.strip('.^$')}." in path for entry in quantization.not_converted)


def _with_scales(
    specs: Mapping[str, TensorSpec], tensors: Mapping[str, StoredTensor], quantization: BlockFp8 | None
) -> dict[str, TensorSpec]:
    """The specs, and the multipliers of every matrix that is stored as FP8."""
    scaled = dict(specs)
    for name, spec in specs.items():
        tensor = tensors.get(name)
        if quantization is not None and tensor is not None and tensor.dtype == FP8 and len(spec.shape) == 2:
            scaled[scale_name(name)] = TensorSpec(scale_shape(spec.shape, quantization.block), FLOAT32, spec.component)
    return scaled


def _why_unexpected(name: str, tensors: Mapping[str, StoredTensor]) -> str:
    weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
    if name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype != FP8:
        return f"multipliers of a weight that is stored as {weight.dtype}"
    return ""


def _wrong_dtype(name: str, dtype: str, kind: str, quantization: BlockFp8 | None) -> str:
    """Why a tensor may not be stored in this dtype; empty if it may."""
    if kind == FLOAT32:
        if dtype == "F32":
            return ""
        if name.endswith("e_score_correction_bias"):
            return (
                f"expected F32, got {dtype}: rounded, it routes tokens to other experts. In transformers "
                "`model.to(torch.bfloat16)` rounds it and `from_pretrained(..., dtype=torch.bfloat16)` keeps it"
            )
        return f"expected F32, got {dtype}"
    if kind in PART_DTYPES:
        allowed = PART_DTYPES[kind]
        return "" if dtype in allowed else f"expected {' or '.join(allowed)}, got {dtype}"
    if dtype != FP8:
        return "" if dtype in FLOATS else f"expected {', '.join(FLOATS)} or block-FP8, got {dtype}"
    if quantization is None:
        return "stored as FP8, but config.json has no quantization_config that tells the block size"
    if kind != PROJECTION:
        return "stored as FP8, but block-FP8 keeps this tensor in floating point"
    if kept_in_float(name, quantization):
        return "stored as FP8, but modules_to_not_convert names it"
    return ""


def _section(heading: str, found: Iterable[Finding]) -> str:
    """A heading with the count, then one line for each group of names that differ only in layer and expert numbers."""
    groups: dict[Finding, list[str]] = {}
    count = 0
    for name, reason in found:
        count += 1
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason), []).append(name)
    lines = [_line(pattern, names, reason) for (pattern, reason), names in list(groups.items())[:MOST_GROUPS]]
    if len(groups) > MOST_GROUPS:
        rest = sum(len(names) for names in list(groups.values())[MOST_GROUPS:])
        lines.append(f"and {rest:,} more")
    return "\n    ".join([f"{heading} ({count:,}):", *lines])


def _line(pattern: str, names: list[str], reason: str) -> str:
    what = ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names):,} x {pattern} (from {names[0]} to {names[-1]})"
    return f"{what}: {reason}" if reason else what
