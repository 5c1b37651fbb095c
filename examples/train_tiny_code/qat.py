"""INT4-aware training of a checkpoint on the text that it was trained on.

Masters of everything that an export quantises learn to keep the distribution of the checkpoint as it is (KL, `kl_to_teacher`),
while forward passes compute with bf16(q * s). Everything else rests, so that what ships differs in these matrices alone. The
forward pass is that of `network.py`, four times as fast here as the library's own and with the same logits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.train_tiny_code import corpus
from examples.train_tiny_code.network import SPARSE, Network
from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.checkpoint import Checkpoint
from glm5_port.model.stored_tensors import SINGLE_FILE
from glm5_port.model.tensors import expected_tensors
from glm5_port.quant import PER_CHANNEL, Int4Rule
from glm5_port.quant.fake_quantize import record_of
from glm5_port.quant.places import Piece
from glm5_port.quant.plan import Options, plan_export
from glm5_port.quant.qat import FakeQuantize, kl_to_teacher

Weights = dict[str, Tensor]
Progress = Callable[[int, float], None]
"""Called after each step with its number and its loss."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is quantised, and how.

    Attributes:
        title: for tables.
        rule: how.
        patterns: projections beside the routed experts, as `include` of an export and `patterns` of `prepare_qat`.
    """

    title: str
    rule: Int4Rule
    patterns: tuple[str, ...] = ()

    def options(self) -> Options:
        """Of the export."""
        return Options(rule=self.rule, include=self.patterns)


EXPERTS = Setting("routed experts, groups of 32", Int4Rule())
EVERYTHING = Setting(
    "all projections, per channel", Int4Rule(group_size=PER_CHANNEL), ("self_attn", "shared_experts", r"mlp\.(gate|up|down)_proj")
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How masters are trained.

    Attributes:
        steps: of AdamW, without weight decay.
        rate: peak learning rate; warms up for a tenth of the steps, then falls along a cosine to 2 %.
        rows, context: shape of a batch.
        seed: of the batches.
    """

    steps: int = 300
    rate: float = 2e-4
    rows: int = 4
    context: int = 256
    seed: int = 7

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.steps // 10))
        return self.rate * warm * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


class Student:
    """A checkpoint of which the quantised matrices learn.

    Args:
        source: directory of a bf16 checkpoint.
        setting: which matrices.
        quantised: False lets forward passes compute with the masters themselves: the control of an experiment.

    Attributes:
        masters: checkpoint name -> float32 parameter; those of the trunk.
        losses: KL to the teacher in nats for each byte, by step.

    Raises:
        Glm5PortError: no bf16 checkpoint of one file, one whose tokens are not bytes, or a setting that does not fit it.
    """

    def __init__(self, source: Path, setting: Setting, *, quantised: bool = True) -> None:
        with Checkpoint.open(source) as checkpoint:
            self.config: Glm5Config = checkpoint.config
            if checkpoint.stored.files != (SINGLE_FILE,) or self.config.vocab_size <= corpus.END:
                raise InputError(
                    f"{source} has {len(checkpoint.stored.files)} weight file(s) and {self.config.vocab_size} tokens\n"
                    f"  supported: one file, {SINGLE_FILE}, and bytes as tokens (at least 258), as train.py writes it"
                )
            names = expected_tensors(self.config, mtp=False)
            self.teacher: Weights = {name: checkpoint.tensor(name, torch.float32) for name in names}
        planned = plan_export(source, setting.options()).quantized
        self.masters = {t.name: nn.Parameter(self.teacher[t.name].clone()) for t in planned if not t.mtp}
        self.quantisers: dict[str, FakeQuantize] = {}
        for name, master in self.masters.items() if quantised else ():
            record = record_of(master.detach(), None, setting.rule, name)
            self.quantisers[name] = FakeQuantize(name, setting.rule, torch.float32, [Piece(name)], record, learned=False)
        self.losses: list[float] = []

    def loss(self, tokens_BS: Tensor) -> Tensor:
        """KL to the teacher on a batch."""
        with torch.no_grad():
            target = self._logits(self.teacher, tokens_BS)
        values = {name: self.quantisers[name](m) if self.quantisers else m for name, m in self.masters.items()}
        return kl_to_teacher(self._logits(self.teacher | values, tokens_BS), target)

    def train(self, stream: Tensor, recipe: Recipe, progress: Progress | None = None) -> None:
        """Trains on random windows of a stream of tokens. One more forward pass follows the last step: it computes with what
        ships.

        Args:
            stream: [tokens] of the training text.
            recipe: how.
            progress: called after each step.
        """
        optimizer = torch.optim.AdamW(self.masters.values(), lr=recipe.rate, betas=(0.9, 0.97), weight_decay=0.0)
        shape = {"rows": recipe.rows, "width": recipe.context, "seed": recipe.seed}
        for step in range(recipe.steps):
            loss = self.loss(corpus.batch(stream, **shape, step=step))
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            optimizer.step()
            self.losses.append(float(loss.detach()))
            if progress is not None:
                progress(step + 1, self.losses[-1])
        with torch.no_grad():
            self.losses.append(float(self.loss(corpus.batch(stream, **shape, step=recipe.steps))))

    def used(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(packed codes, scales) of every matrix, as the last forward pass computed with them."""
        records = {name: quantiser.record for name, quantiser in self.quantisers.items()}
        return {name: (record.packed, record.scales) for name, record in records.items() if record is not None}

    def _logits(self, weights: Mapping[str, Tensor], tokens_BS: Tensor) -> Tensor:
        network = Network(self.config, weights, mode=SPARSE, positions=tokens_BS.shape[1])
        return network.logits(network.trunk(tokens_BS))


def write_masters(source: Path, destination: Path, masters: Mapping[str, Tensor]) -> None:
    """A copy of a checkpoint of one file with bf16(master) in it, with which every rule begins."""
    shutil.copytree(source, destination)
    stored = load_file(destination / SINGLE_FILE)
    stored |= {name: master.detach().to(torch.bfloat16) for name, master in masters.items()}
    save_file(stored, destination / SINGLE_FILE, metadata={"format": "pt"})
