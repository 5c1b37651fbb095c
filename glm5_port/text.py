"""Text to token ids and back, through the tokenizer.json of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from glm5_port.errors import CheckpointError

TOKENIZER = "tokenizer.json"


class Text:
    """A checkpoint's tokenizer.

    Raises:
        CheckpointError: the directory has no tokenizer.json, or it cannot be read.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        from tokenizers import Tokenizer

        path = Path(directory) / TOKENIZER
        if not Path(directory).is_dir():
            raise CheckpointError(
                f"{directory}: no such directory; a checkpoint is a folder with config.json and safetensors files"
            )
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no {TOKENIZER}, so text cannot be turned into token ids\n"
                "  Give the prompt as ids instead: --ids 1,2,3"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a broken file
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Turns tokens that arrive one by one into text, holding back characters that are not complete yet."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._shown = ""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add."""
        self._ids += tokens
        whole = self._text.decode(self._ids)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        added, self._shown = whole[len(self._shown) :], whole
        return added


def write_byte_tokenizer(directory: str | PathLike[str], special: Sequence[str]) -> None:
    """Writes a tokenizer.json whose ids 0..255 are the bytes of UTF-8 text, followed by special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer: Any = Tokenizer(models.BPE(vocab={char: byte for byte, char in _byte_alphabet().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(Path(directory) / TOKENIZER))


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in that byte-level tokenizers use for each byte: itself where it is printable Latin-1, else a
    character from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
