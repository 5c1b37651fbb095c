"""What INT4 costs a checkpoint, and what INT4-aware training wins back: bits per byte on held-out text, as a table.

    python -m examples.train_tiny_code.qat_table models/glm5-tiny-code

Every row is a checkpoint on disk, exported where it is INT4, read by `glm5_port.load` and measured on the same windows in
float32. Standard errors are those of differences between rows, window by window. The control is trained with the same loss,
batches and steps without quantisation, and then rounded: what it wins is owed to more training, not to training with the
rounding in place.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import glm5_port
from examples.train_tiny_code import corpus, evaluate
from examples.train_tiny_code.qat import EVERYTHING, EXPERTS, Recipe, Student, write_masters
from glm5_port.cli.output import print_json, print_table, print_text, progress
from glm5_port.errors import Glm5PortError
from glm5_port.quant.export import export
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE

Weights = dict[str, Tensor]
FULL, ROUNDED_EXPERTS, ROUNDED, TRAINED = "bf16", "rounded experts", "rounded", "QAT"
CONTROL, ROUNDED_CONTROL = "control, bf16", "control, rounded"
CONTEXT = 512
"""Bytes of a window that is measured."""


# --- measuring -------------------------------------------------------------------------------------------------------------


def ratio(top_N: Tensor, bottom_N: Tensor) -> tuple[float, float]:
    """sum(top) / sum(bottom) over windows, and its standard error, the windows taken as independent."""
    value = float(top_N.sum() / bottom_N.sum())
    count = len(top_N)
    spread = (top_N - value * bottom_N).square().sum() * count / max(count - 1, 1)
    return value, float(spread.sqrt() / bottom_N.sum().abs())


def table(bits: Mapping[str, Tensor], bytes_N: Tensor) -> list[dict[str, Any]]:
    """One row for each checkpoint: bits per byte, what it lost against bf16, and which share of the loss of rounding it did not
    lose; each of the two with its standard error.

    Args:
        bits: name of a row -> [windows] bits; `FULL` and `ROUNDED` must be among them.
        bytes_N: bytes that each window predicts.
    """
    rows = []
    for name, bits_N in bits.items():
        row: dict[str, Any] = {"row": name, "bits_per_byte": ratio(bits_N, bytes_N)[0]}
        if name != FULL:
            row["loss"], row["loss_error"] = ratio(bits_N - bits[FULL], bytes_N)
        if name in (TRAINED, ROUNDED_CONTROL):
            row["recovered"], row["recovered_error"] = ratio(bits[ROUNDED] - bits_N, bits[ROUNDED] - bits[FULL])
        rows.append(row)
    return rows


# --- making ----------------------------------------------------------------------------------------------------------------


def stored_tensors(directory: Path) -> Weights:
    """Every tensor of a checkpoint."""
    found: Weights = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(exported: Path, used: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether codes and scales on disk are those that training computed with."""
    stored = stored_tensors(exported)
    return all(
        torch.equal(stored[name + PACKED], packed)
        and torch.equal(stored[name + SCALE].view(torch.int16), scales.view(torch.int16))
        for name, (packed, scales) in used.items()
    )


def trained(student: Student, title: str, stream: Tensor, recipe: Recipe, source: Path, destination: Path) -> float:
    """Trains and writes the masters. Returns the seconds of training."""
    started = time.perf_counter()
    with progress(f"training ({title})", recipe.steps) as advance:
        student.train(stream, recipe, lambda _, loss: advance(note=f"KL {loss:.5f}"))
    seconds = time.perf_counter() - started
    write_masters(source, destination, student.masters)
    return seconds


