"""The collectives of the stand-in runtime: the name "hccl" with gloo behind it, on the same memory.

What HCCL's documents refuse is refused; its own transport, buffers and speed are not tested. Only the collectives that this
library calls are here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.npu_runtime import aten

SUMMED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16)
"""Dtypes that HCCL adds up on A2 and A3."""


class RefusedByHccl(RuntimeError):
    """A collective that HCCL's documents do not allow."""


def register() -> None:
    """Puts gloo in the place of the vendor's "hccl", which finds no network here."""
    dist.Backend.register_backend("hccl", HostGroup, devices=[aten.DEVICE])


class HostGroup(dist.ProcessGroup):
    """A process group whose tensors lie on the stand-in device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = self._description = ""

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(aten.DEVICE)]  # where torch puts objects that it gathers

    def getBackendName(self) -> str:
        return "hccl"

    def _run(self, collective: Callable[..., Any], *values: Any, summed: bool = False) -> Any:
        return collective(*(self._here(value, summed) for value in values))

    def _here(self, value: Any, summed: bool) -> Any:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Tensor, list)):
            return [self._here(each, summed) for each in value]
        if not isinstance(value, Tensor):
            return value
        if value.device.type != aten.DEVICE:
            raise RefusedByHccl(f"a tensor of {value.device} in a collective of hccl")
        if value.dim() == 0 or not value.is_contiguous():
            raise RefusedByHccl(f"a tensor {tuple(value.shape)} without dimensions, or with gaps")
        if summed and value.dtype not in SUMMED:
            raise RefusedByHccl(f"a sum of {value.dtype}")
        return aten.on_cpu(value)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._run(self._gloo.allreduce, tensors, *([opts] if opts else []), summed=True)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._run(self._gloo.broadcast, tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        return self._run(self._gloo.allgather, outputs, inputs)

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self._run(self._gloo._allgather_base, output, given)

    all_gather_single = _allgather_base

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        return self._run(self._gloo._reduce_scatter_base, output, given, *([opts] if opts else []), summed=True)

    reduce_scatter_single = _reduce_scatter_base

    def alltoall_base(self, output: Tensor, given: Tensor, received: list[int], sent: list[int], opts: Any = None) -> Any:
        return self._run(self._gloo.alltoall_base, output, given, received, sent)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        return self._run(self._gloo.send, tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        if source < 0:
            raise RefusedByHccl("a message from any rank")
        return self._run(self._gloo.recv, tensors, source, tag)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()
