"""Where the committed glm5-tiny-code lies, and held-out text to try it on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.train_tiny_code import corpus

CHECKPOINT = Path(__file__).parents[1] / "models" / "glm5-tiny-code"
SAMPLE = ("posixpath.py", "hmac.py")
"""Files of the standard library that no training saw; every supported Python has them."""


def held_out_windows(*, context: int = 512, bytes_per_file: int = 1024) -> list[Tensor]:
    """The beginnings of `SAMPLE` in windows of `context` + 1 tokens."""
    text = corpus.standard_library(only=SAMPLE)
    assert sorted(text.held_out) == sorted(SAMPLE) and not text.train
    return list(corpus.windows({name: content[:bytes_per_file] for name, content in text.held_out.items()}, context=context))


def held_out_prompt(length: int, *, skip: int = 600) -> Tensor:
    """[1, length] consecutive bytes of the first file."""
    content = corpus.standard_library(only=SAMPLE[:1]).held_out[SAMPLE[0]][skip : skip + length]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()[None]
