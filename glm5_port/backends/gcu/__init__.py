"""Enflame GCU, device type `gcu`, taught to torch by torch_gcu."""

from __future__ import annotations

from glm5_port.backends.probing import probe_vendor
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_vendor(
        package="torch_gcu",
        device_type="gcu",
        chip="Enflame",
        install="install Enflame's torch_gcu that fits this PyTorch",
        driver="the Enflame driver and the TopsRider stack",
    )


BACKEND = Backend(
    name="gcu",
    title="Enflame GCU",
    device_type="gcu",
    package="torch_gcu",
    collective="eccl",
    order=14,
    probe=probe,
)
