"""GLM-5: embedding, decoder layers, final norm and head, composed of operators that were bound at construction.

Shape legend: B sequences, S padded length, T packed tokens of a step, D hidden, R rope dims, K selected positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.errors import InputError, SelectionError
from glm5_port.model.bindings import Binder, BoundLayer
from glm5_port.model.cache import MAX_STEP_TOKENS, Batch, PagedCache, Span
from glm5_port.model.facts import operator_facts
from glm5_port.model.generate import Generation, SpeculationCounts
from glm5_port.model.layers import WIDE, DecoderLayer, Norm, Options, Step
from glm5_port.model.mtp import MtpLayer
from glm5_port.model.ranks import Ranks
from glm5_port.model.sampling import Sampling
from glm5_port.operators.rope import rotary_angles
from glm5_port.requests import requested_context
from glm5_port.selection import Selection

DEFAULT_BLOCK_SIZE = 64
"""Rows of a cache page unless the caller says otherwise: what CUDA kernels read; Ascend prefers 128."""


class Glm5Model(Generation, nn.Module):
    """A GLM-5 model. Build it with `glm5_port.load`, or with `glm5_port.model.build.build` from tensors of your own.

    Attributes:
        config: the architecture, with the latent-norm eps that was asked for.
        backend: name of the backend that it was put on.
        device, dtype: where and in what it computes.
        cache_format, block_size, max_context: how it caches.
        int4_activations: what INT4 experts multiply with: "wide" (the working dtype, W4A16), "int8" or "int8_groups" (W4A8).
        speculates: whether generation drafts with the MTP layer.
        mtp: that layer, or None; of several stages the last has it.
        ranks: how it shares its work with other ranks; alone unless a plan says otherwise.
        part: what of the model is here.
        source: directory of the checkpoint that it was loaded from, if any.
    """

    def __init__(
        self,
        config: Glm5Config,
        *,
        backend: str,
        requested: str | None,
        device: torch.device,
        dtype: torch.dtype,
        cache_format: str = "plain",
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_context: int | None = None,
        mtp: bool = False,
        int4_activations: str = WIDE,
        trainable: bool = False,
        implementation: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks or Ranks()
        self.backend = backend
        self.device = device
        self.dtype = dtype
        self.cache_format = cache_format
        self.block_size = block_size
        self.max_context = max_context or config.max_position_embeddings
        self.int4_activations = int4_activations
        self.trainable = trainable
        self.stop_ids = config.eos_token_id
        self.source: Path | None = None  # `load` sets it
        self.speculation = SpeculationCounts()
        self._context_at_construction = requested_context()
        self.dense_attention = self.max_context <= config.index_topk
        self.part = part = self.ranks.part(config, selects=not self.dense_attention)
        self.binder = bind = Binder(
            backend=requested,
            device=device,
            dtype=dtype,
            trainable=trainable,
            implementation=implementation,
            limits={"max_tokens": MAX_STEP_TOKENS, "max_context": self.max_context},
            facts=operator_facts(part.config, cache_format=cache_format, page_size=block_size),
        )
        options = Options(self.dense_attention, cache_format, int4_activations, self.ranks, part)
        self.layers = nn.ModuleList(DecoderLayer(part.config, bind, number, options) for number in part.layers)
        self.norm = Norm(config, bind) if part.has_head else None
        self.head = BoundLayer(bind(ops.linear, width_out=part.vocabulary)) if part.has_head else None
        self.embedding: nn.Parameter | None = None  # set while loading
        self.speculates = mtp
        self.mtp = MtpLayer(part.config, bind, options) if mtp and part.has_head else None

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, tokens_T: Tensor, batch: Batch, cache: PagedCache, rows_B: Tensor | None = None) -> Tensor:
        """Runs the trunk over one step's packed tokens, writing the cache.

        Args:
            rows_B: int64, the tokens whose hidden states are asked for; None: all.

        Returns:
            [B, D] hidden states after the final norm (on ranks without a head: zeros).
        """
        if (context := requested_context()) != self._context_at_construction and context is not None:
            raise SelectionError(
                f"use_backend({context!r}) around a model that is built already has no effect: its operators were bound at "
                f"construction ({self.backend}).\n"
                "  Use model.rebind(operator, implementation), or load the model inside the context."
            )
        step = self.locate(batch)
        block_TD, indices_TK = self.ranks.enter(tokens_T, self.embedding, batch)
        residual_TD = torch.zeros_like(block_TD)  # the embedding enters as a block output, so that every norm has one form
        for number, layer, layer_cache in zip(self.part.layers, self.layers, cache.layers, strict=False):  # MTP has one more
            shared = None if self.config.owns_indexer(number) else indices_TK
            block_TD, residual_TD, indices_TK = layer(block_TD, residual_TD, step, layer_cache, shared)
            if shared is None:
                self.ranks.observe(indices_TK)
        return self.ranks.leave(block_TD, residual_TD, indices_TK, batch, self.norm, rows_B)

    def locate(self, batch: Batch) -> Step:
        """Computes the rotary angles of a step's tokens, once for all layers."""
        cos_TR, sin_TR = rotary_angles(batch.positions_T, self.config.rope_theta, self.config.qk_rope_head_dim)
        wide = torch.promote_types(self.dtype, torch.float32)
        return Step(batch, cos_TR.to(wide), sin_TR.to(wide))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states after a final norm -> [..., vocab]."""
        return self.ranks.logits(self.head, hidden)

    def choose(self, sampling: Sampling, hidden_BD: Tensor, sequences: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The token that follows each row's hidden state; `sequences` and `positions` as in `Sampling.choose`."""
        return self.ranks.choose(sampling, self.head, hidden_BD, sequences, positions)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """[T] token ids -> [T, D]."""
        if self.embedding is None:
            raise InputError("this model has no weights yet: build it with glm5_port.load(path)")
        return F.embedding(tokens_T, self.embedding)

    def draft(
        self, hidden_TD: Tensor, tokens_T: Tensor, batch: Batch, cache: PagedCache, indices_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of the MTP layer over a step's tokens, writing its cache.

        Args:
            hidden_TD: [T, D], the trunk's hidden states, or the last draft's.
            tokens_T: the tokens after them.
            indices_TK: the selection of the first draft where drafts share it, else None.

        Returns:
            [T, D] and the selection [T, K], whose rows are right where this rank's attention computes them.
        """
        if self.mtp is None:
            return torch.zeros_like(hidden_TD), None
        ranks = self.ranks
        embedded_TD = ranks.embed(tokens_T, self.embedding, batch)
        here_TK = ranks.rows_here(indices_TK, batch)
        out_TD, here_TK = self.mtp(ranks.carry(hidden_TD, batch), embedded_TD, self.locate(batch), cache.layers[-1], here_TK)
        return ranks.collect(out_TD, batch), ranks.rows_of_step(here_TK, batch)

    def new_cache(self, tokens: Sequence[int]) -> PagedCache:
        """A cache with room for sequences of the given final lengths."""
        index_layers = [self.config.owns_indexer(i) and not self.dense_attention for i in self.part.layers]
        if self.mtp is not None:
            index_layers.append(not self.dense_attention)
        return self.ranks.new_cache(
            tokens,
            self.block_size,
            config=self.config,
            index_layers=index_layers,
            cache_format=self.cache_format,
            dtype=self.dtype,
            device=self.device,
        )

    # -- whole sequences -----------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits of every position, without keeping a cache.

        Args:
            input_ids: [B, S] token ids, padded on the right where lengths differ.
            lengths: tokens of each row; None means all S.

        Returns:
            [B, S, vocab] in the model's dtype; rows beyond a sequence's length are zero.

        Raises:
            InputError: wrong shape or dtype, ids outside the vocabulary, or more positions than max_context.
        """
        if input_ids.dim() != 2:
            raise InputError(
                f"input_ids must be [B, S], got shape {tuple(input_ids.shape)}; wrap a single sequence in a batch of one"
            )
        lengths = [input_ids.shape[1]] * input_ids.shape[0] if lengths is None else list(lengths)
        if len(lengths) != input_ids.shape[0] or not all(0 <= n <= input_ids.shape[1] for n in lengths):
            raise InputError(f"lengths={lengths} does not fit input_ids of shape {tuple(input_ids.shape)}")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise InputError(f"input_ids must hold integers, got {input_ids.dtype}")
        lowest, highest = (int(input_ids.min()), int(input_ids.max())) if input_ids.numel() else (0, 0)
        self.check_tokens(lowest, highest, positions=max(lengths, default=0))
        cache = self.new_cache(lengths)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size, dtype=self.dtype, device=self.device)
        for row, length in enumerate(lengths):
            sequence = cache.open()
            for start in range(0, length, MAX_STEP_TOKENS):
                stop = min(start + MAX_STEP_TOKENS, length)
                tokens_T = input_ids[row, start:stop].to(self.device)
                hidden_TD = self.step(tokens_T, cache.batch([Span(sequence, start, stop - start)]), cache)
                logits[row, start:stop] = self.logits(hidden_TD)
        return logits

    def check_tokens(self, lowest: int, highest: int, *, positions: int) -> None:
        """Raises InputError for ids outside the vocabulary or sequences beyond max_context."""
        if positions > self.max_context:
            raise InputError(
                f"{positions} positions were asked for, this model was loaded for max_context={self.max_context}\n"
                f"  Load it with a larger max_context (its config allows {self.config.max_position_embeddings})."
            )
        if lowest < 0 or highest >= self.config.vocab_size:
            raise InputError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {lowest}..{highest}")

    # -- placement -----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Glm5Model:
        """Behind `to`, `cuda`, `half` and their kin: a model may move within its device type, and nothing else, because its
        operators were chosen for that device and dtype (and the router's bias must stay float32)."""
        probes = [torch.empty(0, dtype=dtype, device=self.device) for dtype in (self.dtype, torch.float32)]
        moved = [fn(probe) for probe in probes]
        if any(m.dtype != p.dtype or m.device.type != p.device.type for m, p in zip(moved, probes, strict=True)):
            raise InputError(
                f"this model's operators were bound for {self.dtype} on {self.device.type}; it cannot become {moved[0].dtype} on "
                f"{moved[0].device.type}\n  Load it again with backend=... and dtype=..."
            )
        super()._apply(fn, recurse)
        self.device = moved[0].device
        return self

    # -- decisions -----------------------------------------------------------------------------------------------------

    def decisions(self) -> list[Selection]:
        """The decision record of every distinct binding."""
        return self.binder.decisions()

    def rebind(self, operator: str, implementation: str) -> int:
        """Changes a choice after construction; see `Binder.rebind`."""
        return self.binder.rebind(operator, implementation)
