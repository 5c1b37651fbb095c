"""Memory of weights and caches: zeros in large pages where the system gives them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glm5_port.memory import HUGE_PAGE, zeros
from glm5_port.operators.cache import LATENT, cache_layout

SHAPE = 5, 700, 512
"""3.4 MiB of bfloat16: one large page and a rest."""


def _huge_kilobytes(address: int) -> int:
    """Memory in large pages in the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if "-" in key and not key.endswith(":"):
            first, last = (int(end, 16) for end in key.split("-"))
            inside = first <= address < last
        elif inside and key == "AnonHugePages:":
            return int(rest.split()[0])
    return 0


def _huge_pages_are_off() -> str:
    """Why no large page can be expected; empty when it can."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not hasattr(mmap, "MADV_HUGEPAGE") or not path.exists():
        return "this system has no transparent huge pages"
    return "transparent huge pages are switched off" if "[never]" in path.read_text() else ""


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), SHAPE])
def test_zeros_are_as_those_of_torch(shape: tuple[int, ...]) -> None:
    made = zeros(*shape, dtype=torch.bfloat16)
    expected = torch.zeros(shape, dtype=torch.bfloat16)
    assert torch.equal(made, expected) and made.dtype == expected.dtype and made.stride() == expected.stride()
    assert made.untyped_storage().nbytes() == expected.untyped_storage().nbytes()  # saving it writes no more


def test_memory_outlives_other_views_and_can_be_written() -> None:
    part = zeros(*SHAPE, dtype=torch.bfloat16)[3]
    others = [zeros(*SHAPE, dtype=torch.bfloat16).fill_(1.0) for _ in range(3)]
    part.add_(2.0)
    assert float(part.sum()) == 2.0 * 700 * 512 and all(float(other.min()) == 1.0 for other in others)


@pytest.mark.skipif(bool(_huge_pages_are_off()), reason=_huge_pages_are_off())
def test_large_tensors_lie_in_large_pages_even_where_an_allocator_would_use_memory_again() -> None:
    used = [torch.ones(SHAPE, dtype=torch.bfloat16) for _ in range(4)]
    del used  # what malloc gets back and hands out again is in small pages
    (cache,) = cache_layout(LATENT, "fp8").allocate(256, 64, (512, 64), torch.bfloat16)
    for tensor in (zeros(*SHAPE, dtype=torch.bfloat16), cache):
        assert tensor.data_ptr() % HUGE_PAGE == 0
        tensor.fill_(1)
        assert _huge_kilobytes(tensor.data_ptr()) >= tensor.nbytes // HUGE_PAGE * HUGE_PAGE // 1024


def test_devices_and_traces_keep_their_own_memory() -> None:
    assert zeros(*SHAPE, dtype=torch.bfloat16, device="meta").is_meta
    with FakeTensorMode():
        assert isinstance(zeros(*SHAPE, dtype=torch.bfloat16), FakeTensor)
