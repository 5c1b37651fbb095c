"""INT4: the quantiser that training, export and operators share, and how its codes are packed.

int4      rules, quantize and dequantize, packed or not: one definition, the same bits on every device
packing   the canonical bit layout, that of compressed-tensors `pack-quantized`
layouts   codes and scales as GPTQ, AWQ, GGUF Q4_0 and ONNX store them
"""

from glm5_port.quant.int4 import (
    AMAX7,
    PER_CHANNEL,
    RULES,
    Int4Rule,
    Int4Tensor,
    dequantize,
    dequantize_packed,
    groups_of,
    quantize,
    quantize_packed,
)
from glm5_port.quant.packing import as_bytes, from_bytes, pack_int4, unpack_int4

__all__ = [
    "AMAX7",
    "PER_CHANNEL",
    "RULES",
    "Int4Rule",
    "Int4Tensor",
    "as_bytes",
    "dequantize",
    "dequantize_packed",
    "from_bytes",
    "groups_of",
    "pack_int4",
    "quantize",
    "quantize_packed",
    "unpack_int4",
]
