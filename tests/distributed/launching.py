"""Runs functions on the ranks of a gloo group: one interpreter that imports torch once and forks, so that a group costs little.

    results = on_ranks(4, "tests.distributed.scenes:layouts", tmp_path)      # result of each rank, in order

As a program (`python -m tests.distributed.launching WORLD MODULE:FUNCTION FOLDER`) it is that interpreter. A rank that raises
hands back its exception as text.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from glm5_port import flags

LIMIT = 240
"""Seconds after which a launch is given up."""


def on_ranks(world: int, function: str, folder: Path, **environment: str) -> list[Any]:
    """The pickled results of `function(rank, world)` on every rank.

    Raises:
        AssertionError: a rank raised, or did not end in time.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(flags.PREFIX)}
    clean |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tests.distributed.launching", str(world), function, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=LIMIT, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(world)]
    failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(results) if text]
    assert not failed, "\n".join(failed)
    return [result for _, result in results]


def _rank(rank: int, world: int, function: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    module, name = function.split(":")
    text, result = "", None
    try:
        result = getattr(importlib.import_module(module), name)(rank, world)
        dist.barrier()
    except BaseException:
        text = traceback.format_exc()
    (folder / f"rank{rank}").write_bytes(pickle.dumps((text, result)))
    if not text:
        dist.destroy_process_group()


if __name__ == "__main__":
    importlib.import_module(sys.argv[2].split(":")[0])  # once, before the ranks are forked
    context = multiprocessing.get_context("fork")
    arguments = (int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(arguments[0])]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
