"""Ranks that would run different implementations stop while the model is built, before a weight is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from glm5_port import flags
from glm5_port.operators import gated_mlp

RANKS = """
import json, os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import glm5_port
from glm5_port.model.build import build, random_weights
from tests.model.models import quick_config

def rank(number, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=number, world_size=2)
    config, told = quick_config(), []
    weights = random_weights(config, dtype=torch.float32)
    if number == 1:  # has another model beside, which is its own affair
        os.environ["GLM5_PORT_OP_GATED_MLP"] = "torch/eager"
        glm5_port.flags.reset()
        glm5_port.operators.gated_mlp.select(device_type="cpu", dtype=torch.float32, width=64, width_between=128)
        del os.environ["GLM5_PORT_OP_GATED_MLP"]
        glm5_port.flags.reset()
    for pin in (None, "reference"):
        if pin and number == 1:
            os.environ["GLM5_PORT_OP_GATED_MLP"] = pin
            glm5_port.flags.reset()
        read = []
        try:
            model = build(config, lambda name: (read.append(name), weights(name))[1])
            told.append(["built", len(read), model(torch.zeros(1, 3, dtype=torch.int64)).shape[-1]])
        except glm5_port.errors.RankMismatchError as error:
            told.append([str(error), len(read), 0])
    queue.put((number, told))
    dist.destroy_process_group()

context = mp.get_context("fork")
queue = context.Queue()
ranks = [context.Process(target=rank, args=(number, sys.argv[1], queue), daemon=True) for number in range(2)]
[process.start() for process in ranks]
results = dict(queue.get(timeout=60) for _ in ranks)
[process.join(60) for process in ranks]
print(json.dumps([results[0], results[1]]))
"""


def test_ranks_with_different_pins_stop(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(flags.PREFIX)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    facts = {"device_type": "cpu", "dtype": torch.float32, "width": 64, "width_between": 128}
    own = gated_mlp.select(**facts).chosen.id  # of this machine's instruction set
    for same, different in json.loads(done.stdout):
        assert same[0] == "built", "ranks that agree build the model"
        assert same[1] > 100
        assert same[2] == 40
        text, read, _ = different
        assert text.startswith("ranks chose differently for gated_mlp (device_type=cpu, dtype=float32")
        assert f"rank 0: {own}\n  rank 1: reference" in text
        assert read == 0, "no weight was read"
