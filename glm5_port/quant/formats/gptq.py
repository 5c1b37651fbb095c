"""GPTQ: what GPTQModel, vLLM, SGLang and transformers load as `quant_method: gptq`.

Per weight P.weight [out, in] with codes q in -8..7, stored unsigned as q + 8 with the zero point 8:
    P.qweight  int32 [in / 8, out]     nibble j (bits 4j .. 4j+3) of word [m, c] is input 8 m + j of output c
    P.qzeros   int32 [in / g, out / 8] nibble j of word [n, m] is output 8 m + j; version 1 stores the zero point less one: 7
    P.scales   fp16  [in / g, out]     value = (code - zero) * scale
    P.g_idx    int32 [in]              group of each input; here always input // g (no activation order)

Codes and scales of a symmetric INT4 weight go there and back bit for bit, as long as float16 holds the scales: a scale that
it does not hold is refused.

Source: documentation of GPTQModel and AutoGPTQ, format "gptq" (version 1) and "gptq_v2" (zero points as they are).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.formats.compressed_tensors import ignore_list, left_out_problems
from glm5_port.quant.int4 import Int4Rule, groups_of
from glm5_port.quant.layouts import from_gptq, to_gptq
from glm5_port.quant.output_files import Container, OutputTensor, Safetensors
from glm5_port.quant.packing import CODES_PER_WORD, pack_int4, unpack_int4


class Gptq:
    """The format layer of GPTQ, symmetric, version 1. Reads version 2 as well."""

    name = "gptq"
    title = "GPTQ, symmetric, no activation order: vLLM, SGLang, GPTQModel"
    row_blocks = False
    container: Container = Safetensors()
    scale_dtype = torch.float16
    is_source = True
    mtp = True

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses a weight that is no matrix of whole groups and whole words in both directions."""
        check_words(name, shape, rule, self.name)

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The four tensors of a weight."""
        rows, columns = shape
        groups, _ = groups_of(columns, rule.group_size, name=name)
        module = name.removesuffix("weight")
        return (
            OutputTensor.of(module + "qweight", "I32", (columns // CODES_PER_WORD, rows)),
            OutputTensor.of(module + "qzeros", "I32", (groups, rows // CODES_PER_WORD)),
            OutputTensor.of(module + "scales", "F16", (groups, rows)),
            OutputTensor.of(module + "g_idx", "I32", (columns,)),
        )

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """A whole weight."""
        return {
            name.removesuffix("weight") + part: tensor for part, tensor in to_gptq(unpack_int4(packed), scales, name=name).items()
        }

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None: zero points and group indices depend on the group size, and are written with the codes."""
        return {}

    def is_int8(self, name: str) -> bool:
        """None is."""
        return False

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> dict[str, Any]:
        """The block of config.json. GPT-QModel, vLLM and SGLang read in `dynamic` what is not quantised."""
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": rule.group_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "dynamic": left_out_entries(quantized, kept, mtp_layer),
        }

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """Every field must be what the tensors are, and `dynamic` name what is not quantised."""
        problems = field_problems(block, self.config(rule, [], [], mtp_layer), "dynamic")
        return problems + entry_problems(block, quantized, kept)

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """quantize_config.json: the same block, for loaders that look there."""
        return {"quantize_config.json": json.dumps(dict(block or {}), indent=2, ensure_ascii=False) + "\n"}

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Weights of which a part is stored."""
        return weights_of_parts(tensors, ("qweight", "qzeros", "scales", "g_idx"))

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """From the heights of the packed and of the scale tensor."""
        module = name.removesuffix("weight")
        packed, scales = tensors.get(module + "qweight"), tensors.get(module + "scales")
        if packed is None or scales is None or not len(packed.shape) == len(scales.shape) == 2 or not scales.shape[0]:
            return None
        return packed.shape[0] * CODES_PER_WORD // scales.shape[0], scales.shape[0]

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and float16 scales of a weight.

        Raises:
            CheckpointError: its tensors do not fit each other.
            InputError: zero points that are not symmetric, or an activation order.
        """
        module = name.removesuffix("weight")
        packed, zeros, scales = read[module + "qweight"], read[module + "qzeros"], read[module + "scales"]
        inputs, groups = packed.shape[0] * CODES_PER_WORD, scales.shape[0]
        if packed.shape[1:] != scales.shape[1:] or groups == 0 or inputs % groups:
            raise CheckpointError(f"{name}: qweight {list(packed.shape)} and scales {list(scales.shape)} are not of one matrix")
        version = 2 if zeros.numel() and not bool(unpack_int4(zeros).any()) else 1
        codes, canonical = from_gptq(packed, zeros, scales, read[module + "g_idx"], name=name, version=version)
        return pack_int4(codes), canonical


def check_words(name: str, shape: tuple[int, ...], rule: Int4Rule, format_name: str) -> None:
    """Refuses a weight that is no matrix of whole groups, or whose outputs do not fill whole words.

    Raises:
        InputError: it is none.
    """
    if len(shape) != 2:
        raise InputError(f"{name} {list(shape)} is no matrix [out, in], so it cannot be quantised: exclude it")
    groups_of(shape[1], rule.group_size, name=name)
    if shape[0] % CODES_PER_WORD:
        raise InputError(
            f"{name}: {shape[0]} outputs do not fill words of {CODES_PER_WORD}, as {format_name} packs them\n"
            "  Leave this tensor out (--exclude), or choose --format compressed-tensors"
        )


def field_problems(block: Any, wanted: Mapping[str, Any], *left_out: str) -> list[str]:
    """Fields of a quantization_config that are not what the tensors are.

    Args:
        block: as stored.
        wanted: as it should be.
        left_out: fields that are checked elsewhere.
    """
    if not isinstance(block, Mapping):
        return ["config.json has no quantization_config: loaders would look for weights that are not quantised"]
    return [
        f"config.json: quantization_config.{key} = {block.get(key)!r}; the tensors have {value!r}"
        for key, value in wanted.items()
        if key not in left_out and block.get(key) != value
    ]


def weights_of_parts(tensors: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Names of the weights of which a part is stored under a name of its own."""
    found = (name.rpartition(".") for name in tensors)
    return list(dict.fromkeys(f"{module}.weight" for module, _, part in found if part in parts))


def left_out_entries(quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> dict[str, dict[str, Any]]:
    """`dynamic`: entries that begin with "-:" name, as regular expressions, what is not quantised. The same as the `ignore` of
    compressed-tensors."""
    entries = ignore_list(quantized, kept, mtp_layer)
    return {f"-:{entry[3:]}" if entry.startswith("re:") else f"-:^{re.escape(entry)}$": {} for entry in entries}


def entry_problems(block: Any, quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """What `dynamic` names and should not, or does not name and should."""
    dynamic = block.get("dynamic") if isinstance(block, Mapping) else None
    skipped = [str(entry)[2:] for entry in (dynamic or {}) if str(entry).startswith("-:")]

    def named(module: str) -> bool:
        return any(re.match(pattern, module) for pattern in skipped)

    return left_out_problems("dynamic", named, quantized, kept)
