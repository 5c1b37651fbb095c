"""Descriptions in YAML, read strictly: every key is known, every error names file and line.

Scalars stay text until somebody asks for a kind, so that YAML's guesses ("no" is false, "1e9" is text) decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from glm5_port.errors import HardwareError, did_you_mean
from glm5_port.parallel.quantities import parse_quantity

if TYPE_CHECKING:
    import yaml


class Description:
    """One mapping of a YAML file.

    Take the known keys out with `text`, `integer`, `quantity`, `part`, ...; then `finish()` refuses what is left.
    """

    def __init__(self, path: Path, node: yaml.Node, what: str) -> None:
        import yaml

        self.path, self.what, self._node = path, what, node
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, f"{what} must be a mapping of keys to values")
        self._left: dict[str, Any] = {}
        self._known: list[str] = []
        for key, value in node.value:
            if key.value in self._left:
                self._refuse(key, f"{what} has {key.value!r} twice")
            self._left[key.value] = value
        self._lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}

    @classmethod
    def read(cls, path: str | PathLike[str], what: str) -> Description:
        """The mapping that a file holds.

        Raises:
            HardwareError: the file cannot be read or is no YAML.
        """
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HardwareError(f"{path} cannot be read: {error}") from error
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise HardwareError(f"{path} is no YAML: {error}") from error
        if node is None:
            raise HardwareError(f"{path} is empty; expected {what}")
        return cls(Path(path), node, what)

    def has(self, key: str) -> bool:
        """Whether a key is there and not taken yet."""
        self._known.append(key)
        return key in self._left

    def text(self, key: str) -> str:
        """A value as text."""
        return str(self._scalar(key).value)

    def choice(self, key: str, known: Iterable[str]) -> str:
        """A value that must be one of `known`."""
        names = list(known)
        node = self._scalar(key)
        if node.value not in names:
            self._refuse(node, f"{key} = {node.value!r}{did_you_mean(node.value, names)}; known are {', '.join(names)}")
        return str(node.value)

    def choices(self, key: str, known: Iterable[str]) -> tuple[str, ...]:
        """A list of values, each one of `known`."""
        import yaml

        node, names = self._take(key), list(known)
        if not isinstance(node, yaml.SequenceNode):
            self._refuse(node, f"{key} must be a list")
        for item in node.value:
            if item.value not in names:
                text = str(item.value)
                self._refuse(item, f"{key} holds {text!r}{did_you_mean(text, names)}; known are {', '.join(names)}")
        return tuple(str(item.value) for item in node.value)

    def integer(self, key: str, or_else: str | None = None) -> int:
        """A value that is a positive integer; 0 for the word `or_else`."""
        node = self._scalar(key)
        if or_else is not None and node.value == or_else:
            return 0
        if not node.value.isdigit() or int(node.value) < 1:
            self._refuse(node, f"{key} = {node.value!r} is no positive integer")
        return int(node.value)

    def fraction(self, key: str) -> float:
        """A value above 0 and at most 1."""
        node = self._scalar(key)
        try:
            value = float(node.value)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            self._refuse(node, f"{key} = {node.value!r} is no share above 0 and at most 1")
        return value

    def quantity(self, key: str, kind: str) -> float:
        """A value with a unit, in the base unit of its kind."""
        node = self._scalar(key)
        try:
            return parse_quantity(node.value, kind)
        except HardwareError as error:
            self._refuse(node, f"{key}: {error}")

    def part(self, key: str) -> Description:
        """A mapping inside this one."""
        return Description(self.path, self._take(key), f"{self.what}: {key}")

    def parts(self, key: str) -> list[Description]:
        """A list of mappings inside this one."""
        import yaml

        node = self._take(key)
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self._refuse(node, f"{key} must be a list of mappings")
        return [Description(self.path, item, f"{self.what}: {key} {place + 1}") for place, item in enumerate(node.value)]

    def left(self) -> list[str]:
        """Keys that were not taken yet."""
        return list(self._left)

    def finish(self) -> None:
        """Refuses keys that nobody took."""
        for key in self._left:
            self.refuse(
                key, f"{self.what} has no key {key!r}{did_you_mean(key, self._known)}; known are {', '.join(self._known)}"
            )

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raises an error at the line of a key.

        Raises:
            HardwareError: always.
        """
        raise HardwareError(f"{self.path}, line {self._lines.get(key, self._node.start_mark.line + 1)}: {problem}")

    def _take(self, key: str) -> Any:
        self._known.append(key)
        if key not in self._left:
            self.refuse("", f"{self.what} lacks {key!r}")
        return self._left.pop(key)

    def _scalar(self, key: str) -> Any:
        import yaml

        node = self._take(key)
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            self._refuse(node, f"{key} must be a single value")
        return node

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise HardwareError(f"{self.path}, line {node.start_mark.line + 1}: {problem}")
