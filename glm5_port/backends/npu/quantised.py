"""int4_matmul by npu_weight_quant_batchmatmul and int8_matmul by npu_quant_matmul, and how both kinds of weights are prepared.

Shape legend: K inputs; N outputs; G groups of inputs; T rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.npu.contracts.kinds import HALF, WIDEST
from glm5_port.backends.npu.contracts.quantised import (
    DYNAMIC_QUANT,
    INT4PACK,
    QUANT_MATMUL,
    WEIGHT_QUANT_BATCHMATMUL,
    group_fits,
)
from glm5_port.backends.npu.contracts.small import FORMAT_CAST
from glm5_port.backends.npu.nz import to_nz
from glm5_port.backends.npu.rules import Needs, Rule, aclnn, call, dtype_among
from glm5_port.errors import InputError
from glm5_port.operators.int4 import SMALLEST_ROW, check_int4, int4_matmul, int8_matmul
from glm5_port.quant.packing import unpack_int4

SCALES_ARE_BFLOAT16 = Rule(
    "dtype",
    "takes bfloat16, not {dtype}: scales come in the dtype of the rows, and float16 does not hold them all",
    lambda *, dtype, **_: dtype == torch.bfloat16,
)
_WIDTHS = Rule(
    "widths",
    f"wants widths up to {WIDEST}, not {{width_in}} and {{width_out}}",
    lambda *, width_in, width_out, **_: width_in <= WIDEST and width_out <= WIDEST,
)


def pack_for_npu(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical words [out, in / 8] to codes [in, out] int32, and those in the vendor's words [in, out / 8]."""
    codes_KN = unpack_int4(packed).t().to(torch.int32).contiguous()
    return codes_KN, call(INT4PACK, codes_KN)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, K] as codes int8 and scales [T] float32. What the vendor does with rows of zeros, NaN and infinity is not
    documented, so their scales are set here: 0 and NaN, and whatever the codes are, so is the product."""
    codes, scales = call(DYNAMIC_QUANT, rows, dst_type=torch.int8)
    amax = rows.abs().amax(-1).to(torch.float32)
    scales = torch.where(amax < SMALLEST_ROW, 0.0, torch.where(amax.isfinite(), scales, torch.nan))
    return codes, scales


# -- 4-bit weights -------------------------------------------------------------------------------------------------------


class PackedWeight:
    """Preparation of one INT4 weight: the vendor's words [in, out / 8], scales and zero offsets [G, out]."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._group_size: int = facts["group_size"]
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is not None:
            raise InputError(f"int4_matmul on npu: part {part} arrived, but this operator takes its weights whole")
        check_int4("int4_matmul on npu", tensors["packed"], tensors["scales"], self._group_size)
        _, words = pack_for_npu(tensors["packed"])
        scales = tensors["scales"].t().contiguous().to(torch.bfloat16)
        self._tensors = {"words": words, "group_scales": scales, "group_offsets": torch.zeros_like(scales)}

    def finish(self) -> dict[str, Tensor | int]:
        if not self._tensors:
            raise InputError("weights missing: packed, scales")
        return dict(self._tensors)


_INT4_RULES = (
    SCALES_ARE_BFLOAT16,
    _WIDTHS,
    Rule(
        "outputs",
        "packs eight codes along the outputs, and {width_out} is no whole 8s",
        lambda *, width_out, **_: width_out % 8 == 0,
    ),
    Rule(
        "group size",
        "wants groups of 32 to {width_in} - 1 inputs in whole 32s, or one a row, not {group_size}",
        lambda *, group_size, width_in, **_: group_size in (-1, width_in) or group_fits(group_size, width_in),
    ),
)


@aclnn(
    int4_matmul,
    Needs((WEIGHT_QUANT_BATCHMATMUL, INT4PACK), _INT4_RULES),
    prepare=PackedWeight,
    fake=lambda x, *, group_size, words, group_scales, group_offsets: x.new_empty((*x.shape[:-1], group_scales.shape[1])),
)
def int4_matmul_aclnn(x: Tensor, *, group_size: int, words: Tensor, group_scales: Tensor, group_offsets: Tensor) -> Tensor:
    outputs = group_scales.shape[1]
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    rows_TK = x.reshape(-1, x.shape[-1])
    if rows_TK.shape[1] != words.shape[0]:
        raise InputError(f"int4_matmul: rows of {rows_TK.shape[1]} numbers, and a weight of {words.shape[0]} inputs")
    one_group = group_scales.shape[0] == 1
    y: Tensor = call(
        WEIGHT_QUANT_BATCHMATMUL,
        rows_TK.contiguous(),
        words,
        group_scales,
        group_offsets,
        antiquant_group_size=0 if one_group else group_size,
        inner_precise=0,
    )
    return y.view(*x.shape[:-1], outputs)


# -- 8-bit weights -------------------------------------------------------------------------------------------------------


class BlockedWeight:
    """Preparation of one INT8 weight: [in, out] in the vendor's blocked format, which its product reads without transposing."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._tensors: dict[str, Tensor] = {}

    def add(self, part: int | None, tensors: Mapping[str, Tensor]) -> None:
        if part is not None:
            raise InputError(f"int8_matmul on npu: part {part} arrived, but this operator takes its weights whole")
        blocked = to_nz(tensors["weight"].t().contiguous())
        self._tensors = {"blocked": blocked, "output_scales": tensors["weight_scale"].to(torch.float32).contiguous()}

    def finish(self) -> dict[str, Tensor | int]:
        if not self._tensors:
            raise InputError("weights missing: weight, weight_scale")
        return dict(self._tensors)


@aclnn(
    int8_matmul,
    Needs((DYNAMIC_QUANT, QUANT_MATMUL, FORMAT_CAST), (dtype_among(*HALF), _WIDTHS)),
    prepare=BlockedWeight,
    fake=lambda x, *, blocked, output_scales: x.new_empty((*x.shape[:-1], output_scales.shape[0])),
)
def int8_matmul_aclnn(x: Tensor, *, blocked: Tensor, output_scales: Tensor) -> Tensor:
    outputs = output_scales.shape[0]
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    codes, row_scales = quantise_rows(x.reshape(-1, x.shape[-1]))
    y: Tensor = call(QUANT_MATMUL, codes, blocked, output_scales, pertoken_scale=row_scales, output_dtype=x.dtype)
    return y.view(*x.shape[:-1], outputs)
