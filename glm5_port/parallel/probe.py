"""Measures links, matrix products and memory of the very machines that will run: what `glm5-port probe` does under torchrun.

Two levels: the ranks of one machine; and one rank of each machine, all of them at the same time, so that devices that share a NIC
share it here, too. On each level every collective runs with two sizes S among P ranks:

    t = rounds a + volume / b       all_reduce 2 a + 2 (P - 1) / P S / b    all_gather, reduce_scatter, all_to_all half of that
                                    send a + S / b, from half of the ranks to the other half

The small message decides a, one for the level (the median of the collectives), the large one b, for each collective. The slowest
rank counts. Compute is a square product in bf16 and a copy, on all devices at the same time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from glm5_port import collectives
from glm5_port.errors import HardwareError
from glm5_port.parallel.topology import BY_LEVEL, COLLECTIVES, ONE_RING

if TYPE_CHECKING:
    from glm5_port.registry import Backend

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HOW = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST -m glm5_port probe -o my-servers.yaml"
SIZES = {"gloo": (64 * 2**10, 4 * 2**20)}
"""Small and large message of a collective library, where they differ from `LARGE_SIZES`: gloo goes over TCP."""
LARGE_SIZES = (256 * 2**10, 64 * 2**20)
PATIENCE = timedelta(seconds=120)
"""After this long without an answer from another rank the group stops with an error."""
PURPOSE = "probe"
LEAST_BATCHES, MOST_BATCHES = 3, 50
"""Medians are over so many batches of calls."""
LEAST_BATCH = 1e-3
"""Seconds, long beside a clock and the time by which ranks leave a barrier apart."""
LEAST_LATENCY = 1e-7
LEAST_TRANSFER = 0.1
"""Share of a measurement that is never taken for latency."""


class Fit(NamedTuple):
    """a and b of one collective: seconds of a round, bytes a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Links:
    """What was measured on one level.

    Attributes:
        name: "node" or "cluster".
        ranks: of a group.
        sizes: of the small and the large message, bytes.
        seconds: collective -> (small, large).
        latency: of the level, seconds.
        bandwidth: collective -> bytes a second.
        by_group: size of a smaller group inside -> bytes a second of its all-reduce.
    """

    name: str
    ranks: int
    sizes: tuple[int, int]
    seconds: dict[str, tuple[float, float]]
    latency: float
    bandwidth: dict[str, float]
    by_group: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that a probe found out.

    Attributes:
        backend: of this library; `library` is what sends ("gloo", "nccl", "hccl").
        device: its name.
        machines, ranks: machines, and ranks of each.
        memory: bytes of a device, as the driver reports them.
        matmul: operations a second of a square product in bf16.
        memory_bandwidth: bytes a second of a copy, both ways counted.
        links: levels that there are, from the inside.
        collectives: how they go over both levels: "by_level" or "one_ring".
    """

    backend: str
    library: str
    device: str
    machines: int
    ranks: int
    memory: int
    matmul: float
    memory_bandwidth: float
    links: tuple[Links, ...]
    collectives: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# --- fitting -----------------------------------------------------------------------------------------------------------------


def form(collective: str, ranks: int) -> tuple[int, float]:
    """(rounds, share of S that a rank sends) of a collective among `ranks` ranks, as the cost model counts them."""
    if collective == "send":
        return 1, 1.0
    rounds = 2 if collective == "all_reduce" else 1
    return rounds, rounds * (ranks - 1) / ranks


def fit(collective: str, ranks: int, sizes: tuple[int, int], seconds: tuple[float, float]) -> Fit:
    """The line through both measurements; no latency where the small message is as slow a byte as the large one, and where the
    large one was the faster (another process stood in the way of the small one) not all of its time."""
    rounds, share = form(collective, ranks)
    (small, large), (first, second) = sizes, seconds
    latency = max((first * large - second * small) / (rounds * (large - small)), 0.0)
    return Fit(latency, share * large / transfer(second, rounds * latency))


def transfer(seconds: float, latency: float) -> float:
    """The part of a measurement that grows with its bytes: all but the latency, `LEAST_TRANSFER` of it at the least."""
    return max(seconds - latency, LEAST_TRANSFER * seconds)


def fit_level(ranks: int, sizes: tuple[int, int], seconds: dict[str, tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """(latency of a level, bandwidth of each collective): one latency for all, then what the large messages leave."""
    fits = [fit(name, ranks, sizes, both) for name, both in seconds.items()]
    latency = max(statistics.median(each.latency for each in fits), LEAST_LATENCY)
    bandwidth = {}
    for name, (_, second) in seconds.items():
        rounds, share = form(name, ranks)
        bandwidth[name] = share * sizes[1] / transfer(second, rounds * latency)
    return latency, bandwidth


def composition(inside: Links, between: Links, size: int, seconds: float) -> str:
    """How an all-reduce of `size` bytes among all ranks goes, by what it took: level by level, or in one ring."""
    ranks, machines = inside.ranks, between.ranks
    rate, trunk = inside.bandwidth["all_reduce"], between.bandwidth["all_reduce"]
    by_level = inside.latency + (ranks - 1) / ranks * size / rate
    by_level += between.latency + (machines - 1) / machines * size / ranks / trunk
    world = ranks * machines
    ring = max(inside.latency, between.latency) + (world - 1) / world * size / min(rate, trunk * ranks)
    return ONE_RING if abs(seconds - 2 * ring) < abs(seconds - 2 * by_level) else BY_LEVEL


# --- the process group -------------------------------------------------------------------------------------------------------


def check_environment(environment: dict[str, str] | None = None) -> None:
    """Refuses to measure where there is nothing to measure between.

    Raises:
        HardwareError: not under torchrun, or one rank only.
    """
    found = os.environ if environment is None else environment
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise HardwareError(
            f"probe measures links between ranks, but this process is none: {', '.join(missing)} not set\n"
            f"  Start it on every machine: {HOW}"
        )
    if int(found["WORLD_SIZE"]) < 2:
        raise HardwareError(f"probe measures links between ranks, but WORLD_SIZE = 1\n  Start at least two: {HOW}")


def check_agreement(facts: Sequence[dict[str, Any]]) -> None:
    """Refuses ranks that would measure different things.

    Args:
        facts: of each rank: what must be equal, and "place": [rank, machine, local rank].

    Raises:
        HardwareError: on every rank, naming the first that differs from rank 0.
    """
    first = facts[0]
    for rank, found in enumerate(facts):
        for name, value in found.items():
            if name != "place" and value != first[name]:
                raise HardwareError(
                    f"ranks disagree: {name} is {first[name]} on rank 0 and {value} on rank {rank}\n"
                    "  Start the same command with as many ranks on equal machines; a probe of mixed ones describes none of them"
                )
    ranks = first["ranks of a machine"]
    wrong = [rank for rank, found in enumerate(facts) if found["place"] != [rank // ranks, rank % ranks]]
    if wrong or len(facts) % ranks:
        raise HardwareError(
            f"ranks do not count machine by machine, {ranks} each: rank {(wrong or [len(facts) - 1])[0]} is elsewhere"
        )


class Group:
    """The ranks of a probe.

    Attributes:
        chip: the backend that is measured.
        device: of this rank.
        rank, world, ranks, machines: of all; ranks of a machine.
    """

    def __init__(self, chip: Backend, options: dict[str, Any]) -> None:
        check_environment()
        self.chip = chip
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.ranks, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
        self.machines = -(-self.world // self.ranks)
        self.device = torch.device(chip.device_type, local) if chip.device_type != "cpu" else torch.device("cpu")
        if chip.device_type != "cpu":
            torch.accelerator.set_device_index(local)
        dist.init_process_group(chip.collective, timeout=PATIENCE)
        machine = int(os.environ.get("GROUP_RANK", self.rank // self.ranks))
        facts: dict[str, Any] = {"place": [machine, local], "ranks of a machine": self.ranks, "backend": chip.name}
        facts |= {"device": device_name(self.device), "torch": str(torch.__version__), **options}
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, facts)
        check_agreement(gathered)

    def subgroup(self, members: Callable[[int], tuple[int, ...]]) -> Any:
        """The group of this rank among those that all ranks name by `members`; all of them are made everywhere."""
        own = None
        for ranks in sorted({members(rank) for rank in range(self.world)}):
            made = dist.new_group(list(ranks), timeout=PATIENCE)
            own = made if self.rank in ranks else own
        return own

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Each time of the slowest rank."""
        times = torch.tensor(seconds, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return [float(each) for each in times.tolist()]

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def time(self, call: Callable[[], Any], budget: float) -> float:
        """Seconds of a call: the median of batches, on the slowest rank, after one call that nobody counts.

        A batch is one call, or as many as take `LEAST_BATCH`: calls that follow each other meet what others left in sockets.
        """
        call()
        self.wait()
        (once,) = self.slowest([self._batch(call, 1)])
        calls = max(1, int(LEAST_BATCH / max(once, 1e-6)))
        batches = min(max(int(budget / max(once * calls, 1e-6)), LEAST_BATCHES), MOST_BATCHES)
        return statistics.median(self.slowest([self._batch(call, calls) for _ in range(batches)]))

    def _batch(self, call: Callable[[], Any], calls: int) -> float:
        dist.barrier()
        self.wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - started) / calls


