"""The CPU: always usable. Native kernels (C++, native/) where they were built, the portable implementations elsewhere."""

from __future__ import annotations

import torch

from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    from glm5_port.backends.cpu.extension import ISAS, isa_missing, widest_isa

    widest = widest_isa()
    wanting = [f"{isa}: {reason}" for isa in ISAS if (reason := isa_missing(isa))]
    details = {
        "torch": str(torch.__version__),
        "native kernels": isa_missing("scalar") or f"{widest}" + (f" ({'; '.join(wanting)})" if wanting else ""),
        "vector instructions of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    return Probe(None, details)


BACKEND = Backend(name="cpu", title="CPU", device_type="cpu", package=None, collective="gloo", order=1000, probe=probe)
