"""Contests of one operator: this project's kernel on copies of a call, its portable implementation, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.contest import Contest
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.dispatch import Operator
from glm5_port.memory import zeros

WIDTH, HEADS, QUERY_LATENT, LATENT, ROPE, NOPE, VALUE = 6144, 64, 2048, 512, 64, 192, 256
"""Of GLM-5: hidden size, attention heads, and the widths of their parts."""

DISTINCT = (1 << 22) - 3
"""Numbers that are drawn; odd, so that no two rows of a weight are equal."""

Call = dict[str, Any]


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Numbers in bfloat16, in memory such as a checkpoint's weights are read into. After so many of them they come again."""
    result = zeros(*shape, dtype=torch.bfloat16)
    parts = result.view(-1).split(DISTINCT)
    drawn = torch.randn(parts[0].numel()).mul_(std).bfloat16()
    for part in parts:
        part.copy_(drawn[: part.numel()])
    return result


def weight(*shape: int) -> Tensor:
    """As `normal`; a product with it keeps the size of its inputs."""
    return normal(*shape, std=shape[-1] ** -0.5)


def first(result: Any) -> Tensor:
    """What errors are taken of; nothing where a call writes in place."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return torch.empty(0) if found is None else found


def widened(call: Call) -> Call:
    """The call in float64."""
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()}


def operator_contest(
    operator: Operator,
    work: str,
    calls: Sequence[Call],
    nbytes: float,
    operations: float = 0.0,
    *,
    kind: str = "bf16",
    peers: dict[str, Callable[[Call], Any]] | None = None,
    exact: bool | Callable[[], Tensor] = True,
) -> Contest:
    """A contest of `operator`.

    Args:
        operator, work: what is done.
        calls: arguments, which differ in their weights.
        nbytes, operations, kind: the limit, as in `Contest`.
        peers: other contenders.
        exact: False: errors are not shown; a function: the result of the first call in float64; True: that of the reference.
    """
    ours, portable = _prepared(operator, calls), operator.implementations["torch/eager"].function
    gold = exact if callable(exact) else (lambda: first(operator.reference(**widened(calls[0])))) if exact else None
    return Contest(
        operator=operator.name,
        work=work,
        bytes=nbytes,
        operations=operations,
        kind=kind,
        contenders={
            f"cpu/{widest_isa()}": lambda copy: first(ours[copy]()),
            **{name: lambda copy, peer=peer: first(peer(calls[copy])) for name, peer in (peers or {}).items()},
            "torch/eager (portable)": lambda copy: first(portable(**calls[copy])),
        },
        gold=gold,
        copies=len(calls),
    )


def _prepared(operator: Operator, calls: Sequence[Call]) -> list[Callable[[], Any]]:
    """The native kernel on each call, with the weights in its own layout where it has one."""
    bound = operator.bind(backend="cpu", **operator.facts_of(calls[0]))
    if bound.implementation.prepare is None:
        return [lambda call=call: bound(**call) for call in calls]
    prepared = []
    for call in calls:
        preparation = bound.prepare()
        preparation.add(None, {name: call[name] for name in operator.weights})
        prepared.append({n: v for n, v in call.items() if n not in operator.weights} | preparation.finish())
    return [lambda call=call: bound(**call) for call in prepared]


def plural(count: int, what: str) -> str:
    """As people write it."""
    return f"{count} {what}{'s' * (count != 1)}"
