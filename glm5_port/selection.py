"""How an implementation is chosen, and the record of the choice.

Request order: `backend=` argument, `use_backend(...)` context, `GLM5_PORT_OP_<OPERATOR>`, `GLM5_PORT_BACKEND`, else auto.
Within a backend: its own implementations by rank, then the portable ones on the same device. `reference` runs only when
asked for by name. Tensors never change device to find a kernel, and an exception from a chosen implementation is never
caught to try another. The record (`Selection`) is the log line, the error text, the output of `explain`, the skip reason in
tests and the row in the README table.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glm5_port import flags as _flags
from glm5_port.backends import load_plugins
from glm5_port.errors import FlagError, RankMismatchError, SelectionError, did_you_mean
from glm5_port.registry import BACKENDS, PORTABLE, REFERENCE, Backend, Implementation, Operator, Probe

logger = logging.getLogger("glm5_port")

_context_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("glm5_port_backend", default=None)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, and by whom.

    Attributes:
        backends: names in order, or ("auto",).
        pin: an implementation's id, variant or "reference", when one operator is pinned; else None.
        source: "backend= argument", "use_backend context", a flag's name, or "default".
        overridden: lower-priority requests that this one beats, as "FLAG=value", so that none is ignored silently.
    """

    backends: tuple[str, ...]
    pin: str | None
    source: str
    overridden: tuple[str, ...] = ()

    def __str__(self) -> str:
        asked = f"asked for {self.pin or ','.join(self.backends)} ({self.source})"
        return asked + (f"; overrides {', '.join(self.overridden)}" if self.overridden else "")


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


# -- backends ----------------------------------------------------------------------------------------------------------


@functools.cache
def probe(name: str) -> Probe:
    """What backend `name` found on this machine. Probed once per process."""
    return _backend(name, "backend").probe()


def _backend(name: str, source: str) -> Backend:
    load_plugins()
    if name in BACKENDS:
        return BACKENDS[name]
    if name in (PORTABLE, REFERENCE):
        hint = f"{name!r} is not a chip: pin an operator with {_flags.OPERATOR.name}={name}, or name the chip it should run on"
    else:
        hint = f"no such backend{did_you_mean(name, BACKENDS)}"
    raise FlagError(f"{source}={name}: {hint}\n  supported: auto, {', '.join(BACKENDS)}")


def search_order() -> list[Backend]:
    """Every backend in the order in which `auto` tries them."""
    load_plugins()
    return sorted(BACKENDS.values(), key=lambda backend: backend.order)


def usable_backends() -> list[Backend]:
    """The backends that can run on this machine, in the order of `auto`."""
    return [backend for backend in search_order() if probe(backend.name).missing is None]


def resolve_backend(backend: str | None = None) -> Backend:
    """The one backend a model is put on: the first usable one of the request.

    Args:
        backend: "auto", a name, or names separated by commas; None follows the request order.

    Raises:
        SelectionError: none of the requested backends is usable; lists each reason and what is usable here.
    """
    request = request_for(None, backend)
    if request.backends == ("auto",):
        return usable_backends()[0]
    reasons = []
    for name in request.backends:
        found = probe(name)
        if found.missing is None:
            return BACKENDS[name]
        reasons.append(f"  {name}: {found.missing}")
    usable = ", ".join(b.name for b in usable_backends())
    raise SelectionError(
        f"{request.source}={','.join(request.backends)}: no requested backend is usable on this machine\n"
        + "\n".join(reasons)
        + f"\n  usable here: {usable}\n  `glm5-port doctor` shows every backend."
    )


