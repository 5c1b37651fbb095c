"""Work for the processes of test_workers.py: what goes wrong on a device, without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


def work(item: Any) -> Iterator[Any]:
    """Items are (what to do, how)."""
    what, how = item
    if what == "count":
        yield from range(how)
    elif what == "crash":
        yield "before"
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "raise":
        yield "before"
        raise RuntimeError("CUDA error: an illegal\nmemory access was encountered")
    elif what == "hang":
        yield os.getpid()
        time.sleep(600)
    elif what == "compile":  # a process of its own that takes too long, as a compiler may
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield child.pid
        child.wait()


def hang(*_: Any) -> Iterator[Any]:
    """As an item of device-check."""
    time.sleep(600)
    yield


def lost_or_fine(backend: str, item: Any) -> Iterator[dict[str, Any]]:
    """As an item of device-check: a case that fails and takes the device with it, or one that passes."""
    lost = item[1] == "cuda/lost"
    yield {"implementation": item[1], "status": "failed" if lost else "passed"}
    if lost:
        raise RuntimeError("CUDA error: unspecified launch failure")
