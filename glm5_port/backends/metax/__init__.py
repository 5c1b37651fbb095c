"""MetaX C-series: answers as `cuda` with the MACA build of PyTorch; collectives are MCCL under the name nccl."""

from __future__ import annotations

from glm5_port.backends.probing import METAX, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_cuda(METAX)


BACKEND = Backend(
    name="metax",
    title="MetaX C-series",
    device_type="cuda",
    package=None,
    collective="nccl",
    order=16,
    probe=probe,
)
