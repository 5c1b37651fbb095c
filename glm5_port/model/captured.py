"""One decode step of a model as a CUDA graph: captured once with fixed shapes, replayed with the numbers of each step.

A decode step starts some two thousand kernels, each of which costs the host more than many of them take on the card. A graph
starts them all at once. What it needs is given by the operators: no host sync, and shapes that depend on nothing but the batch.

Never run on a GPU by this project; tests run everything but the capture itself on the CPU.

Shape legend: B sequences of a step, one new token each; N pages of a sequence at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.cache import DECODE, Batch, PagedCache, Span

WARM_UPS = 2
"""Steps before the capture: kernels are compiled and libraries take their workspaces, neither of which a capture may see."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]


def capture_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Records what `step` starts on the current device. Returns (replay, the tensor that each replay fills)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class CapturedDecode:
    """Decode steps of a fixed number of sequences by one captured graph.

    Args:
        model: a `Glm5Model` on a CUDA device, built for inference.
        cache: its cache; the graph keeps reading and writing this one.
        sequences: B of every step.
        pages: N, entries of the block table. The indexer scores all positions that it covers, written or not, so take what the
            longest sequence of the batch may reach, not what the model can.
        capture: how a step is recorded; another one is for tests.

    Raises:
        InputError: the model is not on a CUDA device, or trainable.
    """

    def __init__(self, model: Any, cache: PagedCache, *, sequences: int, pages: int, capture: Capture | None = None) -> None:
        if model.trainable or (capture is None and model.device.type != "cuda"):
            raise InputError(
                f"CapturedDecode: a model on {model.device.type}, trainable={model.trainable}\n"
                "  supported: a model for inference on a CUDA device"
            )
        device = model.device
        self.cache = cache
        self._tokens_B = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._batch = Batch(
            positions_T=torch.zeros(sequences, dtype=torch.int64, device=device),
            query_starts_B1=torch.arange(sequences + 1, dtype=torch.int32, device=device),
            lengths_B=torch.ones(sequences, dtype=torch.int32, device=device),
            block_table_BN=torch.zeros(sequences, pages, dtype=torch.int32, device=device),
            slots_T=torch.full((sequences,), -1, dtype=torch.int64, device=device),  # warming up writes nothing
            last_rows_B=torch.arange(sequences, dtype=torch.int64, device=device),
            phase=DECODE,
        )

        def step() -> Tensor:
            with torch.no_grad():
                logits: Tensor = model.logits(model.step(self._tokens_B, self._batch, cache))
            return logits

        self._replay, self._logits_BV = (capture or capture_graph)(step)

    def __call__(self, tokens_B: Tensor, spans: Sequence[Span]) -> Tensor:
        """One step.

        Args:
            tokens_B: [B] int64, the newest token of each sequence.
            spans: where they stand, one token each, in the order of tokens_B.

        Returns:
            [B, vocab] logits; the next step overwrites them.

        Raises:
            InputError: another number of sequences, more than one token, or more pages than were captured.
        """
        batch = self.cache.batch(spans)
        sequences, pages = self._batch.block_table_BN.shape
        if batch.phase != DECODE or len(spans) != sequences or batch.block_table_BN.shape[1] > pages:
            raise InputError(
                f"CapturedDecode: {len(spans)} spans ({batch.phase}) of at most {batch.block_table_BN.shape[1]} pages\n"
                f"  supported: {sequences} sequences with one new token each, and at most {pages} pages, as captured"
            )
        self._tokens_B.copy_(tokens_B)
        for field in fields(Batch):
            ours, theirs = getattr(self._batch, field.name), getattr(batch, field.name)
            if field.name == "block_table_BN":
                ours[:, : theirs.shape[1]].copy_(theirs)
            elif isinstance(ours, Tensor):
                ours.copy_(theirs)
        self._replay()
        return self._logits_BV
