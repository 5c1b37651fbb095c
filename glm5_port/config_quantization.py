"""How a checkpoint is quantised: block-FP8, INT4 or INT8 weights, as the quantization_config of its config.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm5_port.errors import ConfigError

PER_CHANNEL = -1
"""INT4 group size of one scale for a whole row."""
_SUPPORT = (
    "supported: bf16, fp16 and fp32 checkpoints, block-FP8 (quant_method 'fp8'), routed experts in INT4 (quant_method "
    "'compressed-tensors', format 'pack-quantized', symmetric) and other projections in INT8 (format 'int-quantized', one scale "
    "for each output, activations by token); use such a release of the model, glm5-port export, "
    "or, for INT4 in GPTQ or AWQ, glm5-port transcode"
)
# dequantize says how transformers runs the checkpoint, scale_fmt how the multipliers were rounded: the bytes mean the same.
_FP8_KEYS = (
    "quant_method",
    "fmt",
    "activation_scheme",
    "expert_dtype",
    "weight_block_size",
    "modules_to_not_convert",
    "dequantize",
    "scale_fmt",
)
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
_INT8_WEIGHTS = {**_INT4_WEIGHTS, "num_bits": 8, "strategy": "channel"}
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "actorder": None}
"""What the weights, and the activations of INT8 ones, of the one config group must say."""


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """A block-FP8 checkpoint: e4m3 matrices with one float32 multiplier for each block.

    Attributes:
        block: rows and columns of a block; (128, 128) in every GLM-5 release.
        not_converted: the module names that were kept in floating point (`modules_to_not_convert`), with
            `indexers_proj`, which names no module, already read as `indexer.weights_proj`.
    """

    block: tuple[int, int]
    not_converted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """A checkpoint with INT4 weights (compressed-tensors `pack-quantized`, symmetric).

    Attributes:
        group_size: weights that share a scale, along the input dimension; `PER_CHANNEL` for a whole row.
        ignore: modules that are not quantised: names, or regular expressions after "re:".
    """

    group_size: int
    ignore: tuple[str, ...] = ()

    def names(self, module: str) -> bool:
        """Whether a linear module is stored in INT4."""
        return not _ignored(module, self.ignore)


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """A checkpoint with INT8 weights (compressed-tensors `int-quantized`, symmetric, one scale for each output). Activations are
    quantised token by token as they come: W8A8.

    Attributes:
        ignore: modules that are not quantised, as in `PackedInt4`.
    """

    ignore: tuple[str, ...] = ()

    def names(self, module: str) -> bool:
        """Whether a linear module is stored in INT8."""
        return not _ignored(module, self.ignore)


def _ignored(module: str, ignore: tuple[str, ...]) -> bool:
    return any(re.match(entry[3:], module) if entry.startswith("re:") else entry == module for entry in ignore)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_quantization(given: Mapping[str, Any]) -> dict[str, BlockFp8 | PackedInt4 | DynamicInt8 | None]:
    """The fields `quantization`, `int4` and `int8` of a Glm5Config.

    Raises:
        ConfigError: a scheme that this library does not read; names the field.
    """
    if "compression_config" in given:
        raise ConfigError(f"compression_config is not supported\n  {_SUPPORT}")
    if "quantization_config" not in given:
        return {}
    raw = given["quantization_config"]
    if not isinstance(raw, Mapping):
        raise ConfigError(f"quantization_config = {raw!r}: it must be an object")
    method = raw.get("quant_method")
    if method == "fp8":
        return {"quantization": _block_fp8(raw)}
    if method == "compressed-tensors":
        return {"int8": _dynamic_int8(raw)} if raw.get("format") == "int-quantized" else {"int4": _packed_int4(raw)}
    raise ConfigError(f"quantization_config.quant_method = {method!r} is not supported\n  {_SUPPORT}")


def _block_fp8(raw: Mapping[str, Any]) -> BlockFp8:
    for name, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic"), ("expert_dtype", "fp8")):
        if raw.get(name, only) != only:
            raise ConfigError(f"quantization_config.{name} = {raw[name]!r} is not supported: block-FP8 has {name} = {only!r}")
    block = raw.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(is_integer(edge) and edge > 0 for edge in block):
        raise ConfigError(f"quantization_config.weight_block_size = {block!r}: it must be two positive integers ([128, 128])")
    unknown = sorted(key for key, value in raw.items() if value is not None and key not in _FP8_KEYS)
    if unknown:
        raise ConfigError(
            f"quantization_config.{unknown[0]} = {raw[unknown[0]]!r} is not known; known are {', '.join(_FP8_KEYS)}"
        )
    kept = raw.get("modules_to_not_convert", ()) or ()
    if not isinstance(kept, list | tuple):
        raise ConfigError(f"quantization_config.modules_to_not_convert = {kept!r}: it must be a list of module names")
    # The releases name `self_attn.indexers_proj`, which is no module; they mean the indexer's weights_proj, stored in bf16.
    return BlockFp8((block[0], block[1]), tuple(str(name).replace("indexers_proj", "indexer.weights_proj") for name in kept))


def _packed_int4(raw: Mapping[str, Any]) -> PackedInt4:
    _expect(raw, "format", "pack-quantized")
    group = _only_group(raw)
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or group.get("input_activations") is not None:
        raise ConfigError(f"quantization_config.config_groups: expected weights only, got {group!r}\n  {_SUPPORT}")
    _expect_all("weights", weights, _INT4_WEIGHTS)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    size = PER_CHANNEL if strategy == "channel" else size if strategy == "group" else None
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != PER_CHANNEL):
        raise ConfigError(
            f"quantization_config weights.strategy = {strategy!r} with group_size = {weights.get('group_size')!r}: supported are "
            "'group' with a positive group_size, and 'channel'"
        )
    return PackedInt4(size, _ignore(raw))


def _dynamic_int8(raw: Mapping[str, Any]) -> DynamicInt8:
    group = _only_group(raw)
    weights, activations = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(activations, Mapping):
        raise ConfigError(
            f"quantization_config.config_groups: expected weights and input_activations, got {group!r}\n  {_SUPPORT}"
        )
    _expect_all("weights", weights, _INT8_WEIGHTS)
    _expect_all("input_activations", activations, _INT8_ACTIVATIONS)
    return DynamicInt8(_ignore(raw))


def _only_group(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError(f"quantization_config.config_groups = {groups!r}: it must hold exactly one group\n  {_SUPPORT}")
    (group,) = groups.values()
    return group if isinstance(group, Mapping) else {}


def _expect_all(part: str, given: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    for name, value in only.items():
        if given.get(name, value) != value:
            raise ConfigError(f"quantization_config {part}.{name} = {given[name]!r} is not supported: {value!r} is\n  {_SUPPORT}")


def _ignore(raw: Mapping[str, Any]) -> tuple[str, ...]:
    ignore = raw.get("ignore", ()) or ()
    if not isinstance(ignore, list | tuple) or not all(isinstance(entry, str) for entry in ignore):
        raise ConfigError(f"quantization_config.ignore = {ignore!r}: it must be a list of names and 're:' patterns")
    for entry in ignore:
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"quantization_config.ignore: {entry!r} is no regular expression ({error})") from error
    return tuple(ignore)


def _expect(raw: Mapping[str, Any], name: str, only: object) -> None:
    if raw.get(name) != only:
        raise ConfigError(f"quantization_config.{name} = {raw.get(name)!r} is not supported: {only!r} is\n  {_SUPPORT}")


def is_integer(value: object) -> bool:
    """True for an int that is no bool: JSON's true must not pass as 1."""
    return isinstance(value, int) and not isinstance(value, bool)


# --- writing ---------------------------------------------------------------------------------------------------------


def int_quantized(int8: DynamicInt8) -> dict[str, Any]:
    """The quantization_config of such a checkpoint."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": list(int8.ignore),
    }


def pack_quantized(int4: PackedInt4) -> dict[str, Any]:
    """The quantization_config of such a checkpoint."""
    size = None if int4.group_size == PER_CHANNEL else int4.group_size
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group" if size else "channel", "group_size": size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(int4.ignore),
    }
