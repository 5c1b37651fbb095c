"""Lowers a launch of a kernel to Linalg for an Ascend NPU, as triton-ascend would before it calls CANN's compiler."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glm5_port.backends.cuda import triton_support
from glm5_port.backends.cuda.triton_support import BACKEND, OLDEST_TRITON, VARIANT, Launch
from glm5_port.registry import Implementation
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites
from tests.backends.triton_compile import distinct, launches_of, signature_of

TARGET = GPUTarget("npu", "Ascend910B2", 0)
SMALL_TILES = 80
"""The card whose tiles are lowered: the smallest, since a vector core of Ascend910B has 192 KB."""


class Refused(Exception):
    """The compiler does not lower a kernel; the text is its own."""


def implementations() -> list[Implementation]:
    """Everything that launches Triton kernels."""
    return [i for i in parity.implementations_on(BACKEND) if i.backend == BACKEND and i.variant.startswith(VARIANT)]


@functools.cache
def launches(implementation: Implementation) -> tuple[Launch, ...]:
    """What an implementation launches on its cases at GLM-5 widths in bfloat16; nothing runs."""
    known, triton_support.triton_version = triton_support.triton_version, lambda: OLDEST_TRITON
    try:  # triton-ascend calls itself 3.2, which is refused where kernels run
        found = [
            launch
            for case in load_suites()[implementation.operator.name].cases
            if case.tags & WIDTH and torch.bfloat16 in case.dtypes
            for launch in launches_of(implementation, case, torch.bfloat16, SMALL_TILES)
        ]
    finally:
        triton_support.triton_version = known
    return tuple(distinct(found))


def kernels() -> Iterator[tuple[str, Implementation, Launch]]:
    """(name of a kernel, who launches it, launch), in the order of the operators."""
    for implementation in implementations():
        for launch in launches(implementation):
            yield launch.kernel.__name__, implementation, launch


def lower(launch: Launch) -> str:
    """A kernel in Linalg.

    Raises:
        Refused: the compiler does not take it.
    """
    compiler = triton.compiler.make_backend(TARGET)
    types, constants, _ = signature_of(launch)
    named = {launch.kernel.params[place[0]].name: value for place, value in constants.items()}
    options = compiler.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    stages: dict[str, Any] = {}
    compiler.add_stages(stages, options)
    metadata = {"target": TARGET, **vars(options)}
    try:
        module = ASTSource(launch.kernel, types, named).make_ir(
            options, compiler.get_codegen_implementation(), compiler.get_module_map(), context
        )
        return stages["ttadapter"](stages["ttir"](module, metadata), metadata)
    except subprocess.CalledProcessError as failed:
        raise Refused(failed.stderr.decode(errors="replace")) from None
    except Exception as failed:  # errors of the front end have no class in common
        raise Refused(f"{failed}\n{failed.__cause__}") from None
