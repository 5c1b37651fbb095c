"""msModelSlim "ascendV1": what vllm-ascend loads with `--quantization ascend`.

Routed experts are W4A8_DYNAMIC, per weight P.weight [out, in] with codes q and one scale s for each output channel:
    P.weight         int8 [out / 2, in]  byte [r, k] holds channel 2 r (low four bits) and 2 r + 1 (high), two's complement
    P.weight_scale   fp32 [out, 1]       s
    P.weight_offset  fp32 [out, 1]       zero
    P.scale_bias     fp32 [out, 1]       8 * sum over the inputs of q * s; of down_proj [out, 16]: one sum for each sixteenth of
                                         the inputs, so that up to 16 ranks can add up their own
The kernel multiplies by unsigned high and low halves and adds scale_bias back: without it every channel is shifted.

Attention, indexer queries, dense MLP and shared experts are W8A8_DYNAMIC: int8 [out, in], weight_scale and weight_offset as
above. kv_b_proj (absorbed into the attention), the indexer's wk and weights_proj, routers, norms, embedding, head and the MTP
layer stay as they are. quant_model_description.json says of every tensor what it is; config.json has no quantization_config.

The format has one scale for each channel and no groups: vllm-ascend refuses W4A8 experts with groups.

Source: msmodelslim 26.1.0 (saver ascendv1, utils/pack.py), its recipe for GLM-5, vllm-ascend quantization/methods/w4a8.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule, groups_of
from glm5_port.quant.output_files import Container, OutputTensor, Safetensors
from glm5_port.quant.packing import pack_int4, unpack_int4

TYPES = {"int4": "W4A8_DYNAMIC", "repack": "W4A8_DYNAMIC", "int8": "W8A8_DYNAMIC"}
"""What became of a tensor -> its type in the description; anything else is FLOAT."""
INPUT_SHARDS = 16
"""Parts of down_proj's inputs that have a sum of their own in scale_bias."""
_IN_FLOAT = (".kv_b_proj.", ".indexer.wk.", ".indexer.weights_proj.")
"""Projections that stay as they are."""


class ModelSlim:
    """The format layer of msModelSlim W4A8_DYNAMIC per channel, with W8A8_DYNAMIC around it."""

    name = "modelslim"
    title = "msModelSlim ascendV1: experts W4A8_DYNAMIC per channel, other projections W8A8_DYNAMIC: vllm-ascend"
    row_blocks = False
    container: Container = Safetensors("quant_model_weights")
    scale_dtype = torch.float32
    is_source = False
    mtp = False

    def check(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> None:
        """Refuses what is no routed expert, has groups, or does not fill bytes and shards."""
        if len(shape) != 2 or ".mlp.experts." not in name:
            raise InputError(
                f"{name}: format {self.name} has INT4 for routed experts only (vllm-ascend removed W4A8 for other linears)\n"
                "  Other projections become INT8 by themselves: leave this one out of --include"
            )
        groups, size = groups_of(shape[1], rule.group_size, name=name)
        if groups != 1:
            raise InputError(
                f"{name}: format {self.name} has one scale for each output channel, not groups of {size}: vllm-ascend refuses "
                f"W4A8 experts with groups\n  Use --group-size {PER_CHANNEL}. A checkpoint in groups cannot be carried exactly: "
                f"export the original weights with --group-size {PER_CHANNEL}, or serve the compressed-tensors export as W4A16"
            )
        if shape[0] % 2 or (_is_down(name) and shape[1] % INPUT_SHARDS):
            raise InputError(
                f"{name} {list(shape)}: format {self.name} packs two outputs in a byte, and sums down_proj in {INPUT_SHARDS} "
                "parts of its inputs\n  expected: an even number of outputs, and for down_proj inputs that are a multiple of 16"
            )

    def tensors(self, name: str, shape: tuple[int, ...], rule: Int4Rule) -> tuple[OutputTensor, ...]:
        """The four tensors of a weight."""
        rows, columns = shape
        return (
            OutputTensor.of(name, "I8", (rows // 2, columns)),
            OutputTensor.of(name + "_scale", "F32", (rows, 1)),
            OutputTensor.of(name + "_offset", "F32", (rows, 1)),
            OutputTensor.of(_bias_name(name), "F32", (rows, INPUT_SHARDS if _is_down(name) else 1)),
        )

    def encode(self, name: str, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """A whole weight."""
        codes, wide = unpack_int4(packed), scales.to(torch.float32)
        return {
            name: (codes[0::2] & 15) | (codes[1::2] << 4),
            name + "_scale": wide,
            name + "_offset": torch.zeros_like(wide),
            _bias_name(name): _scale_bias(name, codes, wide),
        }

    def constants(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """None."""
        return {}

    def is_int8(self, name: str) -> bool:
        """All projections but those that stay as they are."""
        return not any(part in name for part in _IN_FLOAT)

    def config(self, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None) -> None:
        """None: quant_model_description.json says it all."""

    def config_problems(
        self, block: Any, rule: Int4Rule, quantized: Sequence[str], kept: Sequence[str], mtp_layer: int | None
    ) -> list[str]:
        """There must be no quantization_config."""
        return (
            [] if block is None else ["config.json has a quantization_config, which vllm-ascend would prefer to the description"]
        )

    def files(self, block: Mapping[str, Any] | None, outputs: Mapping[str, str]) -> dict[str, str]:
        """quant_model_description.json: the type of every tensor. As msModelSlim does, the global type names that of the
        majority of modules; engines decide by tensor."""
        types = {name: TYPES.get(action, "FLOAT") for name, action in sorted(outputs.items())}
        head = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0, "metadata": {}, "optional": {}}
        return {"quant_model_description.json": json.dumps(head | types, indent=2) + "\n"}

    def weights(self, tensors: Mapping[str, Any]) -> list[str]:
        """Weights that have a scale_bias."""
        return [f"{name.removesuffix('scale_bias')}weight" for name in tensors if name.endswith(".scale_bias")]

    def group_size(self, tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, int] | None:
        """The width: a scale for each row."""
        return (tensors[name].shape[1], 1) if name in tensors and len(tensors[name].shape) == 2 else None

    def decode(self, read: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Words and float32 scales of a weight.

        Raises:
            CheckpointError: its tensors do not fit each other.
        """
        pairs, scales = read[name], read[name + "_scale"]
        if pairs.dim() != 2 or scales.shape != (2 * pairs.shape[0], 1):
            raise CheckpointError(
                f"{name}: weight {list(pairs.shape)} and weight_scale {list(scales.shape)} are not of one matrix"
            )
        codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=1).flatten(0, 1)  # int8: shifting right keeps the sign
        if bool(read[name + "_offset"].any()):
            raise CheckpointError(f"{name}_offset is not zero everywhere")
        if not torch.equal(read[_bias_name(name)], _scale_bias(name, codes, scales)):
            raise CheckpointError(f"{_bias_name(name)} is not 8 * the sum of code * scale")
        return pack_int4(codes), scales


def _is_down(name: str) -> bool:
    return name.endswith(".down_proj.weight")


def _bias_name(name: str) -> str:
    return f"{name.removesuffix('weight')}scale_bias"


def _scale_bias(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """8 * sum(q) * s for each part of the inputs. The sum is an integer and the product one rounding to float32; with scales
    that came from bfloat16 and up to 9362 inputs (7 * 9362 < 2^16) there is nothing to round."""
    parts = INPUT_SHARDS if _is_down(name) else 1
    sums = codes.unflatten(1, (parts, -1)).sum(-1, dtype=torch.int64)
    return (8 * sums.to(torch.float64) * scales.to(torch.float64)).to(torch.float32)
