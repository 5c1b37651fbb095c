"""Two ranks share a model over the stand-in collective: experts, attention heads, and both exchanges of tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LIMIT = 240
"""Seconds after which the ranks are given up."""
ROUNDING = {"DP2 EP2 flat": 0.05, "DP2 EP2 gather": 0.05, "TP2 EP2": 0.3}
"""Relative error of logits; another text's differ by more than 1. Where heads are shared, sums are rounded in another order, and
the indexer and the router decide near-ties otherwise."""


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    commands = [[sys.executable, "-m", "tests.npu_runtime.ranks", str(rank), "2", str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ) for c in commands]
    try:
        said = [rank.communicate(timeout=LIMIT)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["backend"] == "hccl"
        assert set(found["layouts"]) == set(ROUNDING)
        for name, layout in found["layouts"].items():
            assert layout["error"] < ROUNDING[name], f"{name} on rank {rank}: {layout['error']}"
            assert layout["equal"] > 0.9, f"{name} on rank {rank}"
            assert not layout["refused"], name
            assert {"aclnnMlaPrologV3WeightNz", "aclnnSparseFlashAttention"} <= set(layout["kernels"]), name
            assert any(kernel.startswith("aclnnGroupedMatmul") for kernel in layout["kernels"]), name
