"""Starts torch_npu on the stand-in runtime, and reads what its front end asked of the kernels.

machine.start(chip="A2", cann="9.1.0")     once a process, before anything imports torch_npu
with machine.recorded() as calls: ...      every aclnn call made within, with its tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.npu_runtime import libraries

CHIPS = {"A2": "Ascend910B2", "A3": "Ascend910_9391", "950": "Ascend950PR_9589"}
"""Name of a generation in the documentation -> what its runtime reports."""
TITLE = "stand-in runtime"
DTYPES = {
    0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 9: "int64", 10: "uint64", 11: "float64",
    12: "bool", 27: "bfloat16", 29: "int4",
}  # fmt: skip
"""Numbers of aclDataType."""


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A tensor as the front end described it to a kernel."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    format: int
    storage: tuple[int, ...]


@dataclass(slots=True)
class KernelCall:
    """One aclnn call: everything that was described since the last one. `ran` is False where nothing stands in for the kernel."""

    kernel: str
    ran: bool
    tensors: list[TensorArgument] = field(default_factory=list)
    others: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process's runtime says it is."""

    chip: str
    cann: str


_started: Machine | None = None
_kernels: Any = None
_log: list[KernelCall] = []


def start(chip: str = "A2", cann: str = "9.1.0", devices: int = 1) -> Machine:
    """Loads the libraries, imports torch_npu, and gives torch's operators and the vendor's their bodies.

    Args:
        chip: "A2", "A3" or "950".
        cann: the version that CANN reports.
        devices: how many devices are visible.

    Raises:
        libraries.Missing: torch_npu or gcc is not here.
        RuntimeError: already started as another machine: torch_npu reads chip and version once a process.
    """
    global _started, _kernels
    wanted = Machine(chip, cann)
    if _started is not None:
        if _started != wanted:
            raise RuntimeError(f"this process runs as {_started}; {wanted} needs a process of its own")
        return _started
    if "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu was imported before the stand-in runtime: start it first")
    folder = libraries.library_folder()
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ["ASCEND_HOME_PATH"] = os.environ["ASCEND_OPP_PATH"] = str(_installation(folder, cann))
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # launches on a thread of their own would lose the order of the recording
    os.environ.setdefault("ASCEND_GLOBAL_LOG_LEVEL", "3")
    for name in (libraries.RUNTIME, *libraries.EMPTY, libraries.KERNELS):
        library = ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        if name == libraries.RUNTIME:
            library.stand_in_describe(CHIPS[chip].encode(), cann.encode(), devices)
    _kernels = library
    _kernels.stand_in_take_log.restype = _kernels.stand_in_counted.restype = ctypes.c_char_p
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the folder of CANN, which holds nothing that the vendor's own tools look for
        import torch
        import torch_npu

    _call_it_by_its_name(torch_npu.npu)
    torch.npu.set_compile_mode(jit_compile=False)
    torch_npu.npu.config.allow_internal_format = True
    from tests.npu_runtime import aten, bodies

    aten.install()
    bodies.install(wanted)
    _started = wanted
    return wanted


def _call_it_by_its_name(namespace: Any) -> None:
    """Whoever prints the device prints what it is. The C++ front end has asked the runtime itself."""
    vendors = namespace.get_device_name

    @functools.wraps(vendors)
    def get_device_name(device: Any = None) -> str:
        return f"{vendors(device)} ({TITLE})"

    namespace.get_device_name = get_device_name


def _installation(folder: Path, cann: str) -> Path:
    """A folder that looks like an installed CANN as far as torch_npu looks."""
    home = folder / f"cann-{cann}"
    for part in ("runtime", "compiler"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "ascend_toolkit_install.info").write_text(f"package_name=Ascend-cann-toolkit\nversion={cann}\n")
    return home


@contextlib.contextmanager
def armed(*kernels: str) -> Iterator[None]:
    """Within the context the vendor's front end may call these kernels; all others refuse."""
    _kernels.stand_in_arm(",".join(kernels).encode())
    try:
        yield
    finally:
        _kernels.stand_in_arm(b"")


def counted() -> dict[str, int]:
    """How often each kernel ran in this process."""
    found, calls = {}, ctypes.c_long()
    while (name := _kernels.stand_in_counted(len(found), ctypes.byref(calls))) is not None:
        found[name.decode()] = calls.value
    return found


def taken() -> list[KernelCall]:
    """The aclnn calls since the last time that somebody asked.

    Raises:
        RuntimeError: more calls were made than are kept.
    """
    return _parse(_kernels.stand_in_take_log().decode())


@contextlib.contextmanager
def recorded() -> Iterator[list[KernelCall]]:
    """The aclnn calls made within the context, filled when it ends."""
    _kernels.stand_in_take_log()
    calls: list[KernelCall] = []
    try:
        yield calls
    finally:
        calls += taken()


def _parse(log: str) -> list[KernelCall]:
    calls: list[KernelCall] = []
    tensors: list[TensorArgument] = []
    others: list[list[Any]] = []
    for line in log.splitlines():
        kind, *values = json.loads(line)
        if kind == "overflow":
            raise RuntimeError("more calls were made than are kept: take them more often")
        if kind == "tensor":
            dtype, shape, strides, offset, layout, storage = values
            name = DTYPES.get(dtype, f"aclDataType {dtype}")
            tensors.append(TensorArgument(name, tuple(shape), tuple(strides), offset, layout, tuple(storage)))
        elif kind == "kernel":
            calls.append(KernelCall(values[0], values[1], tensors, others))
            tensors, others = [], []
        else:
            others.append([kind, *values])
    return calls
