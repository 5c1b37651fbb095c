"""Where a parallel plan meets the model: what this rank holds, and what travels between ranks. `Ranks` is the plan of one
rank, which holds everything and sends nothing; `glm5_port.parallel.execute` has the others.

The model is written for one rank. At the points below it asks its `Ranks`, and nowhere else does it know that there are others:

    part                what the layers of this rank are made of
    new_cache           sequences and layers of this rank; its batches say which of a step's tokens are computed here
    enter, leave        tokens -> hidden states of this rank's rows, from the embedding or the stage before; and back to all rows
    carry, collect, rows_here, rows_of_step      the same for what the MTP layer reads and returns
    gather, add_up      around a block whose weights are divided (attention, dense MLP): rows of the block, sum of its parts
    share_cache         rows of the cache that other ranks computed
    exchange            tokens to their experts and back
    logits, choose      the vocabulary, which may be divided too

Shape legend: T packed tokens of a step, t rows that this rank carries between blocks, D hidden, K selected positions, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.cache import Batch, PagedCache
from glm5_port.selection import Selection, check_ranks_agree

if TYPE_CHECKING:
    from glm5_port.model.bindings import Binder
    from glm5_port.model.sampling import Sampling

Experts = Callable[..., Tensor]
"""(hidden, route_weights, ids) -> the weighted sums of the experts of this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the layers of one rank are made of.

    Attributes:
        config: with this rank's attention heads and its width of the dense MLP.
        layers: numbers of its layers.
        experts: number of the checkpoint's expert in each of its slots.
        expert_width, shared_width: this rank's columns of a routed expert and of the shared one.
        vocabulary: rows of the embedding and of the head.
        has_embedding, has_head: whether they are here.
    """

    config: Glm5Config
    layers: tuple[int, ...]
    experts: Callable[[int], Sequence[int]]
    expert_width: int
    shared_width: int
    vocabulary: int
    has_embedding: bool
    has_head: bool


class Exchange:
    """Routed experts and the shared expert of one layer, where every expert is here."""

    def __call__(
        self, hidden_TD: Tensor, route_weights_TK: Tensor, ids_TK: Tensor, batch: Batch, experts: Experts, shared: Experts
    ) -> Tensor:
        return experts(hidden=hidden_TD, route_weights=route_weights_TK, ids=ids_TK) + shared(hidden_TD)


class Ranks:
    """The plan of one rank. See the head of this file for what its methods are for.

    Attributes:
        alone: whether the whole model is here.
    """

    alone = True

    def part(self, config: Glm5Config, *, selects: bool) -> Part:
        """Args: selects, whether attention reads selected positions only."""
        every = range(config.n_routed_experts)
        return Part(
            config=config,
            layers=config.layers,
            experts=lambda layer: every,
            expert_width=config.moe_intermediate_size,
            shared_width=config.shared_intermediate_size,
            vocabulary=config.vocab_size,
            has_embedding=True,
            has_head=True,
        )

    def cut(self, name: str, component: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """(dimension, first, size) of this rank's part of a checkpoint tensor; None for all of it."""
        return None

    def describe(self) -> dict[str, Any] | None:
        """The layout as plain data, for reports; None for one rank."""
        return None

    def check_choices(self, selections: Sequence[Selection]) -> None:
        """Stops every rank where ranks chose different implementations for a model; `selections` are its choices."""
        check_ranks_agree(selections)

    def new_cache(self, lengths: Sequence[int], page_size: int, **options: Any) -> PagedCache:
        """A cache with room for sequences of these final lengths, opened in this order."""
        return PagedCache(pages=max(1, sum(-(-n // page_size) for n in lengths)), page_size=page_size, **options)

    # -- one step --------------------------------------------------------------------------------------------------------

    def enter(self, tokens_T: Tensor, embedding: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns: hidden states [t, D] of the rows that this rank carries, and the last selection [T, K] of the stage before."""
        return self.embed(tokens_T, embedding, batch), None

    def embed(self, tokens_T: Tensor, embedding: Tensor | None, batch: Batch) -> Tensor:
        """Embeddings [t, D] of the rows that this rank carries."""
        return F.embedding(tokens_T, _loaded(embedding))

    def leave(
        self,
        block_TD: Tensor,
        residual_TD: Tensor,
        indices_TK: Tensor | None,
        batch: Batch,
        norm: Callable[..., Any] | None,
        rows_B: Tensor | None = None,
    ) -> Tensor:
        """Returns: hidden states of some tokens after the final norm, None for all, on the ranks that have a head."""
        return self.collect(_loaded(norm)(block_TD, residual_TD)[0], batch, rows_B)

    def collect(self, hidden_TD: Tensor, batch: Batch, rows_B: Tensor | None = None) -> Tensor:
        """[t, D] of the rows that this rank carries -> [B, D], some rows of the step; None: all."""
        return hidden_TD if rows_B is None else hidden_TD[rows_B]

    def carry(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """The way back of `collect`."""
        return hidden_TD

    def rows_here(self, rows_TK: Tensor | None, batch: Batch) -> Tensor | None:
        """Of a step's rows, those that this rank's attention computes."""
        return rows_TK

    def rows_of_step(self, rows_TK: Tensor | None, batch: Batch) -> Tensor | None:
        """The way back of `rows_here`; rows of other ranks hold anything."""
        return rows_TK

    def gather(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """The rows that a divided block computes, from those that each rank carries."""
        return hidden_TD

    def add_up(self, parts_TD: Tensor, batch: Batch) -> Tensor:
        """The sum of a divided block's parts, for the rows that this rank carries."""
        return parts_TD

    def share_cache(self, fields: list[Tensor], batch: Batch) -> None:
        """Fills in the rows of a layer's cache that other ranks computed in this step."""

    def observe(self, indices_TK: Tensor | None) -> None:
        """Is shown every selection, which ranks must make alike."""

    def exchange(self, bind: Binder, layer: int, config: Glm5Config) -> Exchange:
        """How the tokens of a layer meet its experts."""
        return Exchange()

    # -- logits and tokens -----------------------------------------------------------------------------------------------

    def logits(self, head: Callable[[Tensor], Tensor] | None, hidden: Tensor) -> Tensor:
        """[..., V] on every rank."""
        return _loaded(head)(hidden)

    def choose(
        self,
        sampling: Sampling,
        head: Callable[[Tensor], Tensor] | None,
        hidden_BD: Tensor,
        sequences: Sequence[int],
        positions: Sequence[int],
    ) -> list[int]:
        """The next token of each row, on every rank; see `Sampling.choose`."""
        return sampling.choose(self.logits(head, hidden_BD), sequences, positions)


def _loaded(part: Any) -> Any:
    if part is None:
        raise InputError("this model has no weights yet: build it with glm5_port.load(path)")
    return part