# -- requests ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Requests a backend for everything that is built or bound inside the context. A model that is built already keeps
    its bindings and raises when it is called inside a context that asks for something else; use `model.rebind`."""
    for name in _split(backend):
        if name != "auto":
            _backend(name, "use_backend")
    token = _context_backend.set(backend)
    try:
        yield
    finally:
        _context_backend.reset(token)


def requested_context() -> str | None:
    """The backend that the innermost `use_backend` asks for, or None."""
    return _context_backend.get()


def request_token() -> tuple[Any, ...]:
    """Changes whenever a memoised choice could change: the context and the flags of the process."""
    return (_context_backend.get(), _flags.generation())


def _split(value: str) -> tuple[str, ...]:
    return tuple(part for part in (p.strip() for p in value.split(",")) if part)


def request_for(operator: Operator | None, backend: str | None) -> Request:
    """The request that holds for an operator (or, with None, for the place of a model)."""
    flags = _flags.current()
    wishes: list[tuple[str, str, bool]] = []  # (source, value, is a pin), strongest first
    if backend is not None:
        wishes.append(("backend", backend, False))
    if (context := _context_backend.get()) is not None:
        wishes.append(("use_backend", context, False))
    if operator is not None and operator.name in flags.pins:
        wishes.append((_flags.OPERATOR_PREFIX + operator.name.upper(), flags.pins[operator.name], True))
    if _flags.BACKEND.name in flags.given:
        wishes.append((_flags.BACKEND.name, flags.backend, False))
    if not wishes:
        return Request(("auto",), None, "default")
    source, value, is_pin = wishes[0]
    overridden = tuple(f"{s}={v}" for s, v, _ in wishes[1:] if v != value)
    if is_pin:
        return Request(("auto",), value, source, overridden)
    names = _split(value) or ("auto",)
    for name in names:
        if name != "auto":
            _backend(name, source)
    if "auto" in names and len(names) > 1:
        raise FlagError(f"{source}={value}: auto stands alone; give either auto or a list of names")
    return Request(names, None, source, overridden)


# -- selection ---------------------------------------------------------------------------------------------------------


def select(
    operator: Operator,
    facts: Mapping[str, Any],
    *,
    backend: str | None = None,
    as_backend: str | None = None,
    request: Request | None = None,
) -> Selection:
    """Chooses an implementation on static facts and returns the whole record.

    Args:
        operator: what to compute.
        facts: complete facts (`Operator.complete_facts`).
        backend: the strongest request; None follows the request order.
        as_backend: answers as if this backend were usable here (no probe, tensors on its device).
        request: a request made already, such as a rebinding; nothing else is read then.

    Raises:
        SelectionError: nothing fits; the text is the record. FlagError: a pin names nothing that exists.
    """
    selection = decide(operator, facts, backend=backend, as_backend=as_backend, request=request)
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
) -> Selection:
    """`select` without consequences: the record also when nothing fits (`chosen` is None), and nothing is logged."""
    load_plugins()
    if as_backend is not None:
        request = Request((as_backend,), None, "as")
        facts = {**facts, "device_type": _backend(as_backend, "as").device_type}
    request = request or request_for(operator, backend)
    candidates: list[Candidate] = []
    chosen: Implementation | None = None
    for implementation in _by_preference(operator, request, str(facts["device_type"])):
        reasons = _reasons(implementation, request, facts, hypothetical=as_backend)
        take = not reasons and chosen is None
        if take:
            chosen = implementation
        elif not reasons:
            reasons = [f"outranked by {chosen.id}" if chosen else "outranked"]
        candidates.append(Candidate(implementation.id, take, tuple(reasons)))
    return Selection(operator.name, dict(facts), request, chosen, tuple(candidates), as_backend)


def _by_preference(operator: Operator, request: Request, device_type: str) -> list[Implementation]:
    """Named backends in request order, then the other backends of this device, then the rest; portable and reference last."""
    names = request.backends if request.backends != ("auto",) else tuple(b.name for b in search_order())
    places = {name: place for place, name in enumerate(names)}

    def key(implementation: Implementation) -> tuple[Any, ...]:
        last = {PORTABLE: 1, REFERENCE: 2}.get(implementation.backend, 0)
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
        reasons += _backend_reasons(implementation, request, facts, hypothetical=hypothetical)
    if facts["needs_grad"] and not implementation.differentiable:
        reasons.append("forward only, and a gradient is asked for")
    return reasons + list(implementation.not_supported(**facts))


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
_choices: dict[tuple[str, str], str] = {}


def _report(selection: Selection) -> None:
    if selection.hypothetical is not None or selection.chosen is None:
        return
    _choices[(selection.operator, _facts_line(selection.facts))] = selection.chosen.id
    mode = _flags.current().log
    once = (selection.operator, selection.chosen.id)
    if mode == "trace":
        logger.info("%s", selection)
    elif mode == "once" and once not in _reported:
        _reported.add(once)
        on_accelerator = selection.facts["device_type"] != "cpu" and selection.chosen.portable
        logger.log(logging.WARNING if on_accelerator else logging.INFO, "%s", selection if on_accelerator else selection.title)


def choices_digest() -> str:
    """A digest of every choice this process has made (operator, facts, implementation)."""
    return hashlib.sha256(repr(sorted(_choices.items())).encode()).hexdigest()[:16]


def check_ranks_agree(group: Any = None) -> None:
    """Compares the choices of all ranks of a process group and stops every rank when they differ.

    Args:
        group: a torch.distributed group; None is the default group. Does nothing when torch.distributed is not initialised.

    Raises:
        RankMismatchError: on every rank, naming the first operator whose choice differs.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    world = distributed.get_world_size(group)
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, (choices_digest(), _choices), group=group)
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
