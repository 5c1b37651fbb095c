"""Memory of the routed experts of one true-shape layer in INT4: when they are loaded, and at the most while they are.

    python -m benchmarks.cpu.loading [--experts 256] [--json]

The floor is what the bits need: 4 of a weight, and a bfloat16 scale for 32 of them. Experts arrive one by one in canonical form,
as from a checkpoint, and go into the layout of the native kernels; the caller keeps none. Linux only: sizes are of /proc.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.layer_memory import reset_peak, resident
from glm5_port.memory import zeros
from glm5_port.operators import expert_mlp_int4

WIDTH, BETWEEN, TOP_K, GROUP = 6144, 2048, 8, 32
EXPERT_BYTES = 3 * WIDTH * BETWEEN * 4 // 8 + 3 * WIDTH * BETWEEN // GROUP * 2


def expert(seed: int) -> dict[str, torch.Tensor]:
    """Random codes and scales of one expert, in memory such as a checkpoint is read into: every page is written."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, outputs, width in (("gate_up", 2 * BETWEEN, WIDTH), ("down", WIDTH, BETWEEN)):
        shape = outputs, width // 8
        parts[f"{name}_packed"] = zeros(*shape, dtype=torch.int32).random_(generator=generator)
        parts[f"{name}_scales"] = zeros(outputs, width // GROUP, dtype=torch.bfloat16).uniform_(generator=generator)
    return parts


def measure(experts: int) -> dict[str, float]:
    """Bytes above those of the process before."""
    bound = expert_mlp_int4.bind(
        backend="cpu", device_type="cpu", dtype=torch.bfloat16,
        width=WIDTH, width_between=BETWEEN, experts=experts, top_k=TOP_K, group_size=GROUP,
    )  # fmt: skip
    bound.implementation.prepare({**bound.selection.facts, "experts": 1}).add(0, expert(0))  # what a first call takes for good
    reset_peak()
    before, started = resident("VmRSS"), time.perf_counter()
    preparation = bound.prepare()
    for number in range(experts):
        preparation.add(number, expert(number))
    weights = preparation.finish()
    return {
        "experts": experts,
        "floor_bytes": experts * EXPERT_BYTES,
        "weight_bytes": sum(tensor.nbytes for tensor in weights.values() if isinstance(tensor, torch.Tensor)),
        "loaded_bytes": resident("VmRSS") - before,
        "peak_bytes": resident("VmHWM") - before,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = measure(arguments.experts)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{arguments.experts} experts of {WIDTH} x {BETWEEN} in INT4, groups of {GROUP}")
    for name in ("floor", "weight", "loaded", "peak"):
        count = report[f"{name}_bytes"]
        print(f"{name:8} {count / 1e9:8.3f} GB   {count / report['floor_bytes'] - 1:+7.2%}")


if __name__ == "__main__":
    main()
