"""Backends that other packages bring, found by entry point.

A plugin is a function under the entry-point group `glm5_port.backends` that calls `register_backend` and `Operator.implement`;
one that fails to import becomes a visible backend whose probe gives the failure. See docs/adding-a-backend.md.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING

from glm5_port import flags
from glm5_port.errors import FlagError, did_you_mean
from glm5_port.registry import BACKENDS, OPERATORS, Backend, Probe

if TYPE_CHECKING:
    from glm5_port.dispatch import Operator

ENTRY_POINT_GROUP = "glm5_port.backends"
PLUGIN_ORDER = 50
"""Plugins are tried by `auto` after the built-in accelerators and before cpu unless they say otherwise."""


@functools.cache
def load_plugins() -> None:
    """Runs, once, the entry points that `GLM5_PORT_PLUGINS` admits. A failure is recorded as a backend, never raised."""
    wanted = flags.current().plugins
    if wanted == "none":
        return
    found = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    names = list(found) if wanted == "all" else [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in found:
            raise FlagError(
                f"{flags.PLUGINS.name}={wanted}: plugin {name} is not installed{did_you_mean(name, found)}\n"
                f"  installed: {', '.join(found) or 'none'}"
            )
        before = set(BACKENDS), {operator: set(operator.implementations) for operator in OPERATORS.values()}
        try:
            found[name].load()()
        except Exception as error:  # a broken plugin is a row in doctor, not a crash of everyone else
            _take_back(*before)
            failure = f"plugin {name} ({found[name].value}) failed to load: {type(error).__name__}: {error}"
            row = name if name not in BACKENDS else f"{name} (plugin)"
            BACKENDS[row] = Backend(
                name=row,
                title="plugin that failed to load",
                device_type=name,
                package=None,
                collective="none",
                order=PLUGIN_ORDER,
                probe=lambda failure=failure: Probe(failure),  # type: ignore[misc]
                origin=f"plugin {found[name].value}",
            )


def _take_back(backends: set[str], implementations: dict[Operator, set[str]]) -> None:
    """Removes what a plugin registered before it failed: half a plugin must not compute."""
    for name in set(BACKENDS) - backends:
        del BACKENDS[name]
    for operator, known in implementations.items():
        for name in set(operator.implementations) - known:
            del operator.implementations[name]
