"""Measures the CUDA backend's products, sparse attention and one decoder layer on this machine's GPU.

    python -m benchmarks.cuda                        all contests, a table
    python -m benchmarks.cuda --only experts         some of them
    python -m benchmarks.cuda --out result.json      also JSON
    python -m benchmarks.cuda --tiny                 a moment at tiny widths, to see that it runs

Results that were never held against their gold are no results: run `glm5-port parity --backend cuda` first.
No GPU has run this yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.cuda.attention import indexer, sparse, top_k
from benchmarks.cuda.contest import Result, limits_of, run, table
from benchmarks.cuda.layer import layer
from benchmarks.cuda.products import GLM5, SUITES, TINY, Bench
from glm5_port.plugins import load_plugins
from glm5_port.requests import probe

ALL = {**SUITES, "sparse": sparse, "indexer": indexer, "top_k": top_k, "layer": layer}


def main() -> int:
    """Runs the contests; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu runs the kernels only under TRITON_INTERPRET=1, at --tiny")
    options = parser.parse_args()
    load_plugins()
    if options.device == "cuda" and (missing := probe("cuda").missing) is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    bench = Bench(device, TINY if options.tiny else GLM5)
    limits = limits_of(device, small=options.tiny)
    print(f"{limits.bandwidth / 1e9:.0f} GB/s copied, {limits.product_rate / 1e12:.1f} T operations/s in bfloat16 products")
    results: list[Result] = []
    for name in options.only:
        for contest in ALL[name](bench):
            results += run(contest, limits, device)
            print(f"\r{name}: {contest.operator} {contest.work}".ljust(78), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(results))
    if options.out:
        made = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": str(torch.__version__),
            "limits": asdict(limits),
            "results": [result.as_dict() for result in results],
        }
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
