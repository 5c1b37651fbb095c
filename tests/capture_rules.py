"""What a CUDA graph cannot capture, noticed on fake tensors of a card that is not here.

While a stream is captured, the host may start work and nothing else. These make a capture fail on a card, or, worse, freeze what
the host saw into the graph: waiting for the card (`item`, `cpu`, `tolist`, a branch on a tensor, synchronising), shapes that
depend on numbers (`nonzero`, indexing by a mask, `unique`), and copies between host and card, whose host side is gone at the
replay (`torch.tensor(..., device="cuda")` is one). Host tensors are refused altogether: a step has no use for one.

`CaptureRules` sees every aten operator of Python code and of what that calls; kernels of Triton start through `launch`, which
checks devices itself, and vendor libraries are called by aten. What remains for a card to show is whether its driver agrees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MASKS = (torch.bool, torch.uint8)
WAITING = ("synchronize", "current_blas_handle", "empty_cache", "ipc_collect", "mem_get_info", "memory_stats")
"""Functions of `torch.cuda` that wait for the card or are refused while something is captured."""
BY_SHAPE = ("aten::index.Tensor", "aten::_unsafe_index.Tensor")
"""Their shape depends on numbers only where an index is a mask, which is looked at by itself."""


class NotCapturable(AssertionError):
    """An operator that no capture allows."""


class CaptureRules(TorchDispatchMode):
    """Within the context, an operator that no capture allows raises `NotCapturable`. `seen`: how many were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "")
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if torch.Tag.data_dependent_output in func.tags or name == "aten::is_nonzero":
            raise NotCapturable(f"{name}: the host waits for a number of the card")
        if "index" in name and any(leaf.dtype in MASKS for leaf in _indices(args)):
            raise NotCapturable(f"{name} by a mask: a shape that depends on numbers")
        if torch.Tag.dynamic_output_shape in func.tags and name not in BY_SHAPE and not _size_is_told(kwargs):
            raise NotCapturable(f"{name}: a shape that depends on numbers")
        result = func(*args, **(kwargs or {}))
        if host := [leaf for leaf in (*given, *tree_leaves(result)) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]:
            raise NotCapturable(f"{name}: a tensor {tuple(host[0].shape)} {host[0].dtype} on the host")
        self.seen += 1
        return result


def _indices(args: tuple[Any, ...]) -> list[Tensor]:
    listed = [leaf for argument in args if isinstance(argument, (list, tuple)) for leaf in argument]
    return [leaf for leaf in listed if isinstance(leaf, Tensor)]


def _size_is_told(kwargs: Any) -> bool:
    return bool(kwargs) and kwargs.get("output_size") is not None


@contextlib.contextmanager
def capturing() -> Iterator[CaptureRules]:
    """As if a stream were captured: `CaptureRules`, and `torch.cuda` does not wait."""

    def waits(*_: Any, **__: Any) -> None:
        raise NotCapturable("torch.cuda waits for the card")

    with contextlib.ExitStack() as stack:
        for name in WAITING:
            stack.enter_context(mock.patch.object(torch.cuda, name, waits))
        stack.enter_context(mock.patch.object(torch.cuda.Stream, "synchronize", waits))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", waits))
        yield stack.enter_context(CaptureRules())
