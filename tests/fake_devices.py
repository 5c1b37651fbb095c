"""Fake tensors on devices that this build of torch was made without.

`FakeTensorMode` needs no device, but a few of Python's methods (`x[...]`, `~x`, `contiguous`, `copy_`) ask for a device guard,
which a CPU-only wheel does not have ("PyTorch is not linked with support for cuda devices"). Inside `fake_devices()` they go
through the aten operators they stand for; everything else is FakeTensorMode as it is: `.item()` and device literals raise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


@contextlib.contextmanager
def fake_devices() -> Iterator[FakeTensorMode]:
    """FakeTensorMode in which tensors of "cuda" and "xpu" may be made, computed with and indexed."""
    with FakeTensorMode() as mode, _WithoutDeviceGuards():
        yield mode


class _WithoutDeviceGuards(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            view, indices = _view(*args)
            return aten.index.Tensor(view, indices) if indices else view
        if function is Tensor.__setitem__:
            x, key, value = args
            view, indices = _view(x, key)
            value = value if isinstance(value, Tensor) else view.new_full((), value)
            return aten.index_put_.default(view, indices, value) if indices else aten.copy_.default(view, value)
        if function is Tensor.__invert__:
            return aten.bitwise_not.default(*args)
        if function is Tensor.contiguous:
            (x,) = args
            return x if x.is_contiguous() else aten.clone.default(x, memory_format=torch.contiguous_format)
        if function is Tensor.copy_:
            return aten.copy_.default(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _view(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that ints, slices and None make of x, and the index tensors for its leading dimensions (none: an empty list)."""
    keys = list(key) if isinstance(key, tuple) else [key]
    named = sum(
        (k.dim() if k.dtype == torch.bool else 1) if isinstance(k, Tensor) else k is not None and k is not ... for k in keys
    )
    if any(k is ... for k in keys):
        place = next(place for place, k in enumerate(keys) if k is ...)
        keys[place : place + 1] = [slice(None)] * (x.dim() - named)
    indices: list[Tensor | None] = []
    for k in keys:
        dim = len(indices)
        if isinstance(k, Tensor):
            if k.dim() == 0 and k.dtype != torch.bool:
                raise RuntimeError("indexing with a 0-dimensional integer tensor reads the device (_local_scalar_dense)")
            indices.append(k)
        elif isinstance(k, slice):
            x = aten.slice.Tensor(x, dim, k.start, k.stop, 1 if k.step is None else k.step)
            indices.append(None)
        elif k is None:
            x = aten.unsqueeze.default(x, dim)
            indices.append(None)
        else:
            x = aten.select.int(x, dim, k)
    return x, indices if any(index is not None for index in indices) else []
