"""toychip: a backend plugin of glm5_port for a chip that does not exist. Its device is the CPU, so that it truly runs.

__init__    the chip: name, device type, probe; `register`, which the entry point names
norm        rms_norm with a kernel of its own
linear      linear with a weight layout of its own
"""

from __future__ import annotations

from glm5_port import Backend, Probe, register_backend

NAME = "toychip"


def probe() -> Probe:
    """Looks at this machine. A real chip imports its vendor package here, and only here."""
    import torch

    return Probe(missing=None, details={"firmware": "1.0", "torch": str(torch.__version__)})


BACKEND = Backend(
    name=NAME,
    title="Toychip (example plugin)",
    device_type="cpu",
    package=None,
    collective="gloo",
    order=50,
    probe=probe,
    origin="plugin glm5_port_toychip",
)


def register() -> None:
    """Adds the chip, then its implementations (importing a module registers what is in it)."""
    register_backend(BACKEND)
    from glm5_port_toychip import linear, norm  # noqa: F401 - imported to register
