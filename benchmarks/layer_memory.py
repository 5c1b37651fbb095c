"""Peak memory of one GLM-5.2 layer at 128K cached tokens: what the portable implementations need above weights and cache.

    python benchmarks/layer_memory.py [--context 131072] [--prefill 512] [--cache-format plain] [--json]

Attention and indexer have the true shapes; the MoE block has 16 of 256 experts and the vocabulary 256 tokens, so that the
weights fit an ordinary machine (they are not counted). The cache holds random rows. Floor of the working set: the activations
of the step; a naive indexer would need queries x keys scores for 32 heads, a naive attention queries x index_topk latents.
Linux only: reads the peak resident size from /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from glm5_port.backends.torch.chunks import WORKSPACE_BYTES
from glm5_port.config import released
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def mebibytes(count: int) -> str:
    return f"{count / 2**20:9.0f} MiB"


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(context: int, prefill: int, cache_format: str) -> dict[str, Any]:
    """Peak bytes above the resident size before each step, for a prefill chunk and a decode step that end at `context`."""
    config = dataclasses.replace(
        released("GLM-5.2"),
        num_hidden_layers=1,
        mlp_layer_types=("sparse",),
        indexer_types=("full",),
        n_routed_experts=16,
        vocab_size=256,
        eos_token_id=(),
        pad_token_id=None,
        num_nextn_predict_layers=0,
    )
    dtype = torch.bfloat16
    model = build(
        config, random_weights(config, dtype=dtype), backend="cpu", dtype=dtype, cache_format=cache_format, max_context=context
    )
    cache = model.new_cache([context])
    layer = cache.layers[0]
    for field in [*layer.latent, *(layer.index or [])]:
        if field.is_floating_point() and field.dtype.itemsize > 1:
            field.normal_(0.0, 0.5)
    sequence = cache.open()
    steps: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, count in (("prefill", prefill), ("decode", 1)):
            tokens = torch.randint(0, 256, (count,))
            batch = cache.batch([Span(sequence, context - count, count)])
            reset_peak()
            before = resident("VmRSS")
            start = time.perf_counter()
            hidden = model.step(tokens, batch, cache)
            seconds = time.perf_counter() - start
            if not torch.isfinite(hidden.float()).all():
                raise SystemExit(f"{name}: the layer's output is not finite, so its memory means nothing")
            steps[name] = {"tokens": count, "peak_bytes": resident("VmHWM") - before, "seconds": seconds}
    naive_scores = prefill * context * config.index_n_heads * 4
    naive_latents = prefill * config.index_topk * (config.kv_lora_rank + config.qk_rope_head_dim) * 2
    return {
        "context": context,
        "cache_format": cache_format,
        "cache_bytes": sum(f.numel() * f.element_size() for f in [*layer.latent, *(layer.index or [])]),
        "workspace_budget_bytes": WORKSPACE_BYTES,
        "steps": steps,
        "naive_prefill_indexer_bytes": naive_scores,
        "naive_prefill_gather_bytes": naive_latents,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--cache-format", default="plain")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = measure(arguments.context, arguments.prefill, arguments.cache_format)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"one GLM-5.2 layer (16 of 256 experts), bfloat16, {report['context']} cached tokens, cache {report['cache_format']}")
    print(f"{'cache of the layer':42} {mebibytes(report['cache_bytes'])}")
    print(f"{'workspace budget of a portable operator':42} {mebibytes(report['workspace_budget_bytes'])}")
    for name, step in report["steps"].items():
        what = f"{name} of {step['tokens']} tokens, above these"
        print(f"{what:42} {mebibytes(step['peak_bytes'])}   {step['seconds']:.1f} s")
    print(f"{'naive prefill: scores of all heads':42} {mebibytes(report['naive_prefill_indexer_bytes'])}")
    print(f"{'naive prefill: all selected latents':42} {mebibytes(report['naive_prefill_gather_bytes'])}")


if __name__ == "__main__":
    main()
