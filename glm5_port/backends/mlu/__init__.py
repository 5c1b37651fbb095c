"""Cambricon MLU, device type `mlu`, taught to torch by torch_mlu."""

from __future__ import annotations

from glm5_port.backends.probing import probe_vendor
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_vendor(
        package="torch_mlu",
        device_type="mlu",
        chip="Cambricon",
        install="install Cambricon's torch_mlu that fits this PyTorch",
        driver="the MLU driver and the Neuware toolkit",
    )


BACKEND = Backend(
    name="mlu",
    title="Cambricon MLU",
    device_type="mlu",
    package="torch_mlu",
    collective="cncl",
    order=13,
    probe=probe,
)
