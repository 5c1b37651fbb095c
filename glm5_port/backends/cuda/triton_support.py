"""How Triton kernels join the registry and are launched: all that a module of `cuda/triton` implementations needs.

    from glm5_port.backends.cuda.triton_support import kernels, launch, triton

    @triton(rms_norm)                                      # registers cuda/triton; reasons of machine and dtype are added
    def rms_norm_triton(x, weight, eps): ...
        module = kernels("norm")                           # glm5_port/backends/cuda/kernels/norm.py, imported at first use
        launch(module.rms_norm_rows, (rows,), x, y, width, eps, BLOCK=1024, num_warps=4)

Rules of an implementation
  - Importing its module must not import triton. Kernels live in `kernels/<family>.py`, which only `kernels(...)` imports.
  - Every kernel starts through `launch`, and through nothing else: it picks the device, skips empty grids, and is where the
    compile test learns, from the parity cases at GLM-5 widths, with which arguments each kernel must compile for every target.
  - Tile sizes may depend on dtypes, widths and `generation()`, never on the number of multiprocessors, and on the batch only
    where each row keeps its order of summation. No host sync: no `.item()`, no branch on the contents of a tensor.
  - Triton compiles a kernel anew for a number that is 1, and for one that 16 divides. Numbers that change from call to call
    (tokens, sequences, pages, splits) are `do_not_specialize`, or a batch of another size waits for the compiler.
  - In kernels, products and roundings go through the house helpers of `kernels/numbers.py` (`dot`, `narrow`, ...): Triton's
    interpreter, which tests run where no GPU is, treats bfloat16 as integers otherwise, without an error.

Tests: `make test-interpreter` runs the implementations on the CPU through the interpreter (tests/interpreter), in a process of
its own: TRITON_INTERPRET is read when a kernel is decorated, and an interpreted kernel cannot be compiled.
tests/backends/test_triton.py compiles every kernel for every target, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from glm5_port.dispatch import Operator
from glm5_port.errors import InputError
from glm5_port.preparation import Preparation

BACKEND, VARIANT = "cuda", "triton"
OLDEST_TRITON, OLDEST_TORCH = (3, 6), (2, 10)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_PACKAGES = ("triton", "pytorch-triton")
"""Distributions that hold the module `triton`; nightly builds of PyTorch bring the second."""

# -- registering -------------------------------------------------------------------------------------------------------


def triton(
    operator: Operator,
    *,
    variant: str = VARIANT,
    rank: int = 20,
    dtypes: Sequence[torch.dtype] = DTYPES,
    promises: Sequence[str] = ("deterministic", "batch_invariant"),
    not_supported: Callable[..., list[str]] | None = None,
    prepare: Callable[[Mapping[str, Any]], Preparation] | None = None,
    fake: Callable[..., Any] | None = None,
    yields: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `cuda/triton`.

    Args:
        operator: that is implemented.
        variant, rank: as in `Operator.implement`, where one operator has several.
        dtypes: working dtypes that it takes.
        promises, prepare, fake, yields: as in `Operator.implement`.
        not_supported: its own reasons against `facts`, beside those of machine, versions and dtype.
    """

    def reasons(**facts: Any) -> list[str]:
        found = machine_reasons()
        if facts["dtype"] not in dtypes:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found.append(f"takes {taken}, not {str(facts['dtype']).removeprefix('torch.')}")
        return found + (not_supported(**facts) if not_supported else [])

    return operator.implement(
        BACKEND,
        variant=variant,
        rank=rank,
        not_supported=reasons,
        promises=promises,
        prepare=prepare,
        fake=fake,
        yields=yields,
    )


def machine_reasons() -> list[str]:
    """Why Triton cannot be used with this PyTorch and this card. Without a card only versions are looked at: that the backend is
    missing is said by its probe, and `explain --as cuda` asks what would run if it were there."""
    return _machine_reasons(triton_version(), _numbers_of(str(torch.__version__)), capability())


