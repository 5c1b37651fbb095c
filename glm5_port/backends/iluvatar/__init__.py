"""Iluvatar BI and MR series: answer as `cuda` with the CoreX build of PyTorch; collectives are IXCCL under the name nccl."""

from __future__ import annotations

from glm5_port.backends.probing import ILUVATAR, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_cuda(ILUVATAR)


BACKEND = Backend(
    name="iluvatar",
    title="Iluvatar CoreX",
    device_type="cuda",
    package=None,
    collective="nccl",
    order=18,
    probe=probe,
)
