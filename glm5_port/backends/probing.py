"""How this machine is looked at: which chip answers as `cuda`, and whether a vendor package can be used.

Four vendors besides NVIDIA and AMD answer `torch.cuda` with a PyTorch of their own (Hygon, MetaX, Kunlunxin, Iluvatar), so
`torch.cuda.is_available()` does not tell a chip. `identify` decides it from plain facts and needs no hardware; `probe_cuda`
turns the answer into a `Probe`. `probe_vendor` serves the chips with a torch device type of their own.

The fingerprints of the pretenders come from public descriptors (version attributes and device names that vendors' and
users' code tests for). They were never run on that hardware: a wrong one shows in `glm5-port doctor` as the wrong name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from glm5_port.registry import Probe

HYGON_ARCHITECTURES = ("gfx926", "gfx928", "gfx936", "gfx938")
"""GPU architectures that only Hygon DCUs have. Older DCUs share gfx906 with AMD and are told by their DTK build of torch."""

KUNLUNXIN_PACKAGE = "torch_xmlir"
NVIDIA_NAMES = ("nvidia", "tesla", "geforce", "quadro", "titan")
"""In the names of NVIDIA's devices; drivers before 2021 left the first out."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

# -- which chip answers as cuda ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """What this PyTorch says about `torch.cuda`. Plain values, so that every machine can be described in a test.

    Attributes:
        torch_version: `torch.__version__`; vendors mark their builds in the local part ("+metax3.5", "+das.dtk2504").
        cuda: `torch.version.cuda`, the CUDA that this build was made for; None for a build without.
        hip: `torch.version.hip`, set in ROCm and DTK builds.
        maca: `torch.version.maca`, set in MetaX builds.
        corex: whether `torch.corex` exists, as in Iluvatar builds.
        xmlir: whether Kunlunxin's package `torch_xmlir`, which remaps cuda calls, is installed.
        devices: visible devices.
        device_name: name of device 0, or "".
        architecture: "gfx936" where HIP gives one, "sm_90" otherwise, or "".
        driver: version of NVIDIA's kernel driver, or "" (none is loaded, or it cannot be seen from here, as under WSL).
        failure: why no device can be used, in torch's words, or "".
    """

    torch_version: str
    cuda: str | None = None
    hip: str | None = None
    maca: str | None = None
    corex: bool = False
    xmlir: bool = False
    devices: int = 0
    device_name: str = ""
    architecture: str = ""
    driver: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip that answers as `cuda`.

    Attributes:
        backend: the glm5_port backend for it, or None when there is none yet.
        title: vendor, for people.
        build: what its build of PyTorch is called.
        driver: what must be installed beneath PyTorch.
    """

    backend: str | None
    title: str
    build: str
    driver: str


NVIDIA = Chip("cuda", "NVIDIA", "a CUDA build of PyTorch (pytorch.org)", "the NVIDIA driver")
AMD = Chip(None, "AMD", "a ROCm build of PyTorch", "the AMD GPU driver")
HYGON = Chip("hygon", "Hygon DCU", "Hygon's DTK build of PyTorch", "the DCU driver and the DTK")
METAX = Chip("metax", "MetaX", "MetaX's MACA build of PyTorch", "the MetaX driver and the MACA toolkit")
KUNLUNXIN = Chip("kunlunxin", "Kunlunxin", "Kunlunxin's XPytorch (with torch_xmlir)", "the Kunlunxin driver and XRE")
ILUVATAR = Chip("iluvatar", "Iluvatar CoreX", "Iluvatar's CoreX build of PyTorch", "the Iluvatar driver and CoreX")
T_HEAD = Chip(None, "T-Head PPU", "T-Head's build of PyTorch", "the PPU driver and SDK")
UNKNOWN = Chip(None, "an unknown chip", "its maker's build of PyTorch", "its driver")
CHIPS = (NVIDIA, AMD, HYGON, METAX, KUNLUNXIN, ILUVATAR, T_HEAD)


def identify(facts: CudaFacts) -> tuple[Chip, str] | None:
    """Which chip answers as `cuda`, and the evidence for it; None when this PyTorch cannot drive any. Pure.

    The build is asked first: it is the vendor's own mark, while device names imitate one another.
    """
    version, name = facts.torch_version.lower(), facts.device_name.lower()
    if facts.maca or "+metax" in version:
        return METAX, f"torch.version.maca={facts.maca}" if facts.maca else f"torch {facts.torch_version}"
    if facts.corex or "corex" in version:
        return ILUVATAR, "torch.corex exists" if facts.corex else f"torch {facts.torch_version}"
    if facts.xmlir:
        return KUNLUNXIN, f"{KUNLUNXIN_PACKAGE} is installed"
    if facts.hip:
        if facts.architecture.split(":")[0] in HYGON_ARCHITECTURES:
            return HYGON, f"architecture {facts.architecture}"
        if "dtk" in version or "+das" in version:
            return HYGON, f"torch {facts.torch_version}"
        return AMD, f"torch.version.hip={facts.hip}"
    for chip, marks in ((METAX, ("metax",)), (ILUVATAR, ("iluvatar",)), (KUNLUNXIN, ("kunlun",)), (T_HEAD, ("ppu",))):
        if any(mark in name for mark in marks):
            return chip, f"device {facts.device_name}"
    if facts.cuda and facts.devices and not facts.driver and not any(mark in name for mark in NVIDIA_NAMES):
        return UNKNOWN, f"device {facts.device_name!r}, and NVIDIA's kernel driver is not loaded"
    if facts.cuda:
        return NVIDIA, f"torch.version.cuda={facts.cuda}"
    return None


