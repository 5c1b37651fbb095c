"""Trains glm5-tiny-code on the sources of Python's standard library, and writes a checkpoint that `glm5_port.load` reads.

    python -m examples.train_tiny_code.train --out OUT            (from the root of the repository; about half an hour)

Three stages, as DeepSeek Sparse Attention was introduced: dense attention; a warm-up in which only the indexers learn, from the
attention of the frozen trunk; then everything learns with attention restricted to what the indexers select. Interrupt it at any
time: the same command resumes, and `OUT` always holds the last saved checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from examples.train_tiny_code import corpus
from examples.train_tiny_code.network import DENSE, SPARSE, WARM_UP, Network
from glm5_port.config import Glm5Config
from glm5_port.model.build import CORRECTION_BIAS, random_weights
from glm5_port.model.tensors import expected_tensors
from glm5_port.testing.tiny import TINY
from glm5_port.text import write_byte_tokenizer

CONFIG: dict[str, Any] = {
    **TINY,
    "dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_topk": 64,
}
"""config.json: three layers with an indexer, a fourth that shares the third's, and an MTP layer with its own."""

STATE = "training.pt"
MTP_WEIGHT = 0.3
BIAS_STEP = 2e-3
"""How far a router's bias moves in one step, towards experts that were chosen too rarely."""
INDEXER_RATE = 2e-3


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training.

    Attributes:
        mode: of `Network`.
        steps: how many optimiser steps.
        rows, context: shape of a batch.
    """

    mode: str
    steps: int
    rows: int
    context: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, beside the text.

    Attributes:
        stages: in order.
        rate: peak learning rate of the trunk; warms up for `warm_up` of its steps, then falls along a cosine to 2 %.
        seed: of weights and batches.
        bfloat16: products in bfloat16 (autocast); masters and everything else stay float32.
    """

    stages: tuple[Stage, ...]
    rate: float = 3e-3
    warm_up: int = 60
    decay: float = 0.1
    seed: int = 0
    bfloat16: bool = True

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError("past the last stage")

    def trunk_rate(self, step: int) -> float:
        """The learning rate of the trunk; the indexers' warm-up does not count, for the trunk rests."""
        spent, total = 0, sum(stage.steps for stage in self.stages if stage.mode != WARM_UP)
        for stage in self.stages:
            inside = min(max(step, 0), stage.steps)
            spent += inside if stage.mode != WARM_UP else 0
            step -= stage.steps
        cosine = 0.51 + 0.49 * math.cos(math.pi * spent / total)
        return self.rate * min(1.0, (spent + 1) / self.warm_up) * cosine


def recipe(*, dense: int = 1500, warm_up: int = 100, sparse: int = 350, rate: float = 3e-3) -> Recipe:
    return Recipe((Stage(DENSE, dense, 8, 256), Stage(WARM_UP, warm_up, 4, 512), Stage(SPARSE, sparse, 4, 512)), rate=rate)


