"""NVIDIA GPUs. torch itself drives them; chips that only answer as `cuda` have backends of their own."""

from __future__ import annotations

from glm5_port.backends.probing import NVIDIA, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    from glm5_port.backends.cuda.triton_support import machine_reasons, triton_version

    found = probe_cuda(NVIDIA)
    version, reasons = triton_version(), machine_reasons()
    triton = "; ".join(reasons) if reasons else ".".join(map(str, version or ()))
    return Probe(found.missing, {**found.details, "triton": triton})


BACKEND = Backend(
    name="cuda",
    title="NVIDIA GPU",
    device_type="cuda",
    package=None,
    collective="nccl",
    order=10,
    probe=probe,
    unproven="no GPU has run its kernels: they were held to the gold by Triton's interpreter, and compiled",
)
