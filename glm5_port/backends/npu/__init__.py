"""Huawei Ascend NPU, device type `npu`, taught to torch by torch_npu on top of CANN.

Two traps. A CUDA build of torch and torch_npu cannot share an environment: torch_npu refuses to import. And torch_npu
registers itself to be loaded by `import torch`, so that without CANN torch itself does not import unless
TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set; whoever reads this probe's sentence has got past that.
"""

from __future__ import annotations

import os

import torch

from glm5_port.backends.npu import machine
from glm5_port.backends.probing import probe_vendor
from glm5_port.registry import Backend, Probe

CANN_HOME = "ASCEND_HOME_PATH"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def probe() -> Probe:
    found = _probe_package()
    return found if found.missing is not None else Probe(None, {**found.details, **_machine_details()})


def _probe_package() -> Probe:
    return probe_vendor(
        package="torch_npu",
        device_type="npu",
        chip="Ascend",
        install=f"pip install torch_npu of the same version as PyTorch ({torch.__version__.split('+')[0]}), in an environment "
        f"without a CUDA build of it, and install CANN first (without CANN `import torch` then fails unless {AUTOLOAD}=0)",
        driver="the Ascend driver (npu-smi info) and CANN",
        before_import=_obstacle,
        details=_details,
    )


def _obstacle() -> str | None:
    if torch.version.cuda is not None:
        return f"torch_npu refuses this CUDA build of PyTorch ({torch.__version__}): make an environment with a CPU build of it"
    if not os.environ.get(CANN_HOME):
        return f"CANN is not set up ({CANN_HOME} is not set): install CANN and source its set_env.sh before starting Python"
    return None


def _machine_details() -> dict[str, str]:
    """Chip family, CANN, and every vendor operator that one of the two lacks."""
    from glm5_port.backends.npu.contracts import VENDOR_OPERATORS

    here = machine.ask()
    lacking = [name for name, operator in VENDOR_OPERATORS.items() if operator.missing(here)]
    shown = {"chip": here.chip, "CANN": ".".join(map(str, here.cann)) or "does not tell its version"}
    return shown | ({"operators missing here": ", ".join(lacking)} if lacking else {})


def _details() -> dict[str, str]:
    return {name: os.environ[name] for name in (CANN_HOME, AUTOLOAD) if name in os.environ}


BACKEND = Backend(
    name="npu",
    title="Huawei Ascend NPU",
    device_type="npu",
    package="torch_npu",
    collective="hccl",
    order=11,
    probe=probe,
    unproven="no NPU has run its calls: they were held to the vendor's documented operators on a stand-in",
)
