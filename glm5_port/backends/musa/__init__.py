"""Moore Threads GPUs, device type `musa`, taught to torch by torch_musa."""

from __future__ import annotations

from glm5_port.backends.probing import probe_vendor
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_vendor(
        package="torch_musa",
        device_type="musa",
        chip="Moore Threads",
        install="install Moore Threads' torch_musa that fits this PyTorch",
        driver="the MUSA driver and toolkit",
    )


BACKEND = Backend(
    name="musa",
    title="Moore Threads MTT S-series",
    device_type="musa",
    package="torch_musa",
    collective="mccl",
    order=12,
    probe=probe,
)
