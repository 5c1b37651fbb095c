"""compressed-tensors `pack-quantized`: what transformers, vLLM, SGLang, vllm-ascend and kt-kernel load.

Per weight P.weight [out, in]:
    P.weight_packed  int32 [out, in / 8]      nibble j of word m is element 8 m + j, lowest bits first, stored as code + 8
    P.weight_scale   bf16  [out, in / group]  value = code * scale
    P.weight_shape   int32 [2]                out, in

Source: compressed-tensors 0.20.0, compressors/pack_quantized; int32 shapes as Kimi-K2 publishes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, groups_of
from glm5_port.quant.output_files import Container, OutputTensor, Safetensors
from glm5_port.quant.packing import CODES_PER_WORD

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"

_IGNORED = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*mlp\.gate$",
    r"re:.*eh_proj$",
)
"""What loaders must not take for quantised, in the spelling of Kimi-K2. Fused modules (gate_up_proj) appear under the names that
vLLM and SGLang give them; the router is a Linear there though not in transformers."""


class CompressedTensors:
    """The format layer of compressed-tensors `pack-quantized`."""

    name = "compressed-tensors"
    title = "compressed-tensors pack-quantized: transformers, vLLM, SGLang, vllm-ascend, kt-kernel"
    row_blocks = True
    container: Container = Safetensors()
    scale_dtype = torch.bfloat16
    is_source = True
    mtp = True

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses a weight that is no matrix of whole groups and whole words."""
        if len(shape) != 2:
            raise InputError(f"{name} {list(shape)} is no matrix [out, in], so it cannot be quantised: exclude it")
        groups_of(shape[1], rule.group_size, name=name)

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The three tensors of a weight."""
        rows, columns = shape
        return (
            OutputTensor.of(name + PACKED, "I32", (rows, columns // CODES_PER_WORD)),
            OutputTensor.of(name + SCALE, "BF16", (rows, groups_of(columns, rule.group_size, name=name)[0])),
            OutputTensor.of(name + SHAPE, "I32", (2,)),
        )

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The words as they are, and the scales."""
        return {name + PACKED: packed, name + SCALE: scales.to(torch.bfloat16)}

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The shape tensor."""
        return {name + SHAPE: torch.tensor(shape, dtype=torch.int32)}

    def is_int8(self, name: str) -> bool:
        """None is."""
        return False

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """None."""
        return {}

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> dict[str, Any]:
        """The block of config.json. Top-level `format` and targets ["Linear"] are what SGLang's classes look for."""
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel" if rule.group_size == PER_CHANNEL else "group",
                        "group_size": None if rule.group_size == PER_CHANNEL else rule.group_size,
                        "dynamic": False,
                        "actorder": None,
                        "observer": "minmax",
                        "observer_kwargs": {},
                    },
                }
            },
            "ignore": ignore_list(quantized, kept, mtp_layer),
        }

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """quantization_config must say what the tensors are, or loaders take them for something else."""
        if not isinstance(block, dict):
            return ["config.json has no quantization_config: loaders would look for weights that are not quantised"]
        wanted, problems = self.config(rule, [], [], mtp_layer), []
        for key, value in wanted.items():
            if key not in ("ignore", "config_groups") and value is not None and block.get(key) != value:
                problems.append(f"config.json: quantization_config.{key} = {block.get(key)!r}; expected {value!r}")
        try:
            (group,) = block["config_groups"].values()
            weights, targets = group["weights"], group["targets"]
        except (KeyError, TypeError, ValueError, AttributeError):
            return [*problems, "config.json: quantization_config.config_groups must hold one group with weights and targets"]
        if targets != ["Linear"]:
            problems.append(f"config.json: targets = {targets!r}; expected ['Linear']")
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size"):
            value = wanted["config_groups"]["group_0"]["weights"][key]
            if weights.get(key) != value:
                problems.append(f"config.json: weights.{key} = {weights.get(key)!r}; the tensors have {value!r}")
        ignored = block.get("ignore")
        entries = [str(entry) for entry in ignored] if isinstance(ignored, list) else []
        return problems + left_out_problems(
            "ignore", lambda module: any(ignores(entry, module) for entry in entries), quantized, kept
        )

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Weights of which a packed, scale or shape tensor is stored."""
        endings = tuple(f".weight{part}" for part in (PACKED, SCALE, SHAPE))
        return list(dict.fromkeys(name[: name.rindex("_")] for name in tensors if name.endswith(endings)))

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """From the widths of the packed and of the scale tensor."""
        packed, scale = tensors.get(name + PACKED), tensors.get(name + SCALE)
        if packed is None or scale is None or not len(packed.shape) == len(scale.shape) == 2 or not scale.shape[1]:
            return None
        return packed.shape[1] * CODES_PER_WORD // scale.shape[1], scale.shape[1]

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and scales of a weight.

        Raises:
            CheckpointError: its tensors do not fit each other.
        """
        packed, scales = read[name + PACKED], read[name + SCALE]
        if packed.dim() != 2 or scales.dim() != 2 or packed.shape[0] != scales.shape[0]:
            raise CheckpointError(f"{name}: packed {list(packed.shape)} and scale {list(scales.shape)} are not of one matrix")
        return packed, scales


def ignore_list(quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> list[str]:
    """The shortest list of the usual patterns that names every kept module and no quantised one; modules that no usual pattern
    fits are named one by one.

    Args:
        quantized: modules that must not be named.
        kept: modules that must be.
        mtp_layer: its pattern is used where nothing in it is quantised.
    """
    patterns = list(_IGNORED) if mtp_layer is None else [*_IGNORED, rf"re:.*layers\.{mtp_layer}\..*"]
    whole = [pattern for pattern in patterns if not any(ignores(pattern, module) for module in quantized)]
    return whole + [module for module in kept if not any(ignores(pattern, module) for pattern in whole)]


def left_out_problems(key: str, named: Callable[[str], bool], quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The list of what is not quantised must name every kept module, and no quantised one.

    Args:
        key: what the list is called.
        named: whether it names a module.
        quantized: modules that are.
        kept: matrices that are not.
    """
    both, neither = [m for m in quantized if named(m)], [m for m in kept if not named(m)]
    texts = ((both, "names modules that are quantised"), (neither, "does not name modules that are not quantised"))
    return [f"config.json: {key} {text} ({len(modules):,}), for example {modules[0]}" for modules, text in texts if modules]


def ignores(entry: str, module: str) -> bool:
    """Whether an entry of `ignore` names a module: a regular expression after "re:", else the whole name."""
    return re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module
