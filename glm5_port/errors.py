"""The errors a user meets. Each says what was asked, what arrived, what is supported and what to do.

Every class derives from `Glm5PortError`, so that a caller (and the command line, which turns them into exit code 2)
can tell "you asked for something that cannot be done" from a defect in this library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Glm5PortError(Exception):
    """Base of every error that glm5_port raises on purpose."""


class FlagError(Glm5PortError, ValueError):
    """An environment flag is unknown or holds a value outside its grammar."""


class SelectionError(Glm5PortError, RuntimeError):
    """No implementation (or no backend) satisfies the request. The text is the whole decision record."""


class GradientError(Glm5PortError, RuntimeError):
    """A binding made for inference was called with tensors that need a gradient."""


class InputError(Glm5PortError, ValueError):
    """Tensors or arguments that do not fit an operator's contract."""


class ConfigError(Glm5PortError, ValueError):
    """A config.json that is not this architecture, or that contradicts itself."""


class CheckpointError(Glm5PortError, ValueError):
    """A checkpoint whose files or tensors are missing, unexpected, truncated or of the wrong shape or dtype."""


class ExportError(Glm5PortError, RuntimeError):
    """An export that cannot begin or go on: its place holds something else, cannot be written, or is full."""


class ParityError(Glm5PortError, RuntimeError):
    """A parity record that cannot be read, or that does not belong to these cases."""


class HardwareError(Glm5PortError, ValueError):
    """A description of a chip or a topology that cannot be read, lacks a figure, or contradicts itself."""


class PlanError(Glm5PortError, ValueError):
    """A parallel plan that cannot be: every reason, and the nearest change that would make it possible."""


class RankMismatchError(Glm5PortError, RuntimeError):
    """Ranks of one process group differ in what they chose, were given or computed."""


class RankLostError(Glm5PortError, RuntimeError):
    """Another rank of the process group stopped, or did not answer in time."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the nearest known name, or an empty string when nothing is near."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f"; did you mean {by_lower_case[near[0]]}?" if near else ""
