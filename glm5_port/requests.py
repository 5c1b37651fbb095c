"""What is asked for: backends on this machine, and the request that holds for an operator or a model.

Request order: `backend=` argument, `use_backend(...)` context, `GLM5_PORT_OP_<OPERATOR>`, `GLM5_PORT_BACKEND`, else auto.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm5_port import flags as _flags
from glm5_port.errors import FlagError, SelectionError, did_you_mean
from glm5_port.plugins import load_plugins
from glm5_port.registry import BACKENDS, PORTABLE, REFERENCE, Backend, Probe

if TYPE_CHECKING:
    from glm5_port.dispatch import Operator

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


# -- backends ----------------------------------------------------------------------------------------------------------


@functools.cache
def probe(name: str) -> Probe:
    """What backend `name` found on this machine. Probed once per process."""
    return backend_named(name, "backend").probe()


def backend_named(name: str, source: str) -> Backend:
    """The backend of this name; FlagError, naming `source`, when there is none."""
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


def child_environment() -> dict[str, str]:
    """The `GLM5_PORT_*` variables for a child process or another rank, so that it decides as this one does: every flag that was
    given, and `GLM5_PORT_BACKEND` set to the one backend that was resolved here."""
    flags = _flags.current()
    given = {name: value for name, value in flags.environment().items() if name in flags.given}
    return given | {_flags.BACKEND.name: resolve_backend().name}


# -- requests ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Requests a backend for everything that is built or bound inside the context. A model that is built already keeps
    its bindings and raises when it is called inside a context that asks for something else; use `model.rebind`."""
    for name in _split(backend):
        if name != "auto":
            backend_named(name, "use_backend")
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
            backend_named(name, source)
    if "auto" in names and len(names) > 1:
        raise FlagError(f"{source}={value}: auto stands alone; give either auto or a list of names")
    return Request(names, None, source, overridden)
