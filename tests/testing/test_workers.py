"""The processes of device-check: whatever one of them meets, the others go on, the time is kept, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from glm5_port.testing import workers
from tests.testing.work import work

STARTING = 20.0
"""Seconds that a process may need before it works, on a machine that is busy."""


def gone(pid: int) -> bool:
    """Whether a process ended (a child of nobody may stay as a name until it is collected)."""
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                if file.read().rsplit(")", 1)[1].split()[0] in "ZX":
                    return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def run(items: list[Any], *, seconds: float = 60.0, each: float = 60.0, processes: int = 1) -> tuple[list[Any], dict[Any, str]]:
    found: list[Any] = []
    ends: dict[Any, str] = {}

    def ended(item: Any, problem: str) -> None:
        assert item not in ends, "an item ended twice"
        ends[item] = problem

    workers.run(
        work, items, workers=processes, until=time.monotonic() + seconds, seconds_each=each,
        found=lambda item, result: found.append((item[0], result)), ended=ended,
    )  # fmt: skip
    return found, ends


def test_what_one_process_meets_is_not_the_end_of_the_others() -> None:
    items = [("count", 2), ("crash", 0), ("raise", 0), ("count", 1)]
    found, ends = run(items)
    assert found == [("count", 0), ("count", 1), ("crash", "before"), ("raise", "before"), ("count", 0)]
    assert list(ends) == items
    assert ends["count", 2] == ends["count", 1] == ""
    assert ends["crash", 0] == f"its process died (signal {int(signal.SIGSEGV)})"
    assert ends["raise", 0] == "RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.slow
def test_an_item_that_hangs_is_killed_with_what_it_started_and_another_process_goes_on() -> None:
    found, ends = run([("compile", 0), ("count", 1)], each=STARTING / 2)
    assert ends == {("compile", 0): f"took longer than {STARTING / 2:.0f} s", ("count", 1): ""}
    ((_, compiler), counted) = found
    assert gone(compiler), "the compiler of a killed process still runs"
    assert counted == ("count", 0)


def test_the_time_is_kept_and_nothing_is_left() -> None:
    begin = time.monotonic()
    found, ends = run([("hang", 1), ("hang", 2), ("count", 1)], seconds=STARTING / 2, processes=2)
    assert time.monotonic() - begin < STARTING / 2 + workers.LAST_WORDS + 2
    assert ends == dict.fromkeys([("hang", 1), ("hang", 2), ("count", 1)], workers.OUT_OF_TIME)
    assert len(found) == 2 and all(gone(pid) for _, pid in found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to kill a child with its parent")
def test_a_run_that_is_killed_takes_its_processes_with_it() -> None:
    code = (
        "import time\nfrom glm5_port.testing import workers\nfrom tests.testing.work import work\n"
        "if __name__ == '__main__':\n"
        "    workers.run(work, [('hang', 0)], workers=1, until=time.monotonic() + 60, seconds_each=60,\n"
        "                found=lambda item, pid: print(pid, flush=True), ended=print)\n"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    worker = int(running.stdout.readline())
    assert not gone_now(worker)
    running.kill()
    running.wait(timeout=20)
    running.stdout.close()
    assert gone(worker)


def gone_now(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return True
    return False