def cuda_facts() -> CudaFacts:
    """Reads the facts of this process's PyTorch. Starts the driver only when torch says that a device is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = architecture = failure = ""
    if count:
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        architecture = str(getattr(properties, "gcnArchName", "")) or "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    elif torch.version.cuda or torch.version.hip:
        failure = _why_no_device()
    return CudaFacts(
        torch_version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        maca=getattr(torch.version, "maca", None),
        corex=hasattr(torch, "corex"),
        xmlir=importlib.util.find_spec(KUNLUNXIN_PACKAGE) is not None,
        devices=count,
        device_name=name,
        architecture=architecture,
        driver=_nvidia_driver(),
        failure=failure,
    )


def _nvidia_driver() -> str:
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", NVIDIA_DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def _why_no_device() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # whatever it is, its text is what the user needs
        return _one_line(error)
    return "torch.cuda starts, and shows no device"


def probe_cuda(wanted: Chip) -> Probe:
    """Whether `wanted` is what answers as `cuda` here, and usable."""
    facts = cuda_facts()
    return Probe(_missing(wanted, facts), _details(facts))


def _missing(wanted: Chip, facts: CudaFacts) -> str | None:
    """What is missing for `wanted`, or None. Pure."""
    found = identify(facts)
    if found is None:
        return f"this PyTorch ({facts.torch_version}) is built without CUDA or HIP: install {wanted.build}, and {wanted.driver}"
    chip, evidence = found
    if chip is not wanted and not facts.devices:
        return f"this PyTorch is made for {chip.title} ({evidence}): install {wanted.build}, and {wanted.driver}"
    if chip is not wanted:
        use = f"ask for GLM5_PORT_BACKEND={chip.backend}" if chip.backend else "glm5_port has no backend for it yet"
        return f"what answers as cuda here is {chip.title} ({evidence}), not {wanted.title}: {use}, or install {wanted.build}"
    if facts.devices:
        return None
    if "driver" in facts.failure.lower():
        return f"no usable driver: install or update {wanted.driver} (torch says: {facts.failure})"
    hidden = [f"{name}={os.environ[name]}" for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ]
    shown = f"; {', '.join(hidden)} may hide it" if hidden else ""
    return f"no {wanted.title} device visible: give this process one{shown} (torch says: {facts.failure})"


def _details(facts: CudaFacts) -> dict[str, str]:
    """What is worth printing about `torch.cuda`. Pure."""
    shown = {
        "torch": facts.torch_version,
        "CUDA": facts.cuda,
        "HIP": facts.hip,
        "MACA": facts.maca,
        "device": facts.device_name,
        "architecture": facts.architecture,
        "driver": facts.driver,
        "devices": str(facts.devices) if facts.devices else None,
    }
    return {name: value for name, value in shown.items() if value}


# -- chips with a device type of their own -------------------------------------------------------------------------------


def probe_vendor(
    *,
    package: str,
    device_type: str,
    chip: str,
    install: str,
    driver: str,
    before_import: Callable[[], str | None] = lambda: None,
    details: Callable[[], dict[str, str]] = dict,
) -> Probe:
    """Whether a vendor package can be imported and shows a device.

    Args:
        package: the package that teaches torch this device; imported here, and only when it is installed.
        device_type: torch device type; `torch.<device_type>` must appear.
        chip: name of the chip, for sentences.
        install: how to get the package.
        driver: what must be installed beneath it.
        before_import: what is known to stand in the way of the import, or None.
        details: more facts worth printing.
    """
    shown = {"torch": str(torch.__version__), **details()}
    if importlib.util.find_spec(package) is None:
        return Probe(f"{package} is not installed: {install}", shown)
    shown[package] = _version(package)
    if (obstacle := before_import()) is not None:
        return Probe(obstacle, shown)
    try:
        importlib.import_module(package)
    except Exception as error:  # ImportError, OSError, RuntimeError: each vendor fails in its own way
        return Probe(f"{package} {shown[package]} is installed and fails to import ({_one_line(error)}): check {driver}", shown)
    namespace = getattr(torch, device_type, None)
    if namespace is None:
        return Probe(
            f"{package} {shown[package]} imports and brings no torch.{device_type}: is it made for torch {torch.__version__}?",
            shown,
        )
    return _probe_devices(namespace, device_type, chip, driver, shown)


def _probe_devices(namespace: ModuleType | Any, device_type: str, chip: str, driver: str, shown: dict[str, str]) -> Probe:
    try:
        count = namespace.device_count()
        if count:
            shown["device"] = str(namespace.get_device_name(0))
            shown["devices"] = str(count)
            return Probe(None, shown)
    except Exception as error:  # a driver that does not answer is a finding, not a crash
        return Probe(f"torch.{device_type} does not answer ({_one_line(error)}): check {driver}", shown)
    return Probe(
        f"no device visible (torch.{device_type}.device_count() is 0): give this process a {chip} device, check {driver}", shown
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
