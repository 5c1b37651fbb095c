"""Makes the shared libraries that stand in for CANN, from the symbols that the installed torch_npu wheel asks for.

Nothing about the wheel is frozen here: the functions to define are read off it with nm, the kernels are the names in it. The
result is kept beside the environment, under a digest of the wheel's version and of the code in native/.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

NATIVE = Path(__file__).with_name("native")
RUNTIME, KERNELS = "libascendcl.so", "libopapi.so"
EMPTY = ("libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")
"""Libraries that torch_npu is linked against; whatever it looks up in them is found in the runtime, which they depend on."""
LOOKED_UP = (
    "aclrtSetDeviceSatMode",
    "aclrtSetOpWaitTimeout",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeStreamWithTimeout",
    "aclSetCompileopt",
    "aclrtDestroyStreamForce",
    "aclrtSetCurrentContext",
    "aclrtSetSysParamOpt",
    "aclrtCtxSetSysParamOpt",
    "HcclSetConfig",
)
"""Functions that torch_npu finds by name at run time, so that no linker lists them."""
VENDOR_FUNCTION = re.compile(r"(acl[A-Za-z]|rt[A-Z]|Msprof|Hccl)\w+")
DEFINED = re.compile(r"^(?:static )?[\w ]+?[ *](\w+)\([^;{]*\)\s*\{", re.M)


class Missing(Exception):
    """What the stand-in runtime needs is not here; the message says what."""


def package() -> Path:
    """The folder of the installed torch_npu, which is not imported.

    Raises:
        Missing: it is not installed.
    """
    found = importlib.util.find_spec("torch_npu")
    if found is None or found.origin is None:
        raise Missing("torch_npu is not installed: make test-npu makes an environment with it")
    return Path(found.origin).parent


def library_folder() -> Path:
    """The folder with the libraries, made if it is not there yet.

    Raises:
        Missing: torch_npu, gcc or nm are not here.
    """
    wheel = package()
    if absent := [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]:
        raise Missing(f"{' and '.join(absent)} not found: install gcc and binutils")
    sources = [Path(__file__), *sorted(NATIVE.iterdir())]
    digest = hashlib.sha256(metadata.version("torch_npu").encode() + b"".join(source.read_bytes() for source in sources))
    folder = Path(sys.prefix) / "stand-in-runtime" / digest.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _make(wheel, made)
            made.rename(folder)  # at once: test processes start together
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def undefined_functions(wheel: Path) -> list[str]:
    """The plain C functions of CANN that the wheel's libraries are linked against."""
    libraries = [*wheel.glob("_C*.so"), *(wheel / "lib").glob("*.so")]
    names: set[str] = set()
    for library in libraries:
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout
        names |= {name for name in re.findall(r" U (\w+)$", listing, re.M) if VENDOR_FUNCTION.fullmatch(name)}
    return sorted(names)


def kernel_functions(wheel: Path) -> list[str]:
    """The kernels that the wheel calls by name, each with its function that asks for workspace."""
    content = (wheel / "lib" / "libtorch_npu.so").read_bytes()
    return sorted({name.decode() for name in re.findall(rb"(?<![\w])aclnn[A-Z]\w+(?=\0)", content)})


def _make(wheel: Path, folder: Path) -> None:
    runtime = (NATIVE / "host_runtime.c").read_text()
    absent = sorted({*undefined_functions(wheel), *LOOKED_UP} - set(DEFINED.findall(runtime)))
    _compile(folder, RUNTIME, runtime + "".join(f"\nint {name}(void) {{ return 0; }}" for name in absent) + "\n")
    for name in EMPTY:
        _compile(folder, name, "", "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl")
    recorder = (NATIVE / "recorder.c").read_text()
    kernels = sorted(set(kernel_functions(wheel)) - set(DEFINED.findall(recorder)))
    _compile(folder, KERNELS, recorder + "".join(f"\nKERNEL({name})" for name in kernels) + "\n")


def _compile(folder: Path, name: str, source: str, *options: str) -> None:
    file = folder / f"{name}.c"
    file.write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-O2", "-w", "-o", str(folder / name), f"-Wl,-soname,{name}", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"gcc could not make {name}:\n{done.stderr[-2000:]}")
