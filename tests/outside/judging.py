"""What the outside judges share. A judge runs in the project's environment (`python -m tests.outside.<name>_judge`) and compares
what this library computes with what a player, a script in an environment of its own, makes of the same files.

Not part of any test run: `make test-llama-cpp` and `make test-kt-kernel` make the environments and call them. Exit codes: 0 the
judge agrees, 1 it does not, 3 NOT RUN (what it needs is not here), never 0 without having looked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant.packing import unpack_int4

ROOT = Path(__file__).resolve().parents[2]
TINY_CODE = ROOT / "models" / "glm5-tiny-code"
AGREES, DISAGREES, NOT_RUN = 0, 1, 3
SHOWN = 3000
"""Characters of a player's complaint that are shown."""


class NotRun(Exception):
    """What a judge needs is not here."""


class Verdict:
    """The findings of a judge, printed as they come."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def note(self, text: str) -> None:
        """A line that judges nothing."""
        print(text, flush=True)

    def check(self, agrees: bool, text: str) -> None:
        """A line that says what was compared, with its figures and limits."""
        print(f"  {'agrees  ' if agrees else 'DIFFERS '} {text}", flush=True)
        if not agrees:
            self.wrong.append(text)


def main(name: str, judge: Callable[[Verdict, Path], None]) -> int:
    """Runs a judge in a temporary directory; its exit code."""
    verdict = Verdict()
    try:
        with tempfile.TemporaryDirectory() as directory:
            judge(verdict, Path(directory))
    except NotRun as reason:
        print(f"NOT RUN: {name}: {reason}", file=sys.stderr)
        return NOT_RUN
    print(f"{name}: {'agrees' if not verdict.wrong else f'DIFFERS in {len(verdict.wrong)} points'}")
    return DISAGREES if verdict.wrong else AGREES


def play(environment: str, player: str, *arguments: str, flags: Mapping[str, str] | None = None) -> str:
    """Runs a player in its environment; what it wrote to stdout.

    Raises:
        NotRun: the environment is not there.
        RuntimeError: the player failed; with what it said.
    """
    python = ROOT / environment / "bin" / "python"
    if not (python.parent.parent / ".ready").exists():
        raise NotRun(f"there is no {environment}: make test-{environment.removeprefix('.venv-')}")
    command = [str(python), str(Path(__file__).with_name(player)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(flags or {})}, check=False)
    if done.returncode:
        raise RuntimeError(f"{player} ended with {done.returncode}\n{(done.stdout + done.stderr)[-SHOWN:]}")
    return done.stdout


def write_random(directory: Path, fields: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A random bf16 checkpoint, with an MTP layer where the fields of its config.json announce one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**fields, "dtype": "bfloat16"}))
    config = Glm5Config.from_json(directory)
    mtp = config.mtp_layer is not None
    read = random_weights(config, dtype=torch.bfloat16, seed=seed, mtp=mtp)
    save_file({name: read(name) for name in expected_tensors(config, mtp=mtp)}, directory / "model.safetensors")
    return directory


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def decoded_model(canonical: Path) -> Glm5Model:
    """This library's model in float32 with every INT4 weight multiplied out beforehand as code x scale, not rounded to bfloat16:
    the numbers that a GGUF file stands for."""
    stored, config = read_all(canonical), Glm5Config.from_json(canonical)

    def read(name: str) -> Tensor:
        if name in stored:
            return stored[name].float()
        codes, scales = unpack_int4(stored[f"{name}_packed"]), stored[f"{name}_scale"].float()
        return (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)

    return build(dataclasses.replace(config, int4=None), read, backend="cpu", dtype="float32")
