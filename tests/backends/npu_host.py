"""A torch_npu for tests on the CPU: the frozen schemas of one version, each with a body of host maths written from the documents.

Calls go through `torch.library` operators defined with the vendor's own schema, so that names, types and required arguments are
checked by torch itself. What the vendor leaves undefined (rows that nobody counts, outputs that a mode does not fill) is NaN, or
a number that no caller can mistake for a result. Nothing here says anything about the numbers of real kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu import machine as vendor
from tests.backends.npu_schemas import frozen

BODIES: dict[str, Callable[..., Any]] = {}
WILD = 2**30
"""Undefined whole numbers."""


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    BODIES[function.__name__] = function
    return function


@functools.cache
def _defined(version: str) -> tuple[torch.library.Library, Any]:
    """The operators of a version, and the library that keeps them alive."""
    namespace = f"npu_frozen_{version.replace('.', '_')}"
    library = torch.library.Library(namespace, "DEF")
    for name, schema in frozen(version).items():
        if name not in BODIES:
            continue
        library.define(schema)
        library.impl(name, BODIES[name], "CompositeExplicitAutograd")
    return library, getattr(torch.ops, namespace)


class HostTorchNpu:
    """Stands in for the package `torch_npu`; `calls` records (name, args, kwargs)."""

    def __init__(self, version: str = "2.13") -> None:
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.npu = SimpleNamespace(config=SimpleNamespace(allow_internal_format=False))
        self._operators = _defined(version)[1]

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._operators, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return operator(*args, **kwargs)

        return record


@contextlib.contextmanager
def host_npu(version: str = "2.13", *, chip: str = "A2", cann: tuple[int, ...] = (9, 1, 0)) -> Iterator[HostTorchNpu]:
    """The backend's calls go to host maths, its rules ask about this machine."""
    package = HostTorchNpu(version)
    with vendor.replaced(package=package, machine=vendor.Machine(chip, cann, version)):
        yield package


# -- bodies --------------------------------------------------------------------------------------------------------------


@body
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@body
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


@body
def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    if rotary_mode == "interleave":
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x * r1 + turned * r2


@body
def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.float().chunk(2, dim=dim)
    return (F.silu(first) * second).to(x.dtype)


@body
def npu_transpose_batchmatmul(
    x: Tensor, weight: Tensor, *, perm_x1: list[int], perm_x2: list[int], perm_y: list[int], **_: Any
) -> Tensor:
    product = x.permute(perm_x1).float() @ weight.permute(perm_x2).float()
    return product.to(x.dtype).permute(perm_y).contiguous()


@body
def npu_format_cast(x: Tensor, acl_format: int, **_: Any) -> Tensor:
    return x.clone()


@body
def npu_scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    x[tuple(indices.long().unbind(-1))] = updates
    return x
