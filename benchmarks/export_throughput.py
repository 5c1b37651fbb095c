"""Measures `glm5-port export` on experts of GLM-5's true widths: parameters per second and peak memory.

    python benchmarks/export_throughput.py --layers 1 --experts 16 --workers 1
    python benchmarks/export_throughput.py --gigabytes 4 --workers 1 2

Writes a synthetic checkpoint of random bf16 weights and exports it in a process of its own for each number of workers. Figures
include everything an export does: reading, quantising, error statistics, digests of source and output, fsync. The source is read
once before each run, so that it lies in the page cache: on disks slower than the figure, the disk decides.

The floor is sha256 of every byte that is written, at the rate measured in the same process before and after the export; the share
is floor / processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from glm5_port.config import Glm5Config, released
from glm5_port.model.tensors import FLOAT32, expected_tensors
from glm5_port.quant.files import hash_file

EXPERT_PARAMETERS = 3 * 6144 * 2048
GLM5_ROUTED = 75 * 256 * EXPERT_PARAMETERS
CHILD = """
import hashlib, json, os, sys, time
from glm5_port.quant.export import export
chunk = os.urandom(2**19)
def hashing():
    digest, started = hashlib.sha256(), time.process_time()
    for _ in range(400):
        digest.update(chunk)
    return 400 * len(chunk) / (time.process_time() - started)
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
rate = hashing()
before, started, used = peak(), time.perf_counter(), time.process_time()
made = export(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
seconds = time.perf_counter() - started
processor = time.process_time() - used
rate = (rate + hashing()) / 2
quantized = sum(tensor.source.bytes // 2 for tensor in made.plan.quantized)
print(json.dumps({"seconds": seconds, "processor": processor, "before": before, "peak": peak(), "workers": made.workers,
                  "quantized": quantized, "rate": rate, "floor": made.plan.bytes / rate}))
"""


def write_source(directory: Path, experts: int) -> None:
    """One mixture-of-experts layer with true expert widths; everything else small. One shard for every 16 experts."""
    glm5 = released("GLM-5").as_dict()
    fields = {
        **glm5, "num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "indexer_types": ["full"], "n_routed_experts": experts,
        "num_experts_per_tok": min(8, experts), "vocab_size": 1024, "num_nextn_predict_layers": 0, "num_attention_heads": 2,
        "index_n_heads": 4, "eos_token_id": [1], "pad_token_id": 0,
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    specs = list(expected_tensors(Glm5Config.from_dict(fields), mtp=False).items())
    step = 48
    groups = [specs[first : first + step] for first in range(0, len(specs), step)]
    torch.manual_seed(0)
    placed = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors: dict[str, Any] = {}
        for name, spec in group:
            dtype = torch.float32 if spec.kind == FLOAT32 else torch.bfloat16
            tensors[name] = torch.empty(spec.shape, dtype=torch.float32).normal_(0.0, 0.02).to(dtype)
            placed[name] = file
        from safetensors.torch import save_file

        save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def measure(source: Path, destination: Path, workers: int) -> dict[str, Any]:
    """One export in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(destination), str(workers)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if run.returncode:
        sys.exit(run.stderr)
    return dict(json.loads(run.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of bf16 expert weights")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--scratch", type=Path, default=None, help="where to write (default: the temporary directory)")
    parser.add_argument("--verify", action="store_true", help="also verify the last export against its source")
    arguments = parser.parse_args()
    experts = max(1, math.ceil(arguments.gigabytes * 1e9 / (2 * EXPERT_PARAMETERS)))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source, destination = Path(scratch) / "source", Path(scratch) / "int4"
        write_source(source, experts)
        print(f"{experts} experts of 3 x 6144 x 2048: {experts * EXPERT_PARAMETERS / 1e9:.2f} G parameters in bf16")
        for workers in arguments.workers:
            shutil.rmtree(destination, ignore_errors=True)
            os.sync()  # what was written before must not be written back on this export's time
            for file in source.iterdir():
                hash_file(file)
            found = measure(source, destination, workers)
            rate = found["quantized"] / found["seconds"]
            per_second = found["quantized"] / found["processor"]
            print(
                f"workers {found['workers']}: {found['seconds']:.1f} s, {rate / 1e6:,.0f} M parameters/s, "
                f"{per_second / 1e6:,.0f} M for each second of processor time; peak memory {found['peak'] / 2**20:,.0f} MiB, "
                f"{found['before'] / 2**20:,.0f} MiB of it before it began; sha256 of what is written, at "
                f"{found['rate'] / 1e9:.2f} GB/s, alone takes {found['floor']:.1f} s, "
                f"{found['floor'] / found['processor']:.0%} of the processor time; "
                f"extrapolated to GLM-5's {GLM5_ROUTED / 1e9:.1f} G: {GLM5_ROUTED / rate / 60:,.0f} min"
            )
        if arguments.verify:
            from glm5_port.quant.verify import verify

            problems = verify(destination, source, workers=max(arguments.workers)).problems
            print("verified: good" if not problems else "\n".join(problems))


if __name__ == "__main__":
    main()
