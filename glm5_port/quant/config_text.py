"""Changes one entry of a config.json and leaves every other character as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from glm5_port.errors import ConfigError

KEY = "quantization_config"


def with_quantization(text: str, block: Mapping[str, Any]) -> str:
    """The text with `block` as its quantization_config: in place of the old one, or after the last entry.

    Raises:
        ConfigError: the text holds no JSON object.
    """
    return with_entry(text, KEY, block)


def with_entry(text: str, key: str, entry: Any) -> str:
    """The text with `entry` under a key: in place of the old one, or after the last.

    Raises:
        ConfigError: the text holds no JSON object.
    """
    start, entries = _entries(text)
    found = re.match(r"\s*?\n([ \t]+)", text[start:])
    step = found[1] if found else None
    value = json.dumps(entry, indent=step, ensure_ascii=False) if step else json.dumps(entry, ensure_ascii=False)
    value = value.replace("\n", f"\n{step}")
    if key in entries:
        _, first, last = entries[key]
        return text[:first] + value + text[last:]
    lead = f"\n{step}" if step else " " if entries else ""
    end = max((last for _, _, last in entries.values()), default=start)
    return text[:end] + ("," if entries else "") + f'{lead}"{key}": {value}' + text[end:]


def without_quantization(text: str) -> str:
    """The text without its quantization_config, to compare two configurations in everything else."""
    _, entries = _entries(text)
    if KEY not in entries:
        return text
    first, _, last = entries[KEY]
    before = text[:first].rstrip()
    after = text[last:]
    if before.endswith(","):
        return before[:-1] + after
    return text[:first] + after.lstrip().removeprefix(",").lstrip()


def _entries(text: str) -> tuple[int, dict[str, tuple[int, int, int]]]:
    """(the place after "{", key -> (its first character, the first of its value, the one after its value)) of an object."""
    decoder = json.JSONDecoder()
    entries: dict[str, tuple[int, int, int]] = {}
    try:
        start = place = _after(text, 0, "{")
        while text[_blank(text, place)] != "}":
            if entries:
                place = _after(text, place, ",")
            first = _blank(text, place)
            key, place = decoder.raw_decode(text, first)
            value = _blank(text, _after(text, place, ":"))
            _, place = decoder.raw_decode(text, value)
            entries[key] = (first, value, place)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"config.json holds no JSON object: {error}") from error
    return start, entries


def _blank(text: str, place: int) -> int:
    while text[place] in " \t\r\n":
        place += 1
    return place


def _after(text: str, place: int, mark: str) -> int:
    place = _blank(text, place)
    if text[place] != mark:
        raise ValueError(f"expected {mark!r} at character {place}")
    return place + 1
