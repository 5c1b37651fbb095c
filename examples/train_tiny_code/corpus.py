"""The text of glm5-tiny-code: Python's own standard library as bytes, with whole files held out for measurement.

Token 0..255 is a byte, 256 pads, 257 ends a file (and stands before its first byte).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PAD, END = 256, 257
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "__pycache__"}
)
"""Folders that are left out: tests and their data, bundled programs and wheels, and whatever else was installed."""
SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})
"""Half a megabyte of documentation in one literal."""
HELD_OUT_SHARE = 24
"""One file in so many is held out."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one standard library.

    Attributes:
        train, held_out: file by relative path -> its bytes.
    """

    train: dict[str, bytes]
    held_out: dict[str, bytes]

    @property
    def digest(self) -> str:
        """sha256 over all names and contents: tells whether two runs saw the same text."""
        digest = hashlib.sha256()
        for name, content in sorted({**self.train, **self.held_out}.items()):
            digest.update(name.encode() + b"\0" + content + b"\0")
        return digest.hexdigest()


def is_held_out(name: str) -> bool:
    """Decided by the relative path alone, so that a file of that name is held out whatever the Python version."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def standard_library(only: Collection[str] | None = None) -> Corpus:
    """Reads every .py file of this interpreter's standard library but empty ones and those under `SKIPPED`; or `only` those."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")) if only is None else sorted(only)
    wanted = [name for name in names if not SKIPPED & set(name.split("/")) and name not in SKIPPED_FILES]
    files = {name: content for name in wanted if (content := (root / name).read_bytes())}
    return Corpus(
        {name: content for name, content in files.items() if not is_held_out(name)},
        {name: content for name, content in files.items() if is_held_out(name)},
    )


def token_stream(files: dict[str, bytes]) -> Tensor:
    """All files in order of their names, an `END` before each and after the last."""
    parts = [torch.tensor([END])]
    for _, content in sorted(files.items()):
        parts += [torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), torch.tensor([END])]
    return torch.cat(parts)


def batch(stream: Tensor, *, rows: int, width: int, seed: int, step: int) -> Tensor:
    """Windows [rows, width] at random places that depend on `seed` and `step` only, so that a resumed run sees the same text."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - width + 1, (rows, 1), generator=generator)
    return stream[starts + torch.arange(width)]


def windows(files: dict[str, bytes], *, context: int) -> Iterator[Tensor]:
    """Every file in windows of at most `context` + 1 tokens: the last `context` are predicted, each exactly once. A window starts
    with `END` or the byte before, so what is measured never sees more than `context` earlier tokens."""
    for _, content in sorted(files.items()):
        tokens = torch.cat([torch.tensor([END]), torch.frombuffer(bytearray(content), dtype=torch.uint8).long()])
        for first in range(0, len(tokens) - 1, context):
            yield tokens[first : first + context + 1]