class Trainer:
    """fp32 masters by checkpoint name, their optimiser, and how far they have come.

    Args:
        plan: the recipe.
        fields: config.json of the model.
    """

    def __init__(self, plan: Recipe, fields: Mapping[str, Any] = CONFIG) -> None:
        self.fields = fields
        self.config = Glm5Config.from_dict(dict(fields))
        self.plan = plan
        self.step = 0
        self.weights = initial_weights(self.config, plan.seed)
        indexers = [w for name, w in self.weights.items() if ".indexer." in name]
        trunk = [w for name, w in self.weights.items() if ".indexer." not in name and not name.endswith(CORRECTION_BIAS)]
        groups = [
            {"params": [w for w in trunk if w.dim() > 1], "weight_decay": plan.decay, "part": "trunk"},
            {"params": [w for w in trunk if w.dim() == 1], "weight_decay": 0.0, "part": "trunk"},
            {"params": indexers, "weight_decay": 0.0, "part": "indexer"},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.97), eps=1e-9)

    def losses(self, tokens: Tensor, mode: str) -> tuple[dict[str, Tensor], Network]:
        """The losses in nats of [B, S + 2] tokens: next token, the one after (MTP layer), indexer distillation."""
        length = tokens.shape[1] - 2
        now, following, after = (tokens[:, first : first + length] for first in range(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.bfloat16):
            network = Network(self.config, self.weights, mode=mode, positions=length)
            hidden = network.trunk(now)
            drafted = network.mtp(hidden, following)
            found = {
                "next": F.cross_entropy(network.logits(hidden).flatten(0, 1), following.flatten()),
                "mtp": F.cross_entropy(network.logits(drafted).flatten(0, 1), after.flatten()),
            }
        if mode != DENSE:
            found["indexer"] = network.observed.distillation_loss(network.visible_BSU)
        return found, network

    def train_step(self, tokens: Tensor) -> dict[str, float]:
        """One optimiser step on a batch."""
        mode = self.plan.at(self.step).mode
        for name, weight in self.weights.items():
            learns = ".indexer." in name if mode == WARM_UP else not name.endswith(CORRECTION_BIAS)
            weight.requires_grad_(learns)
        found, network = self.losses(tokens, mode)
        loss = found["next"] + MTP_WEIGHT * found["mtp"] if mode != WARM_UP else torch.zeros(())
        (loss + found.get("indexer", 0.0)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.trunk_rate(self.step) if group["part"] == "trunk" else INDEXER_RATE
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if mode != WARM_UP:
            self._balance(network.observed.expert_counts)
        self.step += 1
        return {name: float(value.detach()) for name, value in found.items()}

    def _balance(self, counts: Mapping[str, Tensor]) -> None:
        """Moves each router's bias by the sign of what its experts lack (balance without an auxiliary loss)."""
        for name, counts_E in counts.items():
            lacking_E = counts_E.float().mean() - counts_E
            self.weights[name] += BIAS_STEP * lacking_E.sign()

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path, origin: Mapping[str, Any]) -> None:
        """Writes the checkpoint and the state to resume from, each replaced at once."""
        directory.mkdir(parents=True, exist_ok=True)
        write_checkpoint(directory, self.weights, self.fields)
        (directory / "training.json").write_text(json.dumps({"step": self.step, **origin}, indent=2) + "\n")
        state = {"weights": self.weights, "optimizer": self.optimizer.state_dict(), "step": self.step, "plan": asdict(self.plan)}
        part = directory / (STATE + ".part")
        torch.save(state, part)
        part.replace(directory / STATE)

    def resume(self, directory: Path) -> None:
        """Continues from the state in `directory`, if there is one of the same recipe."""
        if not (directory / STATE).is_file():
            return
        state = torch.load(directory / STATE, weights_only=True)
        if state["plan"] != asdict(self.plan):
            raise SystemExit(f"{directory} holds a training run of another recipe: {state['plan']}\n  Give another --out.")
        for name, weight in self.weights.items():
            weight.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def initial_weights(config: Glm5Config, seed: int) -> dict[str, Tensor]:
    """Unit-gain projections; norms one, biases zero. Embeddings of unit size, and little from the projections that write into the
    residual stream: a small embedding would drown in what the first blocks add to it."""
    specs = expected_tensors(config, mtp=True)
    read = random_weights(config, dtype=torch.float32, seed=seed, mtp=True)
    weights: dict[str, Tensor] = {}
    for name in specs:
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(specs[name].shape)
        elif len(specs[name].shape) == 1:
            weights[name] = torch.zeros(specs[name].shape)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[name] = read(name) * ((2 * config.num_hidden_layers) ** -0.5 if into_residual else 1.0)
    weights["model.embed_tokens.weight"] *= config.hidden_size**0.5
    weights["lm_head.weight"] *= 0.2
    return weights


def write_checkpoint(directory: Path, weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Writes what Hugging Face names: config.json, bfloat16 weights (router biases float32), tokenizer, generation_config."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {
        name: weight.detach().to(torch.float32 if name.endswith(CORRECTION_BIAS) else torch.bfloat16).contiguous()
        for name, weight in weights.items()
    }
    part = directory / "model.safetensors.part"
    save_file(stored, part, metadata={"format": "pt"})
    part.replace(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(dict(fields), indent=2) + "\n")
    ends = {"eos_token_id": fields["eos_token_id"], "pad_token_id": fields["pad_token_id"], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    write_byte_tokenizer(directory, ["<pad>", "<end>"])


@torch.no_grad()
def measure(trainer: Trainer, sample: Tensor, mode: str) -> dict[str, float]:
    """Mean losses of a held-out sample, the first two in bits per byte."""
    total: dict[str, float] = {}
    chunks = sample.split(4)
    for chunk in chunks:
        for name, value in trainer.losses(chunk, mode)[0].items():
            total[name] = total.get(name, 0.0) + float(value) / len(chunks)
    return {name: value / (1.0 if name == "indexer" else math.log(2)) for name, value in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains glm5-tiny-code.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; an interrupted run there is resumed")
    parser.add_argument("--dense", type=int, default=1500, help="steps with dense attention, 8 x 256 tokens each")
    parser.add_argument("--warm-up", type=int, default=100, help="steps that teach the indexers only, 4 x 512 tokens each")
    parser.add_argument("--sparse", type=int, default=350, help="steps with sparse attention, 4 x 512 tokens each")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--save-every", type=int, default=150, help="steps between checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = recipe(dense=options.dense, warm_up=options.warm_up, sparse=options.sparse, rate=options.rate)
    trainer = Trainer(plan)
    trainer.resume(options.out)
    text = corpus.standard_library()
    stream, held_out = corpus.token_stream(text.train), corpus.token_stream(text.held_out)
    origin = {"python": platform.python_version(), "corpus_sha256": text.digest, "plan": asdict(plan), "torch": torch.__version__}
    print(f"{len(stream):,} training bytes, {len(held_out):,} held out; {plan.steps} steps, at step {trainer.step}", flush=True)
    started, first = time.perf_counter(), trainer.step
    while trainer.step < plan.steps:
        stage = plan.at(trainer.step)
        shape = {"rows": stage.rows, "width": stage.context + 2, "seed": plan.seed, "step": trainer.step}
        found = trainer.train_step(corpus.batch(stream, **shape))
        done = trainer.step - first
        if trainer.step % 25 == 0:
            left = (time.perf_counter() - started) / done * (plan.steps - trainer.step)
            losses = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"step {trainer.step:5d}  {stage.mode:8s} {losses}  {left / 60:.0f} min left", flush=True)
        if trainer.step % options.save_every == 0 or trainer.step == plan.steps:
            sample = corpus.batch(held_out, rows=16, width=stage.context + 2, seed=1, step=0)
            losses = "  ".join(f"{name} {value:.3f}" for name, value in measure(trainer, sample, stage.mode).items())
            print(f"step {trainer.step:5d}  held out, bits per byte: {losses}", flush=True)
            trainer.save(options.out, origin)


if __name__ == "__main__":
    main()
