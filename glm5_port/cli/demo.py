"""`glm5-port demo`: the whole idea in three minutes on a laptop: what is here, a model on it, and the proof that it is right."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from glm5_port.cli.demo_int4 import MODEL, int4_chapter
from glm5_port.cli.output import print_json, print_table, print_text

PROMPT_BYTES = 480
NEW_TOKENS = 32
TOLERANCE = 1e-5


def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="Write the small checkpoint here and keep it.")
    ] = None,
    model: Annotated[
        Path, typer.Option("--model", metavar="CHECKPOINT", help="A trained checkpoint with a byte tokenizer, for the INT4 part.")
    ] = MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Show the backends, run a small GLM-5.2 on real text against transformers, run parity, and ship INT4."""
    say = (lambda *_: None) if as_json else print_text
    with tempfile.TemporaryDirectory() as scratch:
        directory = keep or Path(scratch) / "tiny-glm-5.2"
        report: dict[str, Any] = {
            "backends": _backends(say),
            "agreement": _agreement(say, directory),
            "parity": _parity(say, show=not as_json),
            "int4": _int4(say, model, Path(scratch)),
        }
    int4_failed = report["int4"] is not None and not report["int4"]["passed"]
    report["passed"] = report["agreement"]["passed"] and not report["parity"]["failed"] and not int4_failed
    if as_json:
        print_json(report)
    else:
        _where_next(keep)
    if not report["passed"]:
        raise typer.Exit(1)


def _backends(say: Any) -> dict[str, Any]:
    from glm5_port.cli.doctor import examine

    found = examine()
    say("1. The backends on this machine\n")
    for name, backend in found["backends"].items():
        say(f"   {name:11} {'usable' if backend['usable'] else 'not here: ' + str(backend['missing'])}")
    say(f"\n   chosen: {found['chosen']}\n")
    return found


def _agreement(say: Any, directory: Path) -> dict[str, Any]:
    """Writes a checkpoint with transformers, runs it with both, and compares."""
    import textwrap

    import torch

    from glm5_port.cli.generate import load_with_progress
    from glm5_port.testing.hugging_face import write_checkpoint
    from glm5_port.testing.tiny import TINY
    from glm5_port.text import Text, write_byte_tokenizer

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    say("2. A small GLM-5.2 written by Hugging Face transformers, run here on a real file\n")
    theirs = write_checkpoint(directory, {**TINY, "num_nextn_predict_layers": 0}, seed=1)
    write_byte_tokenizer(directory, ["<pad>", "<end>"])
    source = Path(textwrap.__file__)
    prompt = Text(directory).encode(source.read_text(encoding="utf-8"))[:PROMPT_BYTES]
    started = time.perf_counter()
    model = load_with_progress(directory, latent_norm_eps=1e-6)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        difference = float((model(ids).cpu() - theirs(ids).logits).abs().max())
        expected = theirs.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=256)[0]
    made = model.generate(ids, max_new_tokens=NEW_TOKENS, stop_ids=())
    same = made[0].tolist() == expected.tolist()  # type: ignore[union-attr]
    config = model.config
    say(
        f"   {source.name} of Python's standard library: {len(prompt)} tokens (bytes), index_topk {config.index_topk}, "
        f"{config.num_hidden_layers} layers of which {len(config.full_layers)} own an indexer, {config.n_routed_experts} experts"
    )
    say(f"   on {model.backend}, {time.perf_counter() - started:.1f} s for both. Which implementation ran, and why:\n")
    if say is print_text:
        rows = {(s.operator, s.chosen.id if s.chosen else "", str(s.request)) for s in model.decisions()}
        print_table(("operator", "implementation", "request"), [list(row) for row in sorted(rows)])
    passed = same and difference < TOLERANCE
    say(
        f"\n   against transformers, float32, latent_norm_eps 1e-6: largest logit difference {difference:.1e} "
        f"({'within' if difference < TOLERANCE else 'OVER'} {TOLERANCE:.0e}), "
        f"{NEW_TOKENS} greedy tokens {'equal' if same else 'DIFFERENT'}"
    )
    say("   (the weights are random, so the text they make is noise; that both make the same noise is the point)\n")
    return {
        "passed": passed,
        "prompt_tokens": len(prompt),
        "largest_logit_difference": difference,
        "greedy_tokens_equal": same,
        "decisions": [selection.as_dict() for selection in model.decisions()],
    }


def _parity(say: Any, *, show: bool) -> dict[str, Any]:
    from glm5_port.cli.parity import print_report, run_parity

    say("3. Parity: every implementation against the float64 gold (small cases in bfloat16; glm5-port parity runs all)\n")
    report = run_parity(small=True, dtype="bfloat16")
    if show:
        print_report(report)
    return {key: report[key] for key in ("backend", "passed", "failed", "declined", "unavailable", "summary", "matrix")}


def _int4(say: Any, model: Path, scratch: Path) -> dict[str, Any] | None:
    """The INT4 chapter, or None (said plainly) where the trained model is not at hand: it lies in the repository, not in the
    installed package."""
    if not model.is_dir():
        say(f"4. INT4: NOT SHOWN, because {model} is not here. Run the demo in a clone of the repository, or give --model.\n")
        return None
    return int4_chapter(say, model, scratch)


def _where_next(keep: Path | None) -> None:
    checkpoint = str(keep or "CHECKPOINT")
    hint = "written by this demo" if keep else "glm5-port demo --keep FOLDER writes one"
    commands = [
        (f"glm5-port info {checkpoint}", "what a checkpoint is, and the memory it needs"),
        (f'glm5-port generate {checkpoint} --prompt "import"', f"run it ({hint})"),
        (f"glm5-port export {checkpoint} OUT --dry-run", "what it is in INT4: files, bytes, and whether the disk has room"),
        ("glm5-port explain sparse_mla_attention --as npu", "what would run on a chip that is not here"),
        ("glm5-port parity", "all parity cases, every dtype, GLM-5 widths too"),
        ("docs/qat.md, docs/export.md", "train aware of INT4, and ship it"),
        ("docs/adding-a-backend.md", "bring your own chip"),
    ]
    width = max(len(command) for command, _ in commands)
    print_text("\n5. Where to go next\n")
    for command, meaning in commands:
        print_text(f"   {command:{width}}   {meaning}")
