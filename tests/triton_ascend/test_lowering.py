"""Which of the CUDA backend's Triton kernels the compiler of triton-ascend lowers to Linalg for Ascend910B2."""

from __future__ import annotations

import re

import pytest

from glm5_port.backends.npu.rules import NEEDS
from glm5_port.registry import Implementation
from tests.triton_ascend.lowering import Refused, implementations, kernels, launches, lower

SCALAR_QUOTIENT = "attempting to construct a TypeRange with null types"
"""The lowering of `tl.div_rn` expects a tensor, and stops at a quotient of two scalars."""
MASKED_HISTOGRAM = "histogram() got an unexpected keyword argument 'mask'"
"""Triton 3.2, from which triton-ascend 3.2 is made, counts without a mask."""
TF32 = "please use input_precision='hf32' on Ascend instead"
"""Branches that are left early at compile time are read to their end by Triton 3.2, and so is the product in TF32."""

NOT_LOWERED = {
    "count_digits": MASKED_HISTOGRAM,
    "group_rows": MASKED_HISTOGRAM,
    "rms_norm_rows": SCALAR_QUOTIENT,
    "quantize_rows": SCALAR_QUOTIENT,
    "store_index": SCALAR_QUOTIENT,
    "int4_products": TF32,
    "int4_gate_up": TF32,
    "int4_down": TF32,
}
"""Kernels of which a launch at GLM-5 widths is refused, and what the compiler says. docs/ascend.md has them as a table."""


def of(implementation: Implementation) -> str:
    return f"{implementation.operator.name}-{implementation.variant}"


@pytest.mark.parametrize("implementation", implementations(), ids=of)
def test_kernels_lower_to_linalg(implementation: Implementation) -> None:
    assert launches(implementation), "no case at GLM-5 widths launches anything"
    for launch in launches(implementation):
        name, linalg, refusal = launch.kernel.__name__, "", ""
        try:
            linalg = lower(launch)
        except Refused as refused:
            refusal = str(refused).replace("\\", "")  # errors within errors quote their quotes
        if refusal:
            expected = NOT_LOWERED.get(name)
            assert expected is not None, f"{name} is not lowered, and not known for it:\n{refusal}"
            assert expected in refusal, f"{name} is refused for another reason than {expected!r}:\n{refusal}"
        else:
            assert re.search(rf"func\.func @{name}\(", linalg), f"{name} became something else:\n{linalg[:2000]}"
            assert not re.search(r"\btt\.(func|load|store|dot)\b", linalg), f"{name} was lowered in part"
            assert "memref.reinterpret_cast" in linalg, f"{name} reads no memory"


def test_what_is_called_refused_is() -> None:
    refused = set()
    for name, _, launch in kernels():
        if name in NOT_LOWERED and name not in refused:
            try:
                lower(launch)
            except Refused:
                refused.add(name)
    assert refused == set(NOT_LOWERED)


def test_kernels_without_a_vendor_operator() -> None:
    """Where this backend has portable implementations only, Triton's kernels could stand in; all but one would."""
    with_vendor = {name.partition("/")[0] for name in NEEDS}
    wanted = {name for name, implementation, _ in kernels() if implementation.operator.name not in with_vendor}
    assert {"attend_expanded", "scores_of_tokens", "quantize_groups", "quantize_and_measure_rows", "dequantize_words"} <= wanted
    assert wanted & set(NOT_LOWERED) == {"count_digits"}
