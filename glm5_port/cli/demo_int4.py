"""The INT4 chapter of `glm5-port demo`: a few INT4-aware training steps, export, verification, and text from the codes."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_port.cli.output import progress

if TYPE_CHECKING:
    import torch

    from glm5_port.model.decoder import Glm5Model

STEPS, ROWS, LENGTH = 4, 2, 96
RATE = 2e-4
PROMPT = "    def __init__(self"
NEW_TOKENS = 120
TEMPERATURE, SEED = 0.7, 1  # greedy text of so small a model soon repeats itself
MODEL = Path("models") / "glm5-tiny-code"
"""The trained small model, relative to the repository that the demo runs in."""


def int4_chapter(say: Any, source: Path, scratch: Path) -> dict[str, Any]:
    """Trains, exports, verifies, reloads and generates.

    Args:
        say: prints a line.
        source: a trained checkpoint with a byte tokenizer.
        scratch: an empty directory for the trained and the exported checkpoint.

    Returns:
        What happened, as plain data; "passed" says whether every check held.
    """
    import torch

    from glm5_port.model.load import load
    from glm5_port.model.save import save_checkpoint
    from glm5_port.quant.export import export
    from glm5_port.quant.qat import canonical_tensors, prepare_qat, requantise
    from glm5_port.quant.sizes import show_bytes
    from glm5_port.quant.verify import verify
    from glm5_port.text import Text

    say("4. INT4: train aware of it, export, verify, run (the trained model glm5-tiny-code)\n")
    model = load(source, dtype="float32", trainable=True)
    prepared = prepare_qat(model)
    losses = _train(model, prepared.parameters)
    say(f"   train     {prepared}")
    first, *_, last = losses
    say(f"             {STEPS} steps on {ROWS} x {LENGTH} bytes of source code: {first:.3f} to {last:.3f} bits per byte of it")
    requantise(model)
    used = {name: tensor.detach().clone() for name, tensor in canonical_tensors(model)}
    trained, shipped = scratch / "trained", scratch / "int4"
    save_checkpoint(model, trained, dtype="bfloat16")
    made = export(trained, shipped)
    wrong = [name for name, tensor in used.items() if not torch.equal(_stored(shipped, name), tensor.cpu())]
    count = len(used) // 3  # a matrix is stored as codes, scales and shape
    say(f"   export    {show_bytes(made.plan.source_bytes)} become {show_bytes(made.plan.bytes)}")
    say(f"             codes and scales of {count} matrices, bit for bit those that training computed with: {_verdict(wrong)}")
    report = verify(shipped, trained)
    say(f"   verify    codes, scales, sha256, every tensor made again from the trained weights: {_verdict(report.problems)}")
    model = load(shipped)
    chosen = sorted({s.chosen.id for s in model.decisions() if s.operator == "expert_mlp_int4" and s.chosen})
    text = Text(shipped)
    (tokens,) = model.generate([text.encode(PROMPT)], max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=SEED, stop_ids=())
    written = text.decode(tokens)
    say(f"   generate  the export again, experts computed from their 4-bit codes (expert_mlp_int4 by {', '.join(chosen)}),")
    say(f"             after {PROMPT.strip()!r}, temperature {TEMPERATURE}; so small a model writes what looks like Python:\n")
    say(textwrap.indent(written, "      | ") + "\n")
    return {
        "passed": not wrong and not report.problems and bool(chosen),
        "matrices": count,
        "bits_per_byte_on_the_training_bytes": losses,
        "bytes_of_training_are_bytes_of_export": not wrong,
        "problems": report.problems,
        "text": written,
    }


def _verdict(problems: Sequence[str]) -> str:
    return "good" if not problems else f"WRONG: {'; '.join(problems[:3])}"


def _train(model: Glm5Model, names: tuple[str, ...]) -> list[float]:
    """A few AdamW steps of the experts alone, on one batch of Python's own source. Returns the bits per byte before each."""
    import torch
    import torch.nn.functional as F

    experts = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in experts)
    source = Path(textwrap.__file__).read_bytes()
    rows = [source[start : start + LENGTH + 1] for start in range(1000, 1000 + 700 * ROWS, 700)]
    ids_BS = torch.tensor([list(row) for row in rows])
    optimizer = torch.optim.AdamW(experts.values(), lr=RATE)
    losses: list[float] = []
    with progress("training", STEPS) as advance:
        for _ in range(STEPS):
            logits = model(ids_BS[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BS[:, 1:].flatten().to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()) / math.log(2))
            advance(note=f"{losses[-1]:.3f} bits per byte")
    return losses


def _stored(directory: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    with safe_open(directory / files.get(name, "model.safetensors"), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor
