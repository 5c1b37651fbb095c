"""The journal of an export: one line for each shard that is finished, so that a run that was killed goes on where it was.

The first line says what is being exported. A line is appended after its shard has been written, synced and renamed; a shard
without a line is written again, a line that was cut short is not believed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from glm5_port.errors import ExportError
from glm5_port.quant.files import sync_directory

JOURNAL = "int4_export.journal"


class Journal:
    """An open journal. Nobody else can open it at the same time.

    Attributes:
        finished: shard file -> what was recorded about it.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Opens the journal in `directory`, or begins one.

        Args:
            directory: of the output.
            identity: what is being exported, in every detail that decides on the bytes.

        Raises:
            ExportError: another export was begun here, or is running now.
        """
        self.path = directory / JOURNAL
        self.finished: dict[str, dict[str, Any]] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ExportError(f"another export is writing to {directory}: wait for it, or choose another destination") from error
        try:
            self._read(identity)
        except ExportError:
            os.close(self._file)
            raise

    def record(self, shard: str, entry: Mapping[str, Any]) -> None:
        """Records that a shard is finished."""
        self.finished[shard] = dict(entry)
        self._append({"shard": shard, **entry})

    def forget(self, shard: str) -> None:
        """Takes a shard for unfinished: it will be written, and recorded, again."""
        del self.finished[shard]

    def remove(self) -> None:
        """Removes the journal: the export is complete."""
        self.path.unlink()
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Lets others open it."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))
        lines = self.path.read_bytes().split(b"\n")
        whole = [entry for entry in takewhile(lambda entry: entry is not None, map(_entry, lines[:-1])) if entry]
        os.ftruncate(self._file, sum(len(line) + 1 for line in lines[: len(whole)]))
        if not whole:
            self._append({"export": identity})
            sync_directory(self.path.parent)
            return
        if whole[0].get("export") != identity:
            raise ExportError(
                f"{self.path.parent} holds an unfinished export of something else: "
                f"{_difference(whole[0].get('export'), identity)}\n"
                "  Give the same source and options to go on with it, choose another destination, or remove that directory"
            )
        for entry in whole[1:]:
            self.finished[entry.pop("shard")] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        line = f"{digest} {text}\n".encode()
        done = 0
        while done < len(line):
            done += os.write(self._file, line[done:])
        os.fsync(self._file)


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None when the line is not whole."""
    digest, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != digest:
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def _difference(begun: Any, asked: Mapping[str, Any]) -> str:
    """The first thing that is not the same."""
    if isinstance(begun, dict):
        for key in asked:
            if begun.get(key) != asked[key]:
                values = f" ({begun.get(key)!r}, now {asked[key]!r})"
                return f"its {key} differs" + (values if len(values) < 200 else "")
    return "its journal cannot be read"
