"""Hygon DCU: answers as `cuda` through HIP, with Hygon's DTK build of PyTorch; collectives are RCCL under the name nccl."""

from __future__ import annotations

from glm5_port.backends.probing import HYGON, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_cuda(HYGON)


BACKEND = Backend(
    name="hygon",
    title="Hygon DCU",
    device_type="cuda",
    package=None,
    collective="nccl",
    order=15,
    probe=probe,
)
