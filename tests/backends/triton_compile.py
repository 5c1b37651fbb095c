"""Compiles kernels for a GPU that is not here, as a launch would, and says what they take: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm5_port.backends.cuda.triton_support import Launch, assume, recording
from glm5_port.registry import Implementation
from glm5_port.testing.calls import prepared_arguments
from glm5_port.testing.cases import Case

TARGETS = (80, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes that one block may take on each target."""
TENSOR_MEMORY = 512
"""Columns of a multiprocessor of 10.0. Triton 3.6 compiles a kernel that needs more to nothing, without an error."""
ALIGNMENT = 16
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a target."""

    name: str
    registers: int
    stack: int
    shared: int
    tensor: int

    def __str__(self) -> str:
        memory = f"{self.shared} bytes of shared memory, {self.tensor} columns of tensor memory"
        return f"{self.name}: {self.registers} registers, {self.stack} bytes spilled, {memory}"


def launches_of(implementation: Implementation, case: Case, dtype: torch.dtype, target: int) -> list[Launch]:
    """The launches that an implementation would make for a case on a card; nothing runs."""
    arguments = case.arguments(implementation.operator, dtype)
    facts = implementation.operator.facts_of(arguments)
    with assume(divmod(target, 10)):
        if implementation.not_supported(**facts):
            return []
        given = prepared_arguments(implementation, facts, arguments)
        with recording() as launches, torch.no_grad():
            implementation.function(**given)
    return launches


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(parameter -> type, place -> constant, place -> attributes), as Triton derives them from the arguments of a launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        plain = parameter.do_not_specialize  # one kernel for all numbers
        aligned = False
        if parameter.is_constexpr or value is None or (value is True) or (value is False):
            signature[parameter.name] = "constexpr" if parameter.is_constexpr or value is None else "u1"
            if signature[parameter.name] == "constexpr":
                constants[(place,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.numel() == 0 or value.data_ptr() % ALIGNMENT == 0
        elif isinstance(value, int) and value == 1 and not plain:
            signature[parameter.name], constants[(place,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % ALIGNMENT == 0 and not plain
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", ALIGNMENT]]
    return signature, constants, attributes


def distinct(launches: list[Launch]) -> Iterator[Launch]:
    """One launch of each that would be compiled separately."""
    seen = set()
    for launch in launches:
        key = repr((launch.kernel.__name__, launch.kernel.__module__, *map(str, signature_of(launch)), launch.options))
        if key not in seen:
            seen.add(key)
            yield launch


def compile_launch(launch: Launch, target: int) -> Compiled:
    """Machine code of a kernel for a compute capability, and what it takes."""
    signature, constants, attributes = signature_of(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(launch.options))
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(
        f"{launch.kernel.__name__} for sm_{target}", registers, stack, int(made.metadata.shared), made.metadata.tmem_size or 0
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
