"""The CPU: always usable, computes with the portable implementations until native kernels are built."""

from __future__ import annotations

import torch

from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    details = {
        "torch": str(torch.__version__),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    return Probe(None, details)


BACKEND = Backend(name="cpu", title="CPU", device_type="cpu", package=None, collective="gloo", order=1000, probe=probe)
