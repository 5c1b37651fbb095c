"""NVIDIA GPUs. torch itself drives them; chips that only answer as `cuda` have backends of their own."""

from __future__ import annotations

from glm5_port.backends.probing import NVIDIA, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_cuda(NVIDIA)


BACKEND = Backend(
    name="cuda",
    title="NVIDIA GPU",
    device_type="cuda",
    package=None,
    collective="nccl",
    order=10,
    probe=probe,
)
