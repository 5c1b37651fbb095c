"""What a call through the registry costs over a direct call of the same function.

    python benchmarks/dispatch_overhead.py [--json]

Floor: 0. Four ways to make the same call, timed alternately in one run, medians of rounds: the implementation called directly,
through a binding (what layers do), through the operator (selects by a memo), and through the opaque torch op (what traced graphs
run).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_port.dispatch import Bound
from glm5_port.operators import rms_norm
from glm5_port.requests import Request
from glm5_port.selection import Selection

ROUNDS, CALLS = 40, 2000


def do_nothing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Stands in for a kernel: what is left is the cost of the call."""
    return x


def bound_to(function: Callable[..., Any], facts: dict[str, Any]) -> Bound:
    """A binding of rms_norm whose implementation is `function`."""
    selection = rms_norm.select(**facts)
    bound = Bound(Selection(selection.operator, selection.facts, Request(("auto",), None, "benchmark"), selection.chosen, ()))
    bound.function = function
    return bound


def microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def measure() -> dict[str, float]:
    """Microseconds of each way to call, medians over rounds."""
    x, weight = torch.ones(1, 64), torch.ones(64)
    bound = bound_to(do_nothing, {"device_type": "cpu", "dtype": torch.float32, "width": 64})
    real = rms_norm.bind(device_type="cpu", dtype=torch.float32, width=64)
    ways: dict[str, Callable[[], Any]] = {
        "direct call, empty body": lambda: do_nothing(x, weight, 1e-5),
        "bound call, empty body": lambda: bound(x, weight, 1e-5),
        "direct call, rms_norm": lambda: real.function(x, weight, 1e-5),
        "bound call, rms_norm": lambda: real(x, weight, 1e-5),
        "operator call, rms_norm": lambda: rms_norm(x, weight, 1e-5),
        "opaque torch op, rms_norm": lambda: real.torch_op(x, weight, 1e-5),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in ways.items():
                times[name].append(microseconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = measure()
    overhead = times["bound call, empty body"] - times["direct call, empty body"]
    if arguments.json:
        print(json.dumps({"torch": str(torch.__version__), "microseconds": times, "bound_overhead": overhead}, indent=2))
        return
    for name, value in times.items():
        print(f"{name:28} {value:7.2f} us")
    print(f"a bound call adds            {overhead:7.2f} us over a direct call")


if __name__ == "__main__":
    main()
