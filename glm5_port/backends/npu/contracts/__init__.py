"""The vendor's operators that this backend calls, and the rules that their documents give.

Source: the operator pages of Ascend/op-plugin (docs/zh/custom_APIs/torch_npu, August 2026), and what torch_npu 2.10 to 2.14
declare. None of these rules was met on hardware by this project. Where a page leaves something open, the docstring of the
implementation says what it relies on.

A2 and A3 are the vendor's product families (Ascend910B, Ascend910_93), 950PR and 950DT the chips of the Ascend950 family.
"""

from __future__ import annotations

from glm5_port.backends.npu.contracts.attention import (
    FUSED_INFER_ATTENTION,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    MLA_PROLOG,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
)
from glm5_port.backends.npu.contracts.experts import (
    FINALIZE_ROUTING,
    GATING_TOP_K,
    GROUPED_MATMUL,
    INIT_ROUTING,
)
from glm5_port.backends.npu.contracts.quantised import (
    DYNAMIC_QUANT,
    INT4PACK,
    QUANT_MATMUL,
    WEIGHT_QUANT_BATCHMATMUL,
)
from glm5_port.backends.npu.contracts.small import (
    ADD_RMS_NORM,
    FORMAT_CAST,
    RMS_NORM,
    ROTARY_MUL,
    SCATTER_ND_UPDATE,
    SWIGLU,
    TRANSPOSE_BATCHMATMUL,
)

VENDOR_OPERATORS = {
    operator.name: operator
    for operator in (
        RMS_NORM,
        ADD_RMS_NORM,
        ROTARY_MUL,
        SWIGLU,
        TRANSPOSE_BATCHMATMUL,
        FORMAT_CAST,
        SCATTER_ND_UPDATE,
        MLA_PROLOG,
        LIGHTNING_INDEXER,
        QUANT_LIGHTNING_INDEXER,
        SPARSE_FLASH_ATTENTION,
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        FUSED_INFER_ATTENTION,
        GATING_TOP_K,
        INIT_ROUTING,
        FINALIZE_ROUTING,
        GROUPED_MATMUL,
        INT4PACK,
        WEIGHT_QUANT_BATCHMATMUL,
        DYNAMIC_QUANT,
        QUANT_MATMUL,
    )
}
