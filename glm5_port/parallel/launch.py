"""Starts a plan on the processes that torchrun made: checks that they fit it and agree, and turns a lost rank into a clear end.

torchrun --nproc-per-node 4 -m glm5_port generate CHECKPOINT --plan plan.json --prompt "..."
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import glm5_port
from glm5_port.collectives import answered
from glm5_port.config import Glm5Config
from glm5_port.errors import Glm5PortError, PlanError, RankLostError, RankMismatchError, did_you_mean
from glm5_port.parallel.execute import PlanRanks
from glm5_port.parallel.plan import ParallelPlan, Role
from glm5_port.parallel.support import layout_reasons
from glm5_port.requests import resolve_backend

DEFAULT_TIMEOUT = 300.0
"""Seconds after which a rank that does not answer ends the group."""
WAIT_FOR_REASON = 5.0
"""Seconds in which ranks that lost another one look for what it left behind."""
FAILED = "glm5_port/failed"


def local_rank() -> int:
    """This process's place on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks for its group: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def role_to_run(plan: ParallelPlan, name: str | None, world: int) -> Role:
    """The role whose one replica this process group is.

    Args:
        plan: what was planned.
        name: of a role; None: the plan has one role of one replica.
        world: processes that were started.

    Raises:
        PlanError: no such role, several without a name, or another number of processes. Nothing has been read.
    """
    names = [role.name for role in plan.roles]
    if name is None:
        plan.check_world(world)
        if len(plan.roles) == 1 and plan.roles[0].replicas == 1:
            return plan.roles[0]
        raise PlanError(
            f"this plan is {'; '.join(f'{role.name}: {role.replicas} x {role.layout}' for role in plan.roles)}\n"
            "  This library starts one replica of one role at a time, which knows nothing of the others: --role "
            f"{' or --role '.join(names)}, with as many processes as one replica has ranks "
            f"({', '.join(str(role.layout.ranks) for role in plan.roles)})."
        )
    if name not in names:
        raise PlanError(f"this plan has no role {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}")
    role = plan.roles[names.index(name)]
    if world != role.layout.ranks:
        raise PlanError(
            f"one replica of {name} is for {role.layout.ranks} ranks, and {world} were started\n  {role.layout}\n"
            f"  Start {role.layout.ranks} ranks, or make a plan for {world}: glm5-port plan"
        )
    return role


@contextmanager
def start(
    plan: ParallelPlan,
    config: Glm5Config,
    *,
    role: str | None = None,
    backend: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    loads: Mapping[int, Sequence[float]] | None = None,
) -> Iterator[PlanRanks]:
    """A process group that runs a plan; give what it yields to `glm5_port.load(..., ranks=...)`.

    Args:
        plan: what to run.
        config: the model, as its checkpoint says.
        role: whose one replica to run; needed where the plan has several roles or replicas.
        backend: as in `glm5_port.load`.
        timeout: seconds that a rank waits for another one.
        loads: layer -> tokens of each expert, by which redundant experts are placed.

    Raises:
        PlanError: not started by torchrun, another number of processes, or a plan that this model or library cannot run; on every
            rank, before any weight is read.
        RankMismatchError: ranks with another plan, model or version; on every rank.
        RankLostError: from within, when another rank stopped or did not answer in time.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        raise PlanError(
            "a plan runs on the processes of torchrun, and this is none (RANK and WORLD_SIZE are not set)\n"
            f"  torchrun --nproc-per-node {plan.ranks} -m glm5_port generate CHECKPOINT --plan PLAN ..."
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    chosen = role_to_run(plan, role, world)
    plan.check(config)
    if reasons := layout_reasons(chosen.layout):
        raise PlanError("\n  ".join([f"this library cannot run {chosen.layout}", *reasons]))
    placed = resolve_backend(backend)
    device = torch.device(placed.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, local_rank())
        torch.get_device_module(device.type).set_device(device)
    store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
    dist.init_process_group(
        placed.collective,
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        agree({"plan": plan.as_dict(), "role": role, "config": asdict(config), "versions": versions(), "expert loads": loads})
        yield PlanRanks(chosen.layout, config, node_devices=plan.node_devices, device=device, loads=loads, timeout=timeout)
    except RankLostError as error:
        raise RankLostError(f"rank {rank} of {world}: {error}\n  {_reason(store)}") from error
    except Exception as error:
        kind = "" if isinstance(error, Glm5PortError) else f"{type(error).__name__}: "
        store.set(FAILED, f"rank {rank} stopped: {kind}{error}")
        raise
    finally:
        dist.destroy_process_group()


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    return {"glm5_port": glm5_port.__version__, "torch": torch.__version__}


def agree(facts: Mapping[str, Any]) -> None:
    """Compares facts by digest over all ranks.

    Raises:
        RankMismatchError: on every rank, naming what differs and on which ranks.
    """
    mine = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
        for name, value in facts.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    with answered("all_gather", "bookkeeping"):
        dist.all_gather_object(everyone, mine)
    for name in mine:
        digests = [each.get(name, "nothing") for each in everyone]
        if len(set(digests)) > 1:
            rows = "\n".join(f"  rank {rank}: {digest}" for rank, digest in enumerate(digests))
            raise RankMismatchError(f"ranks differ in: {name}\n{rows}\n  Give every rank the same files, options and packages.")


def _reason(store: Any) -> str:
    """What the rank that stopped first left behind."""
    ends = time.monotonic() + WAIT_FOR_REASON
    try:
        while time.monotonic() < ends:
            if store.check([FAILED]):
                return str(store.get(FAILED).decode())
            time.sleep(0.1)
    except (RuntimeError, dist.DistError):
        pass  # the store has gone with its process
    return "No rank left a message: it was killed, or it hangs. Its own log says more."
