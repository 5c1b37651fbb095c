"""What a device check keeps of a device: versions, clocks, parity and times, written while the check goes on."""

from __future__ import annotations

import datetime
import importlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from glm5_port.testing.evidence import device_description, evidence, write_evidence, write_whole

CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
PATIENCE = 5.0
"""Seconds that nvidia-smi has for its answer."""
SAVED_EVERY = 10.0
"""Seconds between two writings of the records."""


def clocks() -> dict[str, str]:
    """Clocks, power and temperature, as nvidia-smi says; empty without it, or where it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    asked = [tool, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (value.strip() for value in answer.split(",")), strict=False))


def versions() -> dict[str, str]:
    """Of everything that the run depends on."""
    found = {"python": sys.version.split()[0], "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    for package in ("triton", "numpy", "transformers"):
        try:
            found[package] = str(importlib.import_module(package).__version__)
        except ImportError:
            found[package] = "not installed"
    return found


class DeviceRecord:
    """The records of a run, which are written while it goes on."""

    def __init__(self, backend: str, directory: Path | None, begin: float) -> None:
        self._backend, self._directory, self._begin = backend, directory, begin
        self._before, self._written = clocks(), begin
        self._results: list[dict[str, Any]] = []
        self._timings: list[dict[str, Any]] = []
        self._not_run: list[str] = []

    def parity(self, results: list[dict[str, Any]], not_run: list[str]) -> None:
        """Keeps what parity found so far."""
        self._results, self._not_run = results, not_run
        self._write_now_and_then()

    def timings(self, timings: list[dict[str, Any]]) -> None:
        """Keeps what was timed so far."""
        self._timings = timings
        self._write_now_and_then()

    def finish(self, timings: list[dict[str, Any]], not_timed: list[str]) -> dict[str, Any]:
        """The whole record, written."""
        self._timings, self._not_run = timings, self._not_run + not_timed
        record = self._record(complete=True)
        if paths := self._write(record):
            print(f"\nwritten: {', '.join(map(str, paths))}\n  commit both, then `make docs`")
        return record

    def _write_now_and_then(self) -> None:
        if self._directory is not None and time.monotonic() - self._written >= SAVED_EVERY:
            self._write(self._record(complete=False))
            self._written = time.monotonic()

    def _record(self, *, complete: bool) -> dict[str, Any]:
        found = ("passed", "failed", "declined", "unavailable")
        return {
            "format": 1,
            "kind": "device-check",
            "complete": complete,
            "device": device_description(self._backend),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "seconds": round(time.monotonic() - self._begin, 1),
            "clocks": {"before": self._before, "after": clocks()},
            "parity": {status: sum(r["status"] == status for r in self._results) for status in found},
            "failures": [result for result in self._results if result["status"] == "failed"],
            "not_run": self._not_run,
            "timings": self._timings,
        }

    def _write(self, record: dict[str, Any]) -> tuple[Path, ...]:
        if self._directory is None:
            return ()
        parity_path = write_evidence(evidence(self._results, self._backend), self._directory)
        path = self._directory / re.sub(r"^parity-", "", parity_path.name)
        write_whole(path, record)
        return parity_path, path
