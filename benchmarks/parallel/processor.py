"""A constant share of the processor for each rank, so that one rank computes as fast while others work as while they wait.

Without it four ranks on two cores have half a core each while all of them compute, and a whole one where the others wait, as in
a pipeline: no single speed describes them. A control group holds a process to a quota of every period, however idle the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PERIOD = 10_000
"""Microseconds in which a quota is used up or not: short beside a message."""
FIRST_VERSION, SECOND_VERSION = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


class Shares:
    """A control group for each of several processes; a context manager.

    Args:
        count: processes.
        share: of one core, that each of them has.
    """

    def __init__(self, count: int, share: float) -> None:
        self.count, self.quota = count, int(share * PERIOD)
        self._folders: list[Path] = []

    def __enter__(self) -> Shares:
        """Makes the groups.

        Raises:
            OSError: this computer has no control groups of the processor, or does not let us make them.
        """
        first = (FIRST_VERSION / "cpu.cfs_quota_us").exists() or (FIRST_VERSION / "cpu.shares").exists()
        try:
            for number in range(self.count):
                folder = (FIRST_VERSION if first else SECOND_VERSION) / f"emulated-{os.getpid()}-{number}"
                folder.mkdir()
                self._folders.append(folder)
                if first:
                    (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
                    (folder / "cpu.cfs_quota_us").write_text(str(self.quota))
                else:
                    (folder / "cpu.max").write_text(f"{self.quota} {PERIOD}")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._folders:
            folder.rmdir()
        self._folders = []

    def hold(self, processes: Sequence[int]) -> None:
        """From now on each of the processes, and what it starts, has its share."""
        for folder, process in zip(self._folders, processes, strict=True):
            (folder / "cgroup.procs").write_text(str(process))
