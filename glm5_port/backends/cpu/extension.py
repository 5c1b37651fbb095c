"""The native kernels as Python sees them: whether they were built, what this machine can run, and how they join the registry.

The extension module holds every kernel for every instruction set (native/, C++). An implementation is registered for each
instruction set that a kernel was written for, so that the decision record names what runs:

    scalar        the readable specification of a kernel; runs only for GLM5_PORT_CPU_ISA=scalar
    avx2          with FMA and BMI2
    avx512        with BW, DQ, VL and VNNI
    avx512_bf16   avx512 with products of bfloat16 pairs
    amx           tiles of bfloat16 and 8-bit integers

Kernels take addresses, sizes and strides; whoever calls one has checked dtypes and shapes. Threads are torch's own:
`threads()` is passed with every call, since OpenMP does not hear of `torch.set_num_threads` in other Python threads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glm5_port import flags
from glm5_port.dispatch import Operator
from glm5_port.errors import Glm5PortError
from glm5_port.preparation import Preparation

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
"""In rising order; the numbers are those of the extension."""
VECTOR = ("scalar", "avx2", "avx512")
"""What a kernel without matrix instructions is compiled for; wider machines run avx512."""
MATRIX = ISAS
BACKEND = "cpu"
DTYPES = (torch.float32, torch.bfloat16)
"""Activations that the kernels take; others are left to the portable implementations."""

threads = torch.get_num_threads


@functools.cache
def _load() -> ModuleType | str:
    """The extension module, or why there is none."""
    try:
        module = importlib.import_module("glm5_port.backends.cpu._native")
    except ModuleNotFoundError:
        return (
            "the native kernels are not built, so the portable ones compute, many times slower: install a C++ compiler "
            "(g++ 12 or clang 15) and install the package again from its sources"
        )
    except ImportError as error:  # built for another Python, or a library that is missing
        text = " ".join(str(error).split())
        return f"the native kernels do not load ({text}): install the package again from its sources"
    return module


def kernels() -> Any:
    """The extension module.

    Raises:
        Glm5PortError: it is not there. Selection never lets a call come this far.
    """
    module = _load()
    if isinstance(module, str):
        raise Glm5PortError(module)
    return module


@functools.cache
def isa_missing(isa: str) -> str:
    """Why this machine cannot run kernels of an instruction set; empty when it can. Flags are not looked at."""
    module = _load()
    return module if isinstance(module, str) else str(module.isa_missing(ISAS.index(isa)))


def widest_isa() -> str | None:
    """The widest instruction set of this machine that kernels may use by `GLM5_PORT_CPU_ISA`; None: no kernels at all."""
    usable = [isa for isa in ISAS if not isa_missing(isa) and not _withheld(isa)]
    return usable[-1] if usable else None


def _withheld(isa: str) -> str:
    """Why `GLM5_PORT_CPU_ISA` keeps an instruction set from being used; empty when it does not."""
    limit = flags.current().cpu_isa
    if isa == "scalar":
        return "" if limit == "scalar" else f"the specification of the kernel; runs for {flags.CPU_ISA.name}=scalar only"
    if limit == "auto" or ISAS.index(isa) <= ISAS.index(limit):
        return ""
    return f"{flags.CPU_ISA.name}={limit} allows nothing wider"


def _rank(isa: str) -> int:
    """Wider first. Outside AMD's processors a product of bfloat16 pairs is slower than the two products in float32."""
    ranks = {"amx": 10, "avx512_bf16": 20, "avx512": 30, "avx2": 40, "scalar": 50}
    return 35 if isa == "avx512_bf16" and not _is_amd() else ranks[isa]


@functools.cache
def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return any(line.startswith("vendor_id") and "AMD" in line for line in lines)
    except OSError:
        return False


def native(
    operator: Operator,
    *,
    isas: Sequence[str] = VECTOR,
    promises: Sequence[str] = ("deterministic", "batch_invariant", "thread_invariant"),
    not_supported: Callable[..., list[str]] | None = None,
    prepare: Callable[[Mapping[str, Any]], Preparation] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[[int], Callable[..., Any]]], Callable[[int], Callable[..., Any]]]:
    """Registers an operator's native kernel as one implementation for each instruction set.

    Args:
        operator: that is implemented.
        isas: what the kernel is compiled for, `VECTOR` or `MATRIX`.
        promises, prepare, fake: as in `Operator.implement`.
        not_supported: the kernel's own reasons against `facts`, beside those of machine, flags and dtype.

    Returns:
        A decorator of a function that makes the implementation for the number of an instruction set.
    """

    def register(make: Callable[[int], Callable[..., Any]]) -> Callable[[int], Callable[..., Any]]:
        for isa in isas:
            operator.implement(
                BACKEND,
                variant=isa,
                rank=_rank(isa),
                not_supported=_reasons(isa, not_supported),
                promises=promises,
                prepare=prepare,
                fake=fake,
            )(make(ISAS.index(isa)))
        return make

    return register


def _reasons(isa: str, own: Callable[..., list[str]] | None) -> Callable[..., list[str]]:
    def not_supported(**facts: Any) -> list[str]:
        found = [reason for reason in (isa_missing(isa) or _withheld(isa),) if reason]
        if facts["dtype"] not in DTYPES:
            found.append(f"takes float32 and bfloat16, not {str(facts['dtype']).removeprefix('torch.')}")
        return found + (own(**facts) if own else [])

    return not_supported


def dense_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`x` in `dtype` with the numbers of each row side by side; copied only where they are not."""
    x = x if dtype is None else x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows_of(x: Tensor, *, width: int | None = None) -> Tensor:
    """`x` as [rows, width] whose rows are dense; copied only if the rows themselves are strided."""
    return dense_rows(x.reshape(-1, x.shape[-1] if width is None else width))