def device_name(device: torch.device) -> str:
    """What the driver calls it."""
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


# --- measuring ---------------------------------------------------------------------------------------------------------------


def collective_call(collective: str, group: Any, size: int, device: torch.device) -> Callable[[], Any]:
    """A call of a collective, in the form in which plans are executed here.

    Args:
        collective: one of `COLLECTIVES`.
        group: the process group.
        size: bytes of float32 that are S of its form, rounded up to whole shares.
        device: where the tensors are.
    """
    ranks = group.size()
    rows = -(-size // 4 // ranks)
    whole = torch.zeros(rows * ranks, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: collectives.all_reduce(whole, group, PURPOSE),
        "all_gather": lambda: collectives.all_gather(whole[:rows], group, PURPOSE),
        "reduce_scatter": lambda: collectives.reduce_scatter(whole, group, PURPOSE),
        "all_to_all": lambda: collectives.all_to_all(whole, [rows] * ranks, [rows] * ranks, group, PURPOSE),
        "send": lambda: _send(whole, group),
    }
    return calls[collective]


def _send(message: torch.Tensor, group: Any) -> None:
    """The first half sends to the second half; of an odd number the last waits."""
    half, place = group.size() // 2, group.rank()
    if place < half:
        collectives.send(message, dist.get_global_rank(group, place + half), group, PURPOSE)
    elif place < 2 * half:
        collectives.receive(message, dist.get_global_rank(group, place - half), group)


def measure_links(
    group: Group,
    name: str,
    members: Callable[[int], tuple[int, ...]],
    sizes: tuple[int, int],
    budget: float,
    note: Callable[[str], None],
) -> Links:
    """One level, all of its groups at the same time."""
    own, ranks = group.subgroup(members), len(members(group.rank))
    seconds = {}
    for collective in COLLECTIVES:
        both = []
        for size in sizes:
            both.append(group.time(collective_call(collective, own, size, group.device), budget))
            note(f"{name}: {collective}, {size:,} bytes")
        seconds[collective] = (both[0], both[1])
    latency, bandwidth = fit_level(ranks, sizes, seconds)
    return Links(name, ranks, sizes, seconds, latency, bandwidth)


def measure_groups(
    group: Group, sizes: tuple[int, int], latency: float, budget: float, note: Callable[[str], None]
) -> dict[int, float]:
    """All-reduce of smaller groups inside a machine, all at the same time: on a mesh or over PCIe the size of a group counts."""
    found = {}
    for ranks in smaller_groups(group.ranks):
        own = group.subgroup(partial(neighbours, ranks))
        seconds = group.time(collective_call("all_reduce", own, sizes[1], group.device), budget)
        rounds, share = form("all_reduce", ranks)
        found[ranks] = share * sizes[1] / transfer(seconds, rounds * latency)
        note(f"node: all_reduce of {ranks} ranks")
    return found


def neighbours(size: int, rank: int) -> tuple[int, ...]:
    """The group of a rank where `size` ranks that follow each other are one."""
    first = rank // size * size
    return tuple(range(first, first + size))


def smaller_groups(ranks: int) -> list[int]:
    """Sizes of groups that divide a machine, without 1 and the whole."""
    return [size for size in range(2, ranks) if ranks % size == 0]


def measure_matmul(group: Group, budget: float) -> float:
    """Operations a second of a square product in bf16 on the slowest device, while all multiply."""
    width = 1024 if group.device.type == "cpu" else 8192
    left, right = (torch.randn(width, width, device=group.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * width**3 / group.time(lambda: left @ right, budget)


def measure_memory(group: Group, budget: float) -> float:
    """Bytes a second that a copy reads and writes on the slowest device, while all copy."""
    elements = 2**25 if group.device.type == "cpu" else 2**28
    source = torch.ones(elements, device=group.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / group.time(lambda: target.copy_(source), budget)


def device_memory(group: Group) -> int:
    """Bytes of a device, as the driver reports them; of a CPU the machine's over its ranks."""
    if group.device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // group.ranks
    return int(torch.get_device_module(group.device).mem_get_info(group.device)[1])


def steps(ranks: int, machines: int) -> int:
    """Measurements that a probe makes."""
    levels = (ranks > 1) + (machines > 1)
    return 2 + 2 * len(COLLECTIVES) * levels + len(smaller_groups(ranks)) + (levels == 2)


def measure(group: Group, sizes: tuple[int, int], budget: float, note: Callable[[str], None]) -> Measured:
    """Everything, on every rank alike.

    Args:
        group: the ranks.
        sizes: of the small and the large message, bytes.
        budget: seconds of one measurement.
        note: told after each measurement.
    """
    ranks, machines = group.ranks, group.machines
    matmul = measure_matmul(group, budget)
    note("matrix products")
    bandwidth = measure_memory(group, budget)
    note("memory")
    links = []
    if ranks > 1:
        node = measure_links(group, "node", partial(neighbours, ranks), sizes, budget, note)
        by_group = measure_groups(group, sizes, node.latency, budget, note)
        links.append(Links(**{**asdict(node), "by_group": by_group}))
    if machines > 1:
        links.append(measure_links(group, "cluster", lambda r: tuple(range(r % ranks, group.world, ranks)), sizes, budget, note))
    composed = BY_LEVEL
    if len(links) == 2:
        everybody = group.subgroup(lambda _: tuple(range(group.world)))
        seconds = group.time(collective_call("all_reduce", everybody, sizes[1], group.device), budget)
        composed = composition(links[0], links[1], sizes[1], seconds)
        note("all levels: all_reduce")
    return Measured(
        backend=group.chip.name,
        library=group.chip.collective,
        device=device_name(group.device),
        machines=machines,
        ranks=ranks,
        memory=device_memory(group),
        matmul=matmul,
        memory_bandwidth=bandwidth,
        links=tuple(links),
        collectives=composed,
    )
