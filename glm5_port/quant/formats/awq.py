"""AWQ, layout "gemm": what AutoAWQ, vLLM, SGLang and transformers load as `quant_method: awq`.

Per weight P.weight [out, in] with codes q in -8..7, stored unsigned as q + 8 with the zero point 8:
    P.qweight  int32 [in, out / 8]     nibble j (bits 4j .. 4j+3) of word [k, m] is, of input k, output
                                       8 m + (0, 2, 4, 6, 1, 3, 5, 7)[j]
    P.qzeros   int32 [in / g, out / 8] zero points in the same order
    P.scales   fp16  [in / g, out]     value = (code - zero) * scale

The name is that of the layout alone: no activation-aware scaling takes place, the codes are those of the quantiser. Codes and
scales go there and back bit for bit, as long as float16 holds the scales: a scale that it does not hold is refused.

Source: AutoAWQ, WQLinear_GEMM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.formats.compressed_tensors import left_out_problems
from glm5_port.quant.formats.gptq import check_words, entry_problems, field_problems, left_out_entries, weights_of_parts
from glm5_port.quant.int4 import Int4Rule, groups_of
from glm5_port.quant.layouts import from_awq, to_awq
from glm5_port.quant.output_files import Container, OutputTensor, Safetensors
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4

_USUAL = ("lm_head", "self_attn", "shared_experts", "mlp.gate", "eh_proj")
"""What is usually not quantised. Loaders look for these texts anywhere in a module's name."""


class Awq:
    """The format layer of AWQ GEMM with zero point 8 everywhere."""

    name = "awq"
    title = "AWQ gemm layout, zero point 8: vLLM, SGLang, AutoAWQ"
    row_blocks = False
    container: Container = Safetensors()
    scale_dtype = torch.float16
    is_source = True
    mtp = True

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses a weight that is no matrix of whole groups and whole words in both directions."""
        check_words(name, shape, rule, self.name)

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The three tensors of a weight."""
        rows, columns = shape
        groups, _ = groups_of(columns, rule.group_size, name=name)
        module = name.removesuffix("weight")
        return (
            OutputTensor.of(module + "qweight", "I32", (columns, rows // CODES_PER_WORD)),
            OutputTensor.of(module + "qzeros", "I32", (groups, rows // CODES_PER_WORD)),
            OutputTensor.of(module + "scales", "F16", (groups, rows)),
        )

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """A whole weight."""
        return {
            name.removesuffix("weight") + part: tensor for part, tensor in to_awq(unpack_int4(packed), scales, name=name).items()
        }

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None: zero points depend on the group size, and are written with the codes."""
        return {}

    def is_int8(self, name: str) -> bool:
        """None is."""
        return False

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> dict[str, Any]:
        """The block of config.json. vLLM, SGLang and AutoAWQ read in `modules_to_not_convert` what is not quantised; GPT-QModel
        does not look there and takes random weights for such a module, unless `dynamic` names it."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": rule.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": _left_out(quantized, kept, mtp_layer),
            "dynamic": left_out_entries(quantized, kept, mtp_layer),
        }

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """Every field must be what the tensors are, and `modules_to_not_convert` name what is not quantised; `dynamic` too, if it
        is there: others write none."""
        problems = field_problems(block, self.config(rule, [], [], mtp_layer), "modules_to_not_convert", "dynamic")
        if isinstance(block, Mapping) and "dynamic" in block:
            problems += entry_problems(block, quantized, kept)
        listed = block.get("modules_to_not_convert") if isinstance(block, Mapping) else None
        entries = [str(entry) for entry in listed] if isinstance(listed, list) else []

        def named(module: str) -> bool:
            return any(entry in module for entry in entries)

        return problems + left_out_problems("modules_to_not_convert", named, quantized, kept)

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """quant_config.json, for loaders that look there first, GPT-QModel among them: the same with AutoAWQ's names."""
        block = block or {}
        own = {
            "zero_point": block.get("zero_point"),
            "q_group_size": block.get("group_size"),
            "w_bit": block.get("bits"),
            "version": "GEMM",
            "modules_to_not_convert": block.get("modules_to_not_convert"),
            "dynamic": block.get("dynamic"),
        }
        return {"quant_config.json": json.dumps(own, indent=2, ensure_ascii=False) + "\n"}

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Weights of which a part is stored."""
        return weights_of_parts(tensors, ("qweight", "qzeros", "scales"))

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """From the heights of the packed and of the scale tensor."""
        module = name.removesuffix("weight")
        packed, scales = tensors.get(module + "qweight"), tensors.get(module + "scales")
        if packed is None or scales is None or not len(packed.shape) == len(scales.shape) == 2 or not scales.shape[0]:
            return None
        return packed.shape[0] // scales.shape[0], scales.shape[0]

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and float16 scales of a weight.

        Raises:
            CheckpointError: its tensors do not fit each other.
            InputError: zero points that are not symmetric.
        """
        module = name.removesuffix("weight")
        packed, zeros, scales = read[module + "qweight"], read[module + "qzeros"], read[module + "scales"]
        if packed.shape[1] * CODES_PER_WORD != scales.shape[1] or not scales.shape[0] or packed.shape[0] % scales.shape[0]:
            raise CheckpointError(f"{name}: qweight {list(packed.shape)} and scales {list(scales.shape)} are not of one matrix")
        codes, canonical = from_awq(packed, zeros, scales, name=name)
        return pack_int4(codes), canonical


def _left_out(quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> list[str]:
    """The usual texts that name no quantised module, and one by one the kept modules that they miss."""
    usual = [*_USUAL] if mtp_layer is None else [*_USUAL, f"layers.{mtp_layer}."]
    whole = [text for text in usual if not any(text in module for module in quantized)]
    return whole + [module for module in kept if not any(text in module for text in whole)]
