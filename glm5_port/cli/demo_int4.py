"""The INT4 chapter of `glm5-port demo`: a few INT4-aware training steps, export, verification, and text from the codes."""

from __future__ import annotations

import json
import math
import textwrap
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
    from glm5_port.quant.export import export
    from glm5_port.quant.qat import canonical_tensors, prepare_qat, requantise
    from glm5_port.quant.verify import verify
    from glm5_port.text import Text

    say("4. INT4: train aware of it, export, verify, run (the trained model glm5-tiny-code)\n")
    model = load(source, dtype="float32", trainable=True)
    prepared = prepare_qat(model)
    losses = _train(model, prepared.parameters)
    say(f"   {prepared}")
    say(f"   {STEPS} steps on {ROWS} x {LENGTH} bytes: {losses[0]:.3f} to {losses[-1]:.3f} bits per byte on these very bytes")
    requantise(model)
    used = {name: tensor.detach().clone() for name, tensor in canonical_tensors(model)}
    trained, shipped = scratch / "trained", scratch / "int4"
    _write_trained(model, source, trained)
    export(trained, shipped)
    same = all(torch.equal(_stored(shipped, name), tensor.cpu()) for name, tensor in used.items())
    report = verify(shipped, trained)
    say(f"   exported: the bytes of {len(used) // 3} matrices are {'those' if same else 'NOT those'} that training computed with")
    say(f"   verified: {'good' if not report.problems else '; '.join(report.problems[:3])}")
    model = load(shipped)
    chosen = sorted({s.chosen.id for s in model.decisions() if s.operator == "expert_mlp_int4" and s.chosen})
    text = Text(shipped)
    (tokens,) = model.generate([text.encode(PROMPT)], max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, seed=SEED, stop_ids=())
    written = text.decode(tokens)
    say(f"   text from INT4 experts (expert_mlp_int4 by {', '.join(chosen)}), temperature {TEMPERATURE}:\n")
    say(textwrap.indent(written, "      | ") + "\n")
    return {
        "passed": same and not report.problems and bool(chosen),
        "matrices": len(used) // 3,
        "bits_per_byte_on_the_training_bytes": losses,
        "bytes_of_training_are_bytes_of_export": same,
        "problems": report.problems,
        "text": written,
    }


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


def _write_trained(model: Glm5Model, source: Path, destination: Path) -> None:
    """A copy of a checkpoint of one file with the trained experts in it. Masters are stored in float32: bf16(master) is what the
    exporter quantises, as training did."""
    import shutil

    from safetensors.torch import load_file, save_file

    from glm5_port.quant.places import assemble, choose, find_places

    shutil.copytree(source, destination)
    file = destination / "model.safetensors"
    stored = load_file(file)
    places = choose(find_places(model), experts=True, patterns=())
    masters = assemble((piece, {"master": place.parameter.detach()}) for place in places for piece in place.pieces)
    stored |= {name: parts["master"].cpu() for name, parts in masters.items()}
    save_file(stored, file, metadata={"format": "pt"})


def _stored(directory: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    with safe_open(directory / files.get(name, "model.safetensors"), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor
