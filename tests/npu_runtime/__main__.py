"""Runs a module or a script on the stand-in runtime:

    .venv-npu/bin/python -m tests.npu_runtime [--chip A3] [--cann 9.0.0] [--no-skips] -m glm5_port parity --backend npu
    .venv-npu/bin/python -m tests.npu_runtime FILE.py ...

`--no-skips` makes unittest's skip decorators do nothing: the vendor's own tests carry skips for machines and versions.
"""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import sys
import unittest

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def _say_what_ran() -> None:
    from tests.npu_runtime import machine

    counts = ", ".join(f"{name} {calls}" for name, calls in sorted(machine.counted().items()))
    print(f"{machine.TITLE}: kernels asked of CANN: {counts or 'none'}", file=sys.stderr)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.npu_runtime", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chip", default="A2", choices=("A2", "A3", "950"))
    parser.add_argument("--cann", default="9.1.0")
    parser.add_argument("--no-skips", action="store_true")
    parser.add_argument("-m", dest="module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    from tests.npu_runtime import libraries, machine

    try:
        running = machine.start(asked.chip, asked.cann)
    except libraries.Missing as missing:
        parser.error(str(missing))
    print(f"{machine.TITLE}: {running}; no kernel of the hardware runs", file=sys.stderr)
    if asked.no_skips:
        unittest.skip = lambda reason: lambda function: function  # type: ignore[assignment]
        unittest.skipIf = unittest.skipUnless = lambda condition, reason: lambda function: function  # type: ignore[assignment]
    atexit.register(_say_what_ran)
    if asked.module:
        sys.argv = [asked.module, *asked.arguments]
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = asked.arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
