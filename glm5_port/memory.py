"""Memory for large tensors that live long: weights and caches.

On Linux a large tensor in host memory gets pages of 2 MiB where the system allows it
(`/sys/kernel/mm/transparent_hugepage/enabled` is `always` or `madvise`), so that streaming it, and even more picking rows out of
it, takes few look-ups of addresses. It is mapped for itself: what an allocator hands out again has its small pages already.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """As `torch.zeros`, in large pages where that is possible. A page takes memory only once something is written to it."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not _maps_huge_pages(device):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a page more, to begin at its edge
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def _maps_huge_pages(device: torch.device | str | None) -> bool:
    """Whether tensors of `device` are memory of this process; those of a trace are no memory at all."""
    kind = torch.get_default_device() if device is None else torch.device(device)
    return kind.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and not torch._C._len_torch_dispatch_stack()