def run(source: Path, stream: Tensor, recipe: Recipe, sample: Sequence[Tensor], scratch: Path) -> dict[str, Any]:
    """Makes every checkpoint, measures it, and says what happened as plain data.

    Args:
        source: directory of a bf16 checkpoint of one file, whose tokens are bytes.
        stream: [tokens] of the training text.
        recipe: of the training.
        sample: held-out windows.
        scratch: an existing directory for the checkpoints.

    Raises:
        Glm5PortError: the source is no such checkpoint, or a setting does not fit it.
    """
    export(source, scratch / "rounded-experts", EXPERTS.options())
    export(source, scratch / "rounded", EVERYTHING.options())
    student, control = Student(source, EVERYTHING), Student(source, EVERYTHING, quantised=False)
    seconds = trained(student, TRAINED, stream, recipe, source, scratch / "masters")
    export(scratch / "masters", scratch / "qat", EVERYTHING.options())
    control_seconds = trained(control, "control", stream, recipe, source, scratch / "control")
    export(scratch / "control", scratch / "rounded-control", EVERYTHING.options())
    checkpoints = {
        FULL: source,
        ROUNDED_EXPERTS: scratch / "rounded-experts",
        ROUNDED: scratch / "rounded",
        TRAINED: scratch / "qat",
        CONTROL: scratch / "control",
        ROUNDED_CONTROL: scratch / "rounded-control",
    }
    bits = {}
    with progress("measuring", len(checkpoints)) as advance:
        for name, directory in checkpoints.items():
            bits[name] = evaluate.window_bits(glm5_port.load(directory, "cpu", "float32"), sample)
            advance(note=name)
    bytes_N = torch.tensor([len(window) - 1 for window in sample])
    return {
        "checkpoint": str(source),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "settings": {ROUNDED_EXPERTS: EXPERTS.title, ROUNDED: EVERYTHING.title},
        "matrices": len(student.masters),
        "windows": len(sample),
        "bytes": int(bytes_N.sum()),
        "recipe": asdict(recipe),
        "seconds": {TRAINED: seconds, CONTROL: control_seconds},
        "kl_to_teacher": {"before": student.losses[0], "after": student.losses[-1]},
        "export_holds_what_the_last_forward_used": same_bytes(scratch / "qat", student.used()),
        "table": table(bits, bytes_N),
    }


# --- showing ---------------------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """Prints the table and what it was made with."""
    rows = [
        [
            row["row"],
            f"{row['bits_per_byte']:.4f}",
            f"{row['loss']:+.4f} ± {row['loss_error']:.4f}" if "loss" in row else "",
            f"{row['recovered']:.0%} ± {row['recovered_error']:.0%}" if "recovered" in row else "",
        ]
        for row in found["table"]
    ]
    recipe, seconds = found["recipe"], found["seconds"]
    print_table(("", "bits per byte", "loss against bf16", "of the rounding loss recovered"), rows)
    print_text(
        f"\n{ROUNDED_EXPERTS}: {EXPERTS.title}. Every other INT4 row: {EVERYTHING.title} ({found['matrices']} matrices)\n"
        f"{found['windows']} windows, {found['bytes']:,} held-out bytes, float32; ± is one standard error over windows\n"
        f"{recipe['steps']} steps of {recipe['rows']} x {recipe['context']} bytes at rate {recipe['rate']:g}: "
        f"{seconds[TRAINED]:.0f} s, control {seconds[CONTROL]:.0f} s\n"
        f"codes and scales of the export are {'' if found['export_holds_what_the_last_forward_used'] else 'NOT '}those of the "
        "last forward pass of training"
    )


def main() -> None:
    usual = Recipe()
    parser = argparse.ArgumentParser(description="Bits per byte of bf16, rounded and INT4-aware weights.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="bf16, of one file, tokens are bytes")
    parser.add_argument("--out", type=Path, help="keep the checkpoints in this folder, which must not exist")
    parser.add_argument("--steps", type=int, default=usual.steps, help="optimiser steps")
    parser.add_argument("--rate", type=float, default=usual.rate, help="peak learning rate")
    parser.add_argument("--rows", type=int, default=usual.rows, help=f"windows of {usual.context} bytes in a batch")
    parser.add_argument("--windows", type=int, default=96, help=f"held-out windows of {CONTEXT} bytes, evenly spaced")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    options = parser.parse_args()
    for name in ("steps", "rows", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: it must be at least 1")
    if options.windows < 2:
        parser.error(f"--windows is {options.windows}: a standard error needs at least 2")
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: choose a folder that does not")
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps, rate=options.rate, rows=options.rows)
    text = corpus.standard_library()
    stream = corpus.token_stream(text.train)
    sample = evaluate.spread(list(corpus.windows(text.held_out, context=CONTEXT)), options.windows)
    try:
        if options.out is None:
            with tempfile.TemporaryDirectory() as scratch:
                found = run(options.checkpoint, stream, recipe, sample, Path(scratch))
        else:
            options.out.mkdir(parents=True)
            found = run(options.checkpoint, stream, recipe, sample, options.out)
    except (Glm5PortError, OSError) as error:
        parser.error(str(error))
    print_json(found) if options.json else show(found)


if __name__ == "__main__":
    main()
