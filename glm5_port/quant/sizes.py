"""Bytes as people write them: "2GiB", "5GB", "512MiB"; and how they are shown."""

from __future__ import annotations

import re

from glm5_port.errors import InputError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes that a text names.

    Args:
        text: a number and a unit: GB and MB count thousands, GiB and MiB count 1024s; without a unit it is bytes.
        option: the name to complain about.

    Raises:
        InputError: no such size, or none above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1:
        raise InputError(f"{option} = {text!r} is no size\n  expected: a number with GiB, MiB, GB or MB, for example 2GiB")
    return size


def show_bytes(count: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1, as disks are sold: "407.7 GB"."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count} bytes"
