"""A cluster with weak links on one computer: a network namespace for each rank, and links that traffic control limits.

    rank --- bridge of its machine --- trunk --- core bridge --- trunk --- bridge of another machine --- rank
         inside                       between                  between

The ranks of a machine share its trunk, as devices share a NIC. Bare acknowledgements have a class of their own: behind the data
of the other direction they would slow everything that sends both ways by 15 to 40 %. Namespaces belong to processes that only
wait, so that nothing is left when they end; without root all of them live in one user namespace.

    with Cluster(Wires(machines=2, ranks=2, between="50 Mb/s", inside="1 Gb/s")) as cluster:
        outputs = cluster.run(["python", "-m", "my.program"])

There is no delay: the kernels this was made on have no netem.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5_port.parallel.quantities import parse_quantity

FRAME = 1514
"""Bytes of an Ethernet frame."""
PAYLOAD = 1448 / FRAME
"""Share of a frame that carries data of TCP."""
PORT = 29500
NEEDED = ("ip", "tc", "unshare", "nsenter")
QUEUE = 64
"""Frames that wait at a limited link."""
PAUSE = 0.5e-3
"""Seconds whose worth of bytes a limit lets pass at once after a pause: as late as a timer of the kernel may be without loss of
rate, and so little that a message of any size takes its bytes over the rate."""
PORT_DEVICE, TRUNK_DEVICE = "eth0", "trunk"
TRUNK_COUNTERS = "EMULATED_TRUNK_COUNTERS"
"""Variable that tells a rank where the kernel counts what its machine sends to others."""


class NotPermitted(RuntimeError):
    """This computer does not let us make namespaces or limited links."""


class RankFailed(RuntimeError):
    """A rank ended with an error, or none ended in time."""


@dataclass(frozen=True, slots=True)
class Wires:
    """What is emulated.

    Attributes:
        machines, ranks: how many, and ranks of each.
        between, inside: rate of a machine's trunk and of a rank's port, with unit, frames included.
    """

    machines: int
    ranks: int
    between: str
    inside: str

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.machines * self.ranks

    def payload(self, which: str) -> float:
        """Bytes of data a second that a link carries: "between" or "inside"."""
        return parse_quantity(getattr(self, which), "bandwidth") * PAYLOAD

    def __str__(self) -> str:
        return f"{self.machines} x {self.ranks}, {self.between} between, {self.inside} inside"


@functools.cache
def why_not() -> str | None:
    """Why links cannot be emulated here; None where they can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    trial = "ip link add one type veth peer name other && tc qdisc add dev one root handle 1: htb default 20"
    done = subprocess.run([*_unshare(), "sh", "-c", trial], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"namespaces with limited links are not permitted here: {done.stderr.strip()}"


def _unshare() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


class Cluster:
    """Emulated machines; a context manager.

    Args:
        wires: what is emulated.
    """

    def __init__(self, wires: Wires) -> None:
        self.wires = wires
        self._holders: list[subprocess.Popen[bytes]] = []
        self._ranks: list[int] = []
        self._machines: list[int] = []

    def __enter__(self) -> Cluster:
        """Makes namespaces and links.

        Raises:
            NotPermitted: with the reason.
        """
        if (reason := why_not()) is not None:
            raise NotPermitted(reason)
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders, self._ranks, self._machines = [], [], []

    def run(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 150.0) -> list[str]:
        """Runs a command on every rank, with the variables that torchrun sets.

        Args:
            command: the same for all ranks.
            environment: more variables.
            timeout: seconds.

        Returns:
            What each rank wrote to stdout.

        Raises:
            RankFailed: a rank failed (the others are ended then), or time is over; with what it wrote to stderr.
        """
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder) / str(rank) for rank in self.all]
            started = [self._start(rank, command, environment or {}, places[rank]) for rank in self.all]
            try:
                self._wait(started, places, timeout)
            finally:
                for process in started:
                    process.kill()
                    process.wait()
            return [_written(place, "out") for place in places]

    @property
    def all(self) -> range:
        """The ranks."""
        return range(self.wires.world)

    def _start(self, rank: int, command: Sequence[str], environment: Mapping[str, str], place: Path) -> subprocess.Popen[bytes]:
        wires = self.wires
        variables = {
            "RANK": rank,
            "WORLD_SIZE": wires.world,
            "LOCAL_RANK": rank % wires.ranks,
            "LOCAL_WORLD_SIZE": wires.ranks,
            "GROUP_RANK": rank // wires.ranks,
            "GROUP_WORLD_SIZE": wires.machines,
            "MASTER_ADDR": _address(0, wires.ranks),
            "MASTER_PORT": PORT,
            "GLOO_SOCKET_IFNAME": PORT_DEVICE,
            TRUNK_COUNTERS: f"/proc/{self._machines[rank // wires.ranks]}/net/dev",
            "OMP_NUM_THREADS": 1,
            "MKL_NUM_THREADS": 1,
        }
        everything = os.environ | {name: str(value) for name, value in variables.items()} | dict(environment)
        with place.with_suffix(".out").open("wb") as out, place.with_suffix(".err").open("wb") as err:
            return subprocess.Popen([*self._enter(self._ranks[rank]), *command], stdout=out, stderr=err, env=everything)

    def _wait(self, started: list[subprocess.Popen[bytes]], places: list[Path], timeout: float) -> None:
        until = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in started]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                raise RankFailed(f"rank {failed[0]} ended with {codes[failed[0]]}:\n{_written(places[failed[0]], 'err')}")
            if all(code == 0 for code in codes):
                return
            if time.monotonic() > until:
                late = [rank for rank, code in enumerate(codes) if code is None]
                raise RankFailed(f"ranks {late} did not end within {timeout:.0f} s:\n{_written(places[late[0]], 'err')}")
            time.sleep(0.02)

    # --- building --------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        core = self._hold()
        script = {core: ["ip link set lo up", "ip link add core type bridge", "ip link set core up"]}
        for machine in range(self.wires.machines):
            node = self._hold()
            self._machines.append(node)
            script[node] = [
                "ip link set lo up",
                "ip link add inner type bridge",
                "ip link set inner up",
                f"ip link add trunk type veth peer name down{machine} netns {core}",
                "ip link set trunk master inner up",
                *_limit("trunk", self.wires.between),
            ]
            script[core] += [f"ip link set down{machine} master core up", *_limit(f"down{machine}", self.wires.between)]
            for place in range(self.wires.ranks):
                rank = self._hold()
                self._ranks.append(rank)
                script[node] += [
                    f"ip link add port{place} type veth peer name eth0 netns {rank}",
                    f"ip link set port{place} master inner up",
                    *_limit(f"port{place}", self.wires.inside),
                ]
                address = _address(machine * self.wires.ranks + place, self.wires.ranks)
                script[rank] = ["ip link set lo up", f"ip addr add {address}/16 dev eth0", "ip link set eth0 up"]
                script[rank] += _limit("eth0", self.wires.inside)
        # A link exists before its other end is configured: machines first, then the core and the ranks.
        for process in sorted(script, key=lambda each: each == core or each in self._ranks):
            self._configure(process, script[process])

    def _hold(self) -> int:
        """A process that waits in a new network namespace."""
        first = not self._holders
        command = _unshare() if first else [*self._enter(self._holders[0].pid), "unshare", "--net"]
        # It reads what nobody writes, and so ends with us, however we end.
        holder = subprocess.Popen([*command, "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._holders.append(holder)
        if holder.stdout is None or not holder.stdout.readline():
            raise NotPermitted("a network namespace could not be made")
        return holder.pid

    def _enter(self, process: int) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(process), *user, "--net"]

    def _configure(self, process: int, lines: Sequence[str]) -> None:
        done = subprocess.run(
            [*self._enter(process), "sh", "-e", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotPermitted(f"a link could not be made: {done.stderr.strip()}")


def bytes_sent() -> tuple[int, int]:
    """What the kernel counted so far, frames with their headers: sent by this rank, and by its machine to others."""
    places = ((Path("/proc/self/net/dev"), PORT_DEVICE), (Path(os.environ[TRUNK_COUNTERS]), TRUNK_DEVICE))
    port, trunk = (_transmitted(path.read_text(encoding="utf-8"), device) for path, device in places)
    return port, trunk


def _transmitted(counters: str, device: str) -> int:
    """Of a device, from the text of net/dev: eight columns of what was received, then the bytes sent."""
    line = next(line for line in counters.splitlines() if line.strip().startswith(f"{device}:"))
    return int(line.partition(":")[2].split()[8])


def _address(rank: int, ranks: int) -> str:
    return f"10.77.{rank // ranks}.{rank % ranks + 1}"


def burst(rate: str) -> int:
    """Bytes that a limit lets pass at once after a pause; two frames at the least."""
    return max(2 * FRAME, int(parse_quantity(rate, "bandwidth") * PAUSE))


def _limit(device: str, rate: str) -> list[str]:
    """Limits what a device sends; IP packets below 128 bytes go past the queue."""
    bits, once = int(parse_quantity(rate, "bandwidth") * 8), burst(rate)
    tc, allowed = f"tc {{}} dev {device}", f"burst {once}b cburst {once}b"
    return [
        f"{tc.format('qdisc add')} root handle 1: htb default 20",
        f"{tc.format('class add')} parent 1: classid 1:20 htb rate {bits}bit ceil {bits}bit {allowed} quantum 60000",
        f"{tc.format('class add')} parent 1: classid 1:10 htb rate 100mbit ceil 1gbit prio 0 quantum 1514",
        f"{tc.format('qdisc add')} parent 1:20 pfifo limit {QUEUE}",
        f"{tc.format('filter add')} parent 1: protocol ip prio 1 u32 match u16 0x0000 0xff80 at 2 flowid 1:10",
    ]


def _written(place: Path, kind: str) -> str:
    return place.with_suffix(f".{kind}").read_text(encoding="utf-8", errors="replace")
