"""How an implementation is chosen, and the record of the choice.

The request (`glm5_port.requests`) names backends or pins one implementation. Within a backend: its own implementations by rank,
then the portable ones on the same device. `reference` runs only when asked for by name. Tensors never change device to find a
kernel, and an exception from a chosen implementation is never caught to try another. The record (`Selection`) is the log line,
the error text, the output of `explain`, the skip reason in tests and the row in the README table.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from glm5_port import flags as _flags
from glm5_port.errors import FlagError, RankMismatchError, SelectionError, did_you_mean
from glm5_port.plugins import load_plugins
from glm5_port.registry import BACKENDS, PORTABLE, REFERENCE, Implementation
from glm5_port.requests import Request, backend_named, probe, request_for, search_order

if TYPE_CHECKING:
    from glm5_port.dispatch import Operator

logger = logging.getLogger("glm5_port")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation in a decision record; `reasons` say why it was not chosen."""

    id: str
    chosen: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The decision record: chosen, refused, why.

    Attributes:
        operator: the operator's name.
        facts: the static facts that the choice used.
        request: what was asked for.
        chosen: the implementation, or None.
        candidates: every implementation in the order of preference.
        hypothetical: name of the backend that was assumed usable (`explain --as`), else None.
    """

    operator: str
    facts: Mapping[str, Any]
    request: Request
    chosen: Implementation | None
    candidates: tuple[Candidate, ...]
    hypothetical: str | None = None

    @property
    def title(self) -> str:
        assumed = f"; as if {self.hypothetical} were here" if self.hypothetical else ""
        return f"{self.operator}: {self.chosen.id if self.chosen else 'NOTHING FITS'}   {self.request}{assumed}"

    def __str__(self) -> str:
        width = max((len(c.id) for c in self.candidates), default=0)
        rows = [
            f"  {'->' if c.chosen else '  '} {c.id:{width}}  {'chosen' if c.chosen else '; '.join(c.reasons)}"
            for c in self.candidates
        ]
        return "\n".join([self.title, *rows])

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data, for `--json`."""
        return {
            "operator": self.operator,
            "facts": {name: _plain(value) for name, value in self.facts.items()},
            "request": {"asked": self.request.pin or ",".join(self.request.backends), "source": self.request.source},
            "overridden": list(self.request.overridden),
            "chosen": self.chosen.id if self.chosen else None,
            "hypothetical": self.hypothetical,
            "candidates": [{"id": c.id, "chosen": c.chosen, "reasons": list(c.reasons)} for c in self.candidates],
        }


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


# -- selection ---------------------------------------------------------------------------------------------------------


def select(
    operator: Operator,
    facts: Mapping[str, Any],
    *,
    backend: str | None = None,
    as_backend: str | None = None,
    request: Request | None = None,
    canonical: bool = False,
) -> Selection:
    """Chooses an implementation on static facts and returns the whole record.

    Args:
        operator: what to compute.
        facts: complete facts (`Operator.complete_facts`).
        backend: the strongest request; None follows the request order.
        as_backend: answers as if this backend were usable here (no probe, tensors on its device).
        request: a request made already, such as a rebinding; nothing else is read then.
        canonical: the weights come with every call, as they do when an operator is called without being bound.

    Raises:
        SelectionError: nothing fits; the text is the record. FlagError: a pin names nothing that exists.
    """
    selection = decide(operator, facts, backend=backend, as_backend=as_backend, request=request, canonical=canonical)
    if selection.chosen is None:
        raise SelectionError(f"{selection}\n  facts: {_facts_line(selection.facts)}")
    _report(selection)
    return selection


def decide(
    operator: Operator,
    facts: Mapping[str, Any],
    *,
    backend: str | None = None,
    as_backend: str | None = None,
    request: Request | None = None,
    canonical: bool = False,
) -> Selection:
    """`select` without consequences: the record also when nothing fits (`chosen` is None), and nothing is logged."""
    load_plugins()
    if as_backend is not None:
        request = Request((as_backend,), None, "as")
        facts = {**facts, "device_type": backend_named(as_backend, "as").device_type}
    request = request or request_for(operator, backend)
    candidates: list[Candidate] = []
    chosen: Implementation | None = None
    for implementation in _by_preference(operator, request):
        reasons = _reasons(implementation, request, facts, hypothetical=as_backend)
        if canonical and implementation.prepare is not None:
            reasons.append(f"wants its weights prepared, which a direct call cannot do: bind it ({operator.name}.bind)")
        take = not reasons and chosen is None
        if take:
            chosen = implementation
        elif not reasons:
            reasons = [_outranked(implementation, chosen)]
        candidates.append(Candidate(implementation.id, take, tuple(reasons)))
    return Selection(operator.name, dict(facts), request, chosen, tuple(candidates), as_backend)


def _outranked(implementation: Implementation, chosen: Implementation | None) -> str:
    by = f" by {chosen.id}" if chosen else ""
    return f"outranked{by}" + (f": {implementation.yields}" if implementation.yields and chosen and chosen.portable else "")


def _by_preference(operator: Operator, request: Request) -> list[Implementation]:
    """Named backends in request order, then the others; portable ones, what yields to them, and the reference last."""
    names = request.backends if request.backends != ("auto",) else tuple(b.name for b in search_order())
    places = {name: place for place, name in enumerate(names)}

    def key(implementation: Implementation) -> tuple[Any, ...]:
        last = {PORTABLE: 1, REFERENCE: 3}.get(implementation.backend, 2 if implementation.yields else 0)
        return (last, places.get(implementation.backend, len(places)), implementation.rank, implementation.id)

    if request.pin is not None:
        _check_pin(operator, request)
    return sorted(operator.implementations.values(), key=key)