def _machine_reasons(triton: tuple[int, ...] | None, pytorch: tuple[int, ...], capability: tuple[int, int] | None) -> list[str]:
    found = []
    if pytorch < OLDEST_TORCH:
        found.append(f"needs PyTorch {_dotted(OLDEST_TORCH)} or newer, this is {_dotted(pytorch)}")
    if triton is None:
        found.append("triton is not installed: a CUDA build of PyTorch for Linux brings the one that fits it")
    elif triton < OLDEST_TRITON:
        found.append(f"needs triton {_dotted(OLDEST_TRITON)} or newer, {_dotted(triton)} is installed: install a newer PyTorch")
    if capability is not None and capability < OLDEST_CAPABILITY:
        found.append(
            f"needs compute capability {_dotted(OLDEST_CAPABILITY)} (A100, RTX 30) or newer, this card has {_dotted(capability)}"
        )
    return found


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """The installed Triton, without importing it; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in TRITON_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return _numbers_of(metadata.version(package))
    return _numbers_of(str(importlib.import_module("triton").__version__))  # a vendor's build under another name


def _numbers_of(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# -- the card ----------------------------------------------------------------------------------------------------------

_assumed: tuple[int, int] | None = None


def capability() -> tuple[int, int] | None:
    """Compute capability of the current card, or what `assume` says; None without a card."""
    return _assumed or _capability_here()


@functools.cache
def _capability_here() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


LARGE, SMALL = "large", "small"


def generation() -> str:
    """Which tiles fit: LARGE where a multiprocessor has 227 KB of shared memory and products of whole warp groups (9.0: H100,
    H200; 10.x: B200), SMALL with the 99 KB of 8.6, 8.9 and 12.x, which 8.0 runs too. Without a card: SMALL."""
    major = (capability() or OLDEST_CAPABILITY)[0]
    return LARGE if major in (9, 10) else SMALL


@contextlib.contextmanager
def assume(card: tuple[int, int]) -> Iterator[None]:
    """Within the context, tiles are those of a card of this compute capability: for tests without one."""
    global _assumed
    before, _assumed = _assumed, card
    try:
        yield
    finally:
        _assumed = before


# -- launching ---------------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels run on the CPU, through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels(family: str) -> ModuleType:
    """The module `glm5_port.backends.cuda.kernels.<family>`; the first call imports triton."""
    return importlib.import_module(f"glm5_port.backends.cuda.kernels.{family}")


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was written down instead of made.

    Attributes:
        kernel: the decorated function.
        grid: programs in each dimension.
        arguments: parameter name -> what was given, by place or by name.
        options: num_warps, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


OPTIONS = ("num_warps", "num_stages")
MOST_PROGRAMS = 65_535
"""Of the second and third dimension of a grid."""
_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **named: Any) -> None:
    """Starts a kernel on the device of its first argument, a tensor. An empty grid starts nothing, and neither do fake tensors.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: programs in each of at most three dimensions.
        arguments: for its parameters, in order.
        named: its compile-time parameters, num_warps and num_stages.

    Raises:
        InputError: tensors on several devices, which the kernel would read as addresses of one, or a grid that no card can start.
    """
    if 0 in grid:
        return
    _check_launch(kernel, grid, arguments)
    if _recorded is not None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        _recorded.append(Launch(kernel, tuple(grid), given, options))
        return
    if isinstance(arguments[0], FakeTensor):
        return  # shapes are being traced: there is nothing to compute on
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton starts on the current device, whatever the tensors' is
            kernel[tuple(grid)](*arguments, **named)
    else:
        kernel[tuple(grid)](*arguments, **named)


def _check_launch(kernel: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    device = arguments[0].device
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device != device:
            raise InputError(f"{kernel.__name__}: tensors on {device} and {argument.device}; all must be on one device")
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise InputError(
            f"{kernel.__name__}: a grid of {tuple(grid)} programs; the second and third dimension have at most {MOST_PROGRAMS}.\n"
            "  Call it with fewer tokens at a time"
        )


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the context, launches are written down and not made: results hold garbage. For tests that compile kernels."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# -- what wrappers share -----------------------------------------------------------------------------------------------


WORKSPACE_BYTES = 256 * 2**20
"""Memory for what an implementation computes on the way and that grows with its tokens; what needs more is done in turns."""


def dense(x: Tensor) -> Tensor:
    """`x` with the numbers of each row (the last dimension) side by side; copied only where they are not."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_shapes(name: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises InputError unless each tensor has the shape beside it: a kernel would read other memory, without an error."""
    for parameter, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise InputError(f"{name} on cuda: {parameter} {tuple(tensor.shape)} does not fit; supported here: {tuple(shape)}")


def power_of_two(n: int, *, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: blocks of a kernel have such sizes."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def rows_of(x: Tensor) -> Tensor:
    """`x` as [rows, width], the numbers of each row side by side."""
    return dense(x).reshape(-1, x.shape[-1])
