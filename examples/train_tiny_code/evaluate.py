"""Bits per byte of a checkpoint on held-out files of the standard library, through `glm5_port` (sparse attention and all).

    python -m examples.train_tiny_code.evaluate models/glm5-tiny-code

Works for any checkpoint that `glm5_port.load` reads and whose tokens are bytes, so that bf16, INT4 and QAT weights are measured
alike. Non-overlapping windows: a byte is predicted from at most --context bytes before it, on average from half as many.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import glm5_port
from examples.train_tiny_code import corpus
from glm5_port.model.decoder import Glm5Model


@torch.inference_mode()
def window_bits(model: Glm5Model, sample: Sequence[Tensor]) -> Tensor:
    """[windows] float64: -log2 probability of every token of a window but its first, summed."""
    bits = []
    for window in sample:
        logits = model(window[None, :-1]).float()[0]
        bits.append(float(F.cross_entropy(logits, window[1:].to(logits.device), reduction="sum")) / math.log(2))
    return torch.tensor(bits, dtype=torch.float64)


def bits_per_byte(model: Glm5Model, sample: Sequence[Tensor]) -> float:
    """Mean -log2 probability of every token of each window but its first."""
    return float(window_bits(model, sample).sum()) / sum(len(window) - 1 for window in sample)


def spread(sample: Sequence[Tensor], most: int | None) -> list[Tensor]:
    """At most `most` windows, evenly spaced."""
    if most is None or len(sample) <= most:
        return list(sample)
    return [sample[place * len(sample) // most] for place in range(most)]


def draft_acceptance(model: Glm5Model, sample: Sequence[Tensor], *, new_tokens: int) -> tuple[int, int]:
    """Continues the first half of each window greedily, one draft of the MTP layer at a time. Returns (accepted, drafted)."""
    before = (model.speculation.accepted, model.speculation.drafted)
    for window in sample:
        model.generate([window[: len(window) // 2].tolist()], max_new_tokens=new_tokens, stop_ids=())
    return model.speculation.accepted - before[0], model.speculation.drafted - before[1]


def order_2_bits_per_byte(train: Mapping[str, bytes], held_out: Mapping[str, bytes]) -> float:
    """What a table of bytes given the two bytes before reaches (backing off to fewer, with discount one half)."""
    contexts: list[Counter[bytes]] = [Counter() for _ in range(3)]  # by length; only where a byte follows
    runs: list[Counter[bytes]] = [Counter() for _ in range(3)]  # a context and its byte
    for content in train.values():
        for length in range(3):
            starts = range(len(content) - length)
            contexts[length].update(content[start : start + length] for start in starts)
            runs[length].update(content[start : start + length + 1] for start in starts)
    followers = [Counter(run[:-1] for run in table) for table in runs]
    bits, total = 0.0, 0
    for content in held_out.values():
        for place, byte in enumerate(content):
            chance = 1 / 256
            for length in range(min(place, 2) + 1):
                context = content[place - length : place]
                if seen := contexts[length][context]:
                    kept = max(runs[length][context + bytes([byte])] - 0.5, 0.0) / seen
                    chance = kept + 0.5 * followers[length][context] / seen * chance
            bits -= math.log2(chance)
            total += 1
    return bits / total


def gzip_bits_per_byte(held_out: Mapping[str, bytes]) -> float:
    """gzip -9 over all of it as one stream, so that it may use what it saw in the pieces before."""
    joined = b"".join(content for _, content in sorted(held_out.items()))
    return 8 * len(gzip.compress(joined, 9)) / len(joined)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out bits per byte of a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--backend", help="as backend= of glm5_port.load")
    parser.add_argument("--dtype", help="working dtype; default: the config's")
    parser.add_argument("--context", type=int, default=512, help="bytes of a window")
    parser.add_argument("--windows", type=int, help="most windows, evenly spaced; default: all")
    parser.add_argument("--max-context", type=int, help="as max_context= of glm5_port.load (at index_topk or below: dense)")
    parser.add_argument("--no-mtp", action="store_true", help="do not measure the MTP layer")
    parser.add_argument(
        "--baselines", action="store_true", help="also what a table of order 2 and gzip reach on the same windows"
    )
    options = parser.parse_args()
    text = corpus.standard_library()
    sample = spread(list(corpus.windows(text.held_out, context=options.context)), options.windows)
    model = glm5_port.load(
        options.checkpoint, options.backend, options.dtype, max_context=options.max_context, mtp=not options.no_mtp
    )
    found: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "backend": model.backend,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": "dense" if model.dense_attention else f"sparse, index_topk {model.config.index_topk}",
        "bytes": sum(len(window) - 1 for window in sample),
        "context": options.context,
        "bits_per_byte": round(bits_per_byte(model, sample), 4),
    }
    if model.mtp is not None:
        accepted, drafted = draft_acceptance(model, spread([w for w in sample if len(w) > 256], 12), new_tokens=128)
        found |= {"drafted": drafted, "accepted": accepted, "acceptance": round(accepted / drafted, 3)}
    if options.baselines:
        same = {f"{place:06}": bytes(window[1:].tolist()) for place, window in enumerate(sample)}
        found["order_2_bits_per_byte"] = round(order_2_bits_per_byte(text.train, same), 4)
        found["gzip_bits_per_byte"] = round(gzip_bits_per_byte(same), 4)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
