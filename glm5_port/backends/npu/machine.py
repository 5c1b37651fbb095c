"""torch_npu and the machine below it, through one door: tests replace what is behind it.

    torch_npu()    the vendor's package, imported when a kernel first calls it
    machine()      chip, CANN version, and which kernels that CANN has
    replaced(...)  for tests: another package, another machine

Where no NPU is usable (`explain --as npu`) the machine is `ASSUMED`, so that reasons can be given anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHIPS = {"Ascend910_93": "A3", "Ascend910B": "A2", "Ascend950PR": "950PR", "Ascend950DT": "950DT"}
"""How a chip's name begins, and what the vendor's documents call the family."""
KERNEL_LIBRARIES = ("libopapi.so", "libcust_opapi.so", "libaclnn_ops_infer.so", "libaclnn_math.so")
"""Where torch_npu looks for CANN's kernels by name."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What rules ask about.

    Attributes:
        chip: "A2", "A3", "950PR", "950DT"; another chip's own name is none of them, and no rule admits it.
        cann: version as numbers, such as (9, 0, 0); empty when CANN does not tell.
        torch_npu: version of the package as text, or "".
        has_kernel: whether this CANN has a kernel of that aclnn name. True where it cannot be asked.
        offers: whether torch_npu has a function of that name.
    """

    chip: str
    cann: tuple[int, ...]
    torch_npu: str = ""
    has_kernel: Callable[[str], bool] = lambda name: True
    offers: Callable[[str], bool] = lambda name: True


ASSUMED = Machine(chip="A2", cann=(9, 1, 0))
"""What `explain --as npu` answers for."""


def chip_of(name: str) -> str:
    """The family of a chip by the name that the driver gives it, such as Ascend910B2; the name itself when unknown."""
    return next((family for prefix, family in CHIPS.items() if name.startswith(prefix)), name)


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "8.5.RC1" is (8, 5)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


@dataclass(slots=True)
class _Door:
    package: Callable[[], Any]
    machine: Callable[[], Machine]


def _import() -> Any:
    return importlib.import_module("torch_npu")


@functools.cache
def _kernel_libraries() -> tuple[ctypes.CDLL, ...]:
    loaded = []
    for name in KERNEL_LIBRARIES:
        with contextlib.suppress(OSError):
            loaded.append(ctypes.CDLL(name))
    return tuple(loaded)


def _has_kernel(name: str) -> bool:
    libraries = _kernel_libraries()
    return not libraries or any(hasattr(library, f"{name}GetWorkspaceSize") for library in libraries)


@functools.cache
def ask() -> Machine:
    """The machine that torch_npu runs on; asks once. `ASSUMED` when it does not tell."""
    try:
        package = _import()
        chip = chip_of(str(package.npu.get_device_name(0)))
        cann = version_numbers(str(package.npu.utils.get_cann_version(module="CANN")))
    except Exception:  # a driver that does not answer is the probe's to report
        return ASSUMED
    version = str(getattr(package, "__version__", ""))
    return Machine(chip, cann, version, _has_kernel, lambda name: hasattr(package, name))


def _found() -> Machine:
    """What the probe found; without a usable NPU nothing is imported to ask."""
    from glm5_port.requests import probe

    return ask() if probe("npu").missing is None else ASSUMED


_door = _Door(_import, _found)


def torch_npu() -> Any:
    """The vendor's package."""
    return _door.package()


def machine() -> Machine:
    """The machine that rules are asked about."""
    return _door.machine()


@contextlib.contextmanager
def replaced(*, package: Any = None, machine: Machine | None = None) -> Iterator[None]:
    """Within the context, calls go to `package` and rules are asked about `machine`, where given."""
    global _door
    before = _door
    _door = _Door(
        before.package if package is None else lambda: package,
        before.machine if machine is None else lambda: machine,
    )
    try:
        yield
    finally:
        _door = before
