"""How each device computes: one folder per chip, `torch/` for the portable implementations, plugins by entry point.

Importing this package registers every built-in backend and its implementations without importing any vendor package;
vendor packages are imported inside probes and kernels only. A plugin is a function under the entry-point group
`glm5_port.backends` that calls `register_backend` and `Operator.implement`; one that fails to import becomes a visible
backend whose probe gives the failure.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata

from glm5_port import flags
from glm5_port.errors import FlagError, did_you_mean
from glm5_port.registry import BACKENDS, OPERATORS, Backend, Operator, Probe, register_backend

BUILT_IN = ("cuda", "npu", "musa", "mlu", "gcu", "hygon", "metax", "kunlunxin", "iluvatar", "cpu")
"""Folders of this package that hold a chip, in the order in which `auto` tries them."""

ENTRY_POINT_GROUP = "glm5_port.backends"
PLUGIN_ORDER = 50
"""Plugins are tried by `auto` after the built-in accelerators and before cpu unless they say otherwise."""


def load_built_in() -> None:
    """Registers the built-in backends, then the implementations of each, then the portable ones."""
    for name in BUILT_IN:
        register_backend(importlib.import_module(f"glm5_port.backends.{name}").BACKEND)
    importlib.import_module("glm5_port.backends.torch")


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
