"""GLM-5 on any chip: a backend-agnostic operator registry, portable implementations, parity proofs.

    import glm5_port
    model = glm5_port.load("path/to/checkpoint")            # GLM5_PORT_BACKEND decides where
    tokens = model.generate([[1, 2, 3]], max_new_tokens=16)

Importing this package imports torch and numpy only, and no vendor package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glm5_port import backends as _backends
from glm5_port import operators as operators
from glm5_port.errors import Glm5PortError as Glm5PortError
from glm5_port.registry import BACKENDS as BACKENDS
from glm5_port.registry import OPERATORS as OPERATORS
from glm5_port.registry import Backend as Backend
from glm5_port.registry import Probe as Probe
from glm5_port.registry import register_backend as register_backend
from glm5_port.requests import use_backend as use_backend
from glm5_port.selection import Selection as Selection

if TYPE_CHECKING:
    from glm5_port.config import Glm5Config as Glm5Config
    from glm5_port.model.load import load as load
    from glm5_port.model.save import save_checkpoint as save_checkpoint

__version__ = "0.1.0"

_backends.load_built_in()

_LAZY = {"Glm5Config": "glm5_port.config", "load": "glm5_port.model.load", "save_checkpoint": "glm5_port.model.save"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'glm5_port' has no attribute {name!r}")
