"""Numbers with units: "200 GB/s", "25 us", "989 TFLOPS". A number without its unit is refused, never guessed."""

from __future__ import annotations

import re

from glm5_port.errors import HardwareError

_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {f"{letter}iB": 1024.0**power for power, letter in enumerate("KMGT", start=1)}
_BYTES = {f"{prefix}B": value for prefix, value in _PREFIXES.items()} | _BINARY
KINDS: dict[str, dict[str, float]] = {
    "size": _BYTES,
    "bandwidth": {f"{unit}/s": value for unit, value in _BYTES.items()}
    | {f"{prefix}b/s": value / 8 for prefix, value in _PREFIXES.items()},
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "rate": {f"{prefix}{name}": value for prefix, value in _PREFIXES.items() for name in ("FLOPS", "OPS")},
}
"""Kind of quantity -> unit -> factor to bytes, bytes a second, seconds, operations a second. B is a byte, b a bit."""
_EXAMPLES = {"size": "64 GB", "bandwidth": "200 GB/s", "time": "10 us", "rate": "989 TFLOPS"}


def parse_quantity(text: str, kind: str) -> float:
    """The number that a text names, in the base unit of its kind.

    Args:
        text: a positive number and a unit.
        kind: "size" (bytes), "bandwidth" (bytes a second), "time" (seconds) or "rate" (operations a second).

    Raises:
        HardwareError: no number, no unit, a unit of another kind, or nothing above zero.
    """
    units = KINDS[kind]
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    if found is None:
        raise HardwareError(f"{text!r} is no {kind}; expected a number and a unit, for example {_EXAMPLES[kind]!r}")
    if not found[2]:
        raise HardwareError(f"{text!r} has no unit; expected one of a {kind}, for example {_EXAMPLES[kind]!r}")
    if found[2] not in units:
        raise HardwareError(f"{found[2]!r} is no unit of a {kind}; known are {', '.join(units)}")
    value = float(found[1]) * units[found[2]]
    if value <= 0:
        raise HardwareError(f"{text!r} is not above zero")
    return value


def show_seconds(seconds: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}" if seconds / factor < 1000 else f"{seconds / factor:,.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def show_bandwidth(bytes_per_second: float) -> str:
    """Bytes a second in the largest decimal unit that leaves at least 1."""
    for unit, factor in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= factor:
            return f"{bytes_per_second / factor:.3g} {unit}"
    return f"{bytes_per_second:.3g} B/s"
