"""Collectives between the ranks of a process group, as results instead of buffers; a group of one does nothing.

    all_gather       (P - 1) / P  S bytes sent by a rank, S of the gathered whole
    reduce_scatter   the same; sums in the order of ranks, in float32 or wider
    all_reduce       2 (P - 1) / P  S
    all_to_all       what goes to other ranks

gloo's reduce-scatter is an all-reduce inside (it sends twice the bytes), so there the parts travel by all-to-all and are added up
here. Its all-to-all, and its all-gather between two, says that a message may come behind the message that goes: where one rank
begins earlier, both directions of a link work one after the other. So there every rank first says what it takes, and then sends.
Inside `record()` every call is written down, for comparison with the cost model.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from glm5_port.errors import Glm5PortError, RankLostError

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Sent:
    """One collective.

    Attributes:
        collective: "all_gather", "reduce_scatter", "all_reduce", "all_to_all" or "send".
        ranks: of its group.
        bytes: that this rank sends to others.
        purpose: whose it was: "tensor", "context", "experts", "pipeline", "vocabulary" or "bookkeeping".
        routes: of these bytes, those that say which experts a row is for.
    """

    collective: str
    ranks: int
    bytes: float
    purpose: str
    routes: float = 0.0


_records: list[list[Sent]] = []


def set_timeout(group: dist.ProcessGroup, seconds: float) -> None:
    """How long a collective of the group waits for other ranks."""
    vars(dist.distributed_c10d)["_set_pg_timeout"](datetime.timedelta(seconds=seconds), group)  # no public door in torch 2.10


@contextlib.contextmanager
def answered(collective: str, purpose: str) -> Iterator[None]:
    """Within the context, what a collective raises says that a rank was lost.

    Raises:
        RankLostError: another rank stopped or did not answer within the group's timeout.
    """
    try:
        yield
    except Glm5PortError:
        raise  # said on purpose, by a check on the way
    except RuntimeError as error:
        raise RankLostError(f"another rank stopped or did not answer ({collective} for {purpose}): {error}") from error


@contextlib.contextmanager
def record() -> Iterator[list[Sent]]:
    """Within the context, every collective of this process is appended to the list."""
    found: list[Sent] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.remove(found)


def _note(collective: str, ranks: int, size: float, purpose: str, routes: float = 0.0) -> None:
    for found in _records:
        found.append(Sent(collective, ranks, size, purpose, routes))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def all_gather(x: Tensor, group: dist.ProcessGroup, purpose: str, routes: int = 0) -> Tensor:
    """[n, ...] of every rank -> [P n, ...] in the order of ranks, which have equally many. `routes` as in `Sent`, of a row."""
    ranks = group.size()
    if ranks == 1:
        return x
    x = x.contiguous()
    gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    _note("all_gather", ranks, _bytes(x) * (ranks - 1), purpose, x.shape[0] * (ranks - 1) * routes)
    with answered("all_gather", purpose):
        if ranks == 2 and dist.get_backend(group) == "gloo":
            _swap([x, x], list(gathered.chunk(2)), group)
        else:
            _gather_into(gathered, x, group=group)
    return gathered


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, purpose: str) -> Tensor:
    """[P n, ...] -> [n, ...]: the sum over ranks of this rank's rows."""
    ranks = group.size()
    if ranks == 1:
        return x
    x = x.contiguous()
    _note("reduce_scatter", ranks, _bytes(x) * (ranks - 1) / ranks, purpose)
    if dist.get_backend(group) == "gloo":
        parts = torch.empty_like(x)
        with answered("reduce_scatter", purpose):
            _swap(list(x.chunk(ranks)), list(parts.chunk(ranks)), group)
        return sum_parts(parts.unflatten(0, (ranks, -1)), x.dtype)
    scattered = x.new_empty((x.shape[0] // ranks, *x.shape[1:]))
    with answered("reduce_scatter", purpose):
        _scatter_from(scattered, x, group=group)
    return scattered


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, in order, in float32 (or wider), rounded once."""
    total = parts[0].to(torch.promote_types(dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def all_reduce(x: Tensor, group: dist.ProcessGroup, purpose: str) -> Tensor:
    """The sum over ranks. May be written into `x`."""
    ranks = group.size()
    if ranks == 1:
        return x
    x = x.contiguous()
    _note("all_reduce", ranks, 2 * _bytes(x) * (ranks - 1) / ranks, purpose)
    with answered("all_reduce", purpose):
        dist.all_reduce(x, group=group)
    return x


def all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, purpose: str, routes: int = 0
) -> Tensor:
    """Rows for each rank, one rank after the other -> rows from each rank.

    Args:
        x: [sum of send, ...].
        send, receive: rows for and from each rank.
        routes: as in `Sent`, of a row.
    """
    ranks = group.size()
    if ranks == 1:
        return x
    x = x.contiguous()
    rows = x.shape[0] - send[group.rank()]
    _note("all_to_all", ranks, _bytes(x) / max(x.shape[0], 1) * rows, purpose, rows * routes)
    arrived = x.new_empty((sum(receive), *x.shape[1:]))
    with answered("all_to_all", purpose):
        if dist.get_backend(group) == "gloo":
            _swap(list(x.split(list(send))), list(arrived.split(list(receive))), group)
        else:
            dist.all_to_all_single(arrived, x, list(receive), list(send), group=group)
    return arrived


def _swap(to: Sequence[Tensor], of: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sends `to[p]` to rank p of the group and receives `of[p]` from it, over gloo. All that is taken is said before anything is
    sent; ranks start with the one behind them, so that not all of them send to the same one."""
    ranks, own = group.size(), group.rank()
    of[own].copy_(to[own])
    others = [(own + step) % ranks for step in range(1, ranks)]
    pending = [dist.irecv(of[p], group=group, group_src=p) for p in others if of[p].numel()]
    pending += [dist.isend(to[p], group=group, group_dst=p) for p in others if to[p].numel()]
    for each in pending:
        if each is not None:
            each.wait()


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """counts[p] of this rank for rank p -> counts of every rank for this one."""
    if group.size() == 1:
        return counts
    arrived = counts.clone()
    _note("all_to_all", group.size(), _bytes(counts) * (1 - 1 / group.size()), "bookkeeping")
    with answered("all_to_all", "bookkeeping"):
        dist.all_to_all_single(arrived, counts.contiguous(), group=group)
    return arrived


def send(x: Tensor, to: int, group: dist.ProcessGroup, purpose: str) -> None:
    """To a rank of the world."""
    _note("send", 2, _bytes(x), purpose)
    with answered("send", purpose):
        dist.send(x.contiguous(), to, group=group)


def receive(like: Tensor, source: int, group: dist.ProcessGroup, purpose: str = "bookkeeping") -> Tensor:
    """From a rank of the world, into `like`."""
    with answered("receive", purpose):
        dist.recv(like, source, group=group)
    return like


def broadcast(x: Tensor, source: int, group: dist.ProcessGroup, purpose: str) -> Tensor:
    """`x` of a rank of the world, into `x` of the others."""
    if group.size() > 1:
        _note("broadcast", group.size(), _bytes(x), purpose)
        with answered("broadcast", purpose):
            dist.broadcast(x, source, group=group)
    return x
