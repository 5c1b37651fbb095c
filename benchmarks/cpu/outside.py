"""Peers that live in environments of their own, as contenders: a player process computes, this one waits.

The environments are those of the outside judges (`make test-kt-kernel`, `make test-llama-cpp`); a peer without one is named and
left out. A player gets experts and routings as files, reads the number of a routing from its standard input, computes, and
answers with a line; what it computed lies in a file that both map. It is stopped (SIGSTOP) between calls, because kt-kernel's
workers spin. A call costs some 0.1 ms more than inside a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PLAYERS = {"kt-kernel": (".venv-kt-kernel", "kt_kernel_player.py"), "ggml": (".venv-llama-cpp", "ggml_player.py")}
"""Peer -> environment, script beside this file."""


class Player:
    """One peer with its experts.

    Args:
        peer: "kt-kernel" or "ggml".
        parts: canonical tensors of the experts that differ, as `expert_mlp_int4` takes them, one expert each.
        count: experts; number n has the weights of number n % len(parts), at a place of its own.

    Raises:
        FileNotFoundError: its environment is not there.
        RuntimeError: the player ended; with what it said.
    """

    def __init__(self, peer: str, parts: Sequence[dict[str, Tensor]], count: int) -> None:
        environment, script = PLAYERS[peer]
        python = ROOT / environment / "bin" / "python"
        if not (ROOT / environment / ".ready").exists():
            raise FileNotFoundError(f"there is no {environment}: make test-{environment.removeprefix('.venv-')}")
        self._peer = peer
        directory = tempfile.TemporaryDirectory()
        self._place = Path(directory.name)
        save_file(
            {f"{n}.{name}": t.contiguous() for n, part in enumerate(parts) for name, t in part.items()}, self._place / "experts"
        )
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), self._place, str(count), str(torch.get_num_threads())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        weakref.finalize(self, _end, self._process, directory)  # a stopped process does not see that its input has ended
        self._to = cast(IO[str], self._process.stdin)
        self._from = cast(IO[str], self._process.stdout)
        self._stopped = False
        self._answer()

    def routings(self, hidden: Tensor, routings: Sequence[tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
        """Gives the player its inputs. Returns what asks it for one of them: [T, D] bfloat16."""
        tensors = {"hidden": hidden}
        for number, (weights, ids) in enumerate(routings):
            tensors |= {f"weights.{number}": weights.float().contiguous(), f"ids.{number}": ids.int().contiguous()}
        save_file(tensors, self._place / "inputs")
        (self._place / "output").write_bytes(bytes(2 * hidden.numel()))
        output = torch.from_file(str(self._place / "output"), shared=True, size=hidden.numel(), dtype=torch.bfloat16).view(
            hidden.shape
        )
        self._ask({"inputs": str(self._place / "inputs"), "output": str(self._place / "output")})

        def run(copy: int) -> Tensor:
            self._ask({"routing": copy})
            return output.clone()

        return run

    def _ask(self, request: dict[str, object]) -> None:
        if self._stopped:
            self._process.send_signal(signal.SIGCONT)
        self._to.write(json.dumps(request) + "\n")
        self._to.flush()
        self._answer()

    def _answer(self) -> None:
        while (line := self._from.readline()) and line != "done\n":
            print(f"{self._peer}: {line}", end="", file=sys.stderr)
        if not line:
            raise RuntimeError(f"{self._peer}: its player ended with {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        self._stopped = True


def _end(process: subprocess.Popen[str], directory: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    directory.cleanup()


def players(parts: Sequence[dict[str, Tensor]], count: int) -> dict[str, Player]:
    """Every peer whose environment is here; the others are named on stderr."""
    found: dict[str, Player] = {}
    for peer in PLAYERS:
        try:
            found[peer] = Player(peer, parts, count)
        except (FileNotFoundError, RuntimeError) as reason:
            print(f"not among the contenders: {peer}: {reason}", file=sys.stderr)
    return found