def _check_pin(operator: Operator, request: Request) -> None:
    known = sorted({*operator.implementations, *(i.variant for i in operator.implementations.values()), PORTABLE})
    if request.pin not in known:
        raise FlagError(
            f"{request.source}={request.pin}: {operator.name} has no such implementation{did_you_mean(str(request.pin), known)}\n"
            f"  supported: {', '.join(known)}"
        )


def _reasons(
    implementation: Implementation, request: Request, facts: Mapping[str, Any], *, hypothetical: str | None
) -> list[str]:
    """Why `implementation` cannot serve this request; empty means it can."""
    reasons: list[str] = []
    pinned = request.pin is not None and request.pin in (implementation.id, implementation.variant, implementation.backend)
    if request.pin is not None and not pinned:
        reasons.append(f"not asked for ({request.source}={request.pin})")
    elif implementation.backend == REFERENCE:
        if not pinned:
            reasons.append("runs only when asked for by name")
    elif implementation.portable:
        reasons += _portable_reasons(request, facts, pinned=pinned, hypothetical=hypothetical)
    else:
        if not pinned and request.backends == ("auto",) and _only_by_name(implementation):
            reasons.append("runs only when asked for by name")
        reasons += _backend_reasons(implementation, request, facts, hypothetical=hypothetical)
    if facts["needs_grad"] and not implementation.differentiable:
        reasons.append("forward only, and a gradient is asked for")
    return reasons + list(implementation.not_supported(**facts))


def _only_by_name(implementation: Implementation) -> bool:
    backend = BACKENDS.get(implementation.backend)
    return backend is not None and backend.by_name_only


def _portable_reasons(request: Request, facts: Mapping[str, Any], *, pinned: bool, hypothetical: str | None) -> list[str]:
    if _flags.current().strict and not pinned:
        return [f"{_flags.STRICT.name}=1 refuses portable implementations"]
    if request.backends == ("auto",) or hypothetical is not None:
        return []
    devices = [BACKENDS[name].device_type for name in request.backends if probe(name).missing is None]
    if facts["device_type"] in devices:
        return []
    if not devices:
        return [f"{name}: {probe(name).missing}" for name in request.backends]
    return [f"tensors are on {facts['device_type']}, {','.join(request.backends)} was asked for (tensors never change device)"]


def _backend_reasons(
    implementation: Implementation, request: Request, facts: Mapping[str, Any], *, hypothetical: str | None
) -> list[str]:
    name = implementation.backend
    backend = BACKENDS.get(name)
    if backend is None:
        return [f"its backend {name!r} is not registered"]
    if request.backends != ("auto",) and name not in request.backends:
        return [f"not asked for ({request.source}={','.join(request.backends)})"]
    if hypothetical is None and (missing := probe(name).missing) is not None:
        return [missing]
    if backend.device_type != facts["device_type"]:
        return [f"tensors are on {facts['device_type']}, {name} computes on {backend.device_type}"]
    return []


def _facts_line(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_plain(value)}" for name, value in facts.items() if value is not None)


# -- reporting ---------------------------------------------------------------------------------------------------------

_reported: set[tuple[str, str]] = set()


def _report(selection: Selection) -> None:
    if selection.hypothetical is not None or selection.chosen is None:
        return
    mode = _flags.current().log
    once = (selection.operator, selection.chosen.id)
    if mode == "trace":
        logger.info("%s", selection)
    elif mode == "once" and once not in _reported:
        _reported.add(once)
        on_accelerator = selection.facts["device_type"] != "cpu" and selection.chosen.portable
        logger.log(logging.WARNING if on_accelerator else logging.INFO, "%s", selection if on_accelerator else selection.title)


def choices_of(selections: Iterable[Selection]) -> dict[tuple[str, str], str]:
    """(operator, facts) -> the implementation that was chosen for them."""
    return {(each.operator, _facts_line(each.facts)): each.chosen.id for each in selections if each.chosen is not None}


def choices_digest(selections: Iterable[Selection]) -> str:
    """A digest of choices (operator, facts, implementation), whatever their order."""
    return hashlib.sha256(repr(sorted(choices_of(selections).items())).encode()).hexdigest()[:16]


def check_ranks_agree(selections: Iterable[Selection], group: Any = None) -> None:
    """Compares the choices of one model over all ranks of a process group and stops every rank when they differ.

    Args:
        selections: of the model; what else a process has chosen, for another model or on its own, is nobody's concern.
        group: a torch.distributed group; None is the default group. Does nothing when torch.distributed is not initialised.

    Raises:
        RankMismatchError: on every rank, naming the first operator whose choice differs.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    selections = list(selections)
    world = distributed.get_world_size(group)
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, (choices_digest(selections), choices_of(selections)), group=group)
    if len({digest for digest, _ in everyone}) == 1:
        return
    keys = sorted({key for _, choices in everyone for key in choices})
    for key in keys:
        picked = [choices.get(key, "nothing") for _, choices in everyone]
        if len(set(picked)) > 1:
            rows = "\n".join(f"  rank {rank}: {name}" for rank, name in enumerate(picked))
            raise RankMismatchError(
                f"ranks chose differently for {key[0]} ({key[1]})\n{rows}\n"
                "  Give every rank the same GLM5_PORT_* environment and the same installed packages."
            )
