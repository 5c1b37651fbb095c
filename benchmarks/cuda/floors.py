"""What each operator of the CUDA backend must at least take, from what its workload moves and multiplies: no card is asked.

python -m benchmarks.cuda.floors --bandwidth 4.8e12 --rate 990e12        an H200's data sheet
"""

from __future__ import annotations

import argparse
import sys

import torch

from glm5_port.config import released
from glm5_port.testing.cases import Make
from glm5_port.testing.device_check import CONTEXT, PREFILL
from glm5_port.testing.parity import implementations_on
from glm5_port.testing.workloads_rest import all_workloads


def main() -> int:
    """Prints a line for each workload of `glm5-port device-check`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.floors", description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=990e12, help="operations a second of bfloat16 products")
    options = parser.parse_args()
    own = {i.operator.name for i in implementations_on("cuda") if i.backend == "cuda"}
    print(f"{'operator':24} {'work':46} {'MB':>9} {'Gop':>9} {'floor us':>9}  by")
    for workload in all_workloads(released("GLM-5.2"), prefill=PREFILL, context=CONTEXT):
        if workload.operator.name not in own:
            continue
        moved = workload.bytes(workload.build(Make("floor", torch.bfloat16)))
        by_memory, by_products = moved / options.bandwidth, workload.operations / options.rate
        limit = "memory" if by_memory >= by_products else "products"
        print(
            f"{workload.operator.name:24} {workload.name:46} {moved / 1e6:9.2f} {workload.operations / 1e9:9.2f} "
            f"{1e6 * max(by_memory, by_products):9.2f}  {limit}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
