"""Generation: chunked prefill of unequal prompts, decode in one batch, and speculative decode with the MTP layer.

Speculation drafts with the MTP layer and verifies with the trunk: a draft is kept only where it equals the token that the
trunk chooses at that position, so the tokens are those of plain decoding. Shape legend: B sequences, T packed tokens, D hidden,
K selected positions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.cache import MAX_STEP_TOKENS, PagedCache, Span
from glm5_port.model.sampling import Sampling

if TYPE_CHECKING:
    from glm5_port.model.decoder import Glm5Model


@dataclass(frozen=True, slots=True)
class Emission:
    """New tokens of one sequence.

    Attributes:
        row: which prompt.
        tokens: one or more new tokens, in order.
        finished: "stop" (the last token is a stop id), "length" (max_new_tokens reached) or None.
    """

    row: int
    tokens: tuple[int, ...]
    finished: str | None


@dataclass(slots=True)
class _Sequence:
    """State of one sequence while it is generated.

    `tokens` are t_0 .. t_n; the trunk has cached positions 0 .. cached-1. `pending_TD` are trunk hidden states of positions
    drafted_to .. cached-1 that the MTP layer has not seen yet, because their next token was not known."""

    row: int
    cache_id: int
    tokens: list[int]
    limit: int
    cached: int = 0
    finished: str | None = None
    drafted_to: int = 0
    pending_TD: Tensor | None = None

    @property
    def remaining(self) -> int:
        return self.limit - len(self.tokens)


@dataclass(slots=True)
class SpeculationCounts:
    """How speculation went: rounds of verification, tokens drafted, tokens accepted."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Generation:
    """Mixed into `Glm5Model`: generate and stream.

    Attributes:
        stop_ids: tokens that end a sequence unless a call says otherwise.
        speculation: what speculation did, counted over the model's life.
    """

    stop_ids: tuple[int, ...]
    speculation: SpeculationCounts

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        draft_tokens: int = 1,
    ) -> Tensor | list[list[int]]:
        """Continues each prompt and returns prompt plus new tokens.

        Args:
            input_ids: [B, S] tensor of prompts of one length, or a list of prompts of any lengths.
            max_new_tokens: most new tokens of each prompt.
            stop_ids: tokens that end a sequence (they are kept); None takes those of generation_config.json or config.json,
                an empty sequence means none.
            temperature, top_k, top_p, seed: see `Sampling`; temperature 0 is greedy.
            draft_tokens: with an MTP layer, how many tokens are drafted for each verification.

        Returns:
            A list of lists for list input; for tensor input a [B, S + longest] tensor, where rows that ended earlier are filled
            with pad_token_id (or their own last token, when the config has no pad id).

        Raises:
            InputError: an empty prompt, ids that are no integers or outside the vocabulary, a negative max_new_tokens, or more
                positions than max_context.
        """
        prompts = _prompt_lists(input_ids)
        results = [list(prompt) for prompt in prompts]
        sampling = Sampling(temperature, top_k, top_p, seed)
        steps = self.stream(
            prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling, draft_tokens=draft_tokens
        )
        for emissions in steps:
            for emission in emissions:
                results[emission.row] += emission.tokens
        if not isinstance(input_ids, Tensor):
            return results
        longest = max((len(r) for r in results), default=0)
        pad = cast("Glm5Model", self).config.pad_token_id
        padded = [r + [r[-1] if pad is None else pad] * (longest - len(r)) for r in results]
        return torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device).view(len(results), longest)

    def stream(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        draft_tokens: int = 1,
    ) -> Iterator[list[Emission]]:
        """As `generate`, but yields the new tokens of each step as they come. Arguments are checked before the first step."""
        model = cast("Glm5Model", self)
        if max_new_tokens < 0 or draft_tokens < 1:
            raise InputError(
                f"max_new_tokens must be at least 0 and draft_tokens at least 1, got {max_new_tokens} and {draft_tokens}"
            )
        if model.speculates and draft_tokens >= MAX_STEP_TOKENS:
            raise InputError(f"draft_tokens={draft_tokens}: a step holds {MAX_STEP_TOKENS} tokens, one of which is no draft")
        lists = _prompt_lists(prompts)
        for row, prompt in enumerate(lists):
            if not prompt:
                raise InputError(f"prompt {row} is empty: each prompt needs at least one token")
            model.check_tokens(min(prompt), max(prompt), positions=len(prompt) + max_new_tokens)
        stops = frozenset(model.stop_ids if stop_ids is None else stop_ids)
        return self._run(model, lists, max_new_tokens, stops, sampling or Sampling(), draft_tokens)

    @staticmethod
    def _run(
        model: Glm5Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: frozenset[int],
        sampling: Sampling,
        draft_tokens: int,
    ) -> Iterator[list[Emission]]:
        if not prompts or max_new_tokens == 0:
            return
        cache = model.new_cache([len(prompt) + max_new_tokens for prompt in prompts])
        sequences = [
            _Sequence(row, cache.open(), list(prompt), len(prompt) + max_new_tokens) for row, prompt in enumerate(prompts)
        ]
        session = _Session(model, cache, stops, sampling, draft_tokens)
        with torch.inference_mode():
            emissions = session.prefill(sequences)
        yield emissions
        advance, each = (session.decode, 1) if not model.speculates else (session.verify_drafts, 1 + draft_tokens)
        together = MAX_STEP_TOKENS // each  # operators were promised steps of no more tokens
        while active := [s for s in sequences if s.finished is None]:
            with torch.inference_mode():
                groups = [active[first : first + together] for first in range(0, len(active), together)]
                emissions = [emission for group in groups for emission in advance(group)]
            yield emissions


def _prompt_lists(input_ids: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise InputError(f"input_ids must be [B, S] or a list of prompts, got a tensor of shape {tuple(input_ids.shape)}")
        input_ids = input_ids.tolist()
    try:
        return [[operator.index(token) for token in prompt] for prompt in input_ids]
    except TypeError as error:
        raise InputError(f"input_ids must be a list of prompts, each a list of integer token ids: {error}") from error


@dataclass(slots=True)
class _Session:
    """One generation: the model, its cache, and how tokens are chosen."""

    model: Glm5Model
    cache: PagedCache
    stops: frozenset[int]
    sampling: Sampling
    draft_tokens: int

    def _step(self, spans: Sequence[Span], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Runs the trunk; returns hidden states [T, D], and those of each span's last token [B, D]. Who does not speculate reads
        only the latter, and gets them as both: with several ranks the others stay where they are."""
        batch = self.cache.batch(spans)
        tokens_T = torch.tensor(tokens, dtype=torch.int64, device=self.model.device)
        if not self.model.speculates:
            last_BD = self.model.step(tokens_T, batch, self.cache, batch.last_rows_B)
            return last_BD, last_BD
        hidden_TD = self.model.step(tokens_T, batch, self.cache)
        return hidden_TD, hidden_TD[batch.last_rows_B]

    def prefill(self, sequences: Sequence[_Sequence]) -> list[Emission]:
        """Caches every prompt in chunks of at most the model's step size and chooses each first token."""
        emissions: list[Emission] = []
        waiting = list(sequences)
        while waiting:
            members: list[_Sequence] = []
            spans: list[Span] = []
            room = MAX_STEP_TOKENS
            for sequence in waiting:
                count = min(room, len(sequence.tokens) - sequence.cached)
                if count == 0:
                    break
                members.append(sequence)
                spans.append(Span(sequence.cache_id, sequence.cached, count))
                room -= count
            tokens = [t for s, span in zip(members, spans, strict=True) for t in s.tokens[span.start : span.start + span.count]]
            hidden_TD, last_BD = self._step(spans, tokens)
            counts = [span.count for span in spans]
            for sequence, count in zip(members, counts, strict=True):
                sequence.cached += count
            done = [place for place, s in enumerate(members) if s.cached == len(s.tokens)]
            waiting = [s for s in waiting if s.cached < len(s.tokens)]
            if self.model.speculates:
                for sequence, hidden in zip(members, hidden_TD.split(counts), strict=True):
                    self._remember(sequence, hidden)
                self._digest(members)
            if done:
                emissions += self._choose([members[place] for place in done], last_BD[done])
        return emissions

    def _remember(self, sequence: _Sequence, hidden_TD: Tensor) -> None:
        pending = sequence.pending_TD
        sequence.pending_TD = hidden_TD if pending is None else torch.cat([pending, hidden_TD])

    def _choose(self, sequences: Sequence[_Sequence], hidden_BD: Tensor) -> list[Emission]:
        """Chooses one token for each sequence from its last hidden state."""
        rows, positions = [s.row for s in sequences], [len(s.tokens) for s in sequences]
        tokens = self.model.choose(self.sampling, hidden_BD, rows, positions)
        return [self._append(sequence, [token]) for sequence, token in zip(sequences, tokens, strict=True)]

    def _append(self, sequence: _Sequence, tokens: Sequence[int]) -> Emission:
        """Adds tokens up to the first stop id or the limit, and closes the sequence when it has ended."""
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            if token in self.stops:
                sequence.finished = "stop"
                break
        sequence.tokens += kept
        if sequence.finished is None and sequence.remaining == 0:
            sequence.finished = "length"
        if sequence.finished is not None:
            self.cache.close(sequence.cache_id)
        return Emission(sequence.row, tuple(kept), sequence.finished)

    def decode(self, active: Sequence[_Sequence]) -> list[Emission]:
        """One token for each active sequence."""
        spans = [Span(s.cache_id, s.cached, 1) for s in active]
        hidden_BD, _ = self._step(spans, [s.tokens[-1] for s in active])
        for sequence in active:
            sequence.cached += 1
        return self._choose(active, hidden_BD)

    # -- speculation ---------------------------------------------------------------------------------------------------

    def _digest(self, sequences: Sequence[_Sequence]) -> tuple[Tensor, Tensor | None] | None:
        """Shows the MTP layer every trunk state whose next token is known by now.

        Returns:
            For each sequence that there was something to show of: the MTP layer's last output [B, D] and the positions it
            selected [B, K] (None when attention is dense). None when there was nothing at all.
        """
        known = [min(s.cached, len(s.tokens) - 1) for s in sequences]
        work = [(s, upto - s.drafted_to) for s, upto in zip(sequences, known, strict=True) if upto > s.drafted_to]
        if not work:
            return None
        spans = [Span(s.cache_id, s.drafted_to, count) for s, count in work]
        tokens = [t for s, count in work for t in s.tokens[s.drafted_to + 1 : s.drafted_to + 1 + count]]
        hidden_TD = torch.cat([cast(Tensor, s.pending_TD)[:count] for s, count in work])
        out_BD, indices_BK = self._draft(spans, tokens, hidden_TD, None)
        for sequence, count in work:
            sequence.drafted_to += count
            sequence.pending_TD = cast(Tensor, sequence.pending_TD)[count:]
        return out_BD, indices_BK

    def _draft(
        self, spans: Sequence[Span], tokens: Sequence[int], hidden_TD: Tensor, indices_BK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of the MTP layer; returns its output and selection at the last token of each span."""
        model = self.model
        batch = self.cache.batch(spans)
        tokens_T = torch.tensor(tokens, dtype=torch.int64, device=model.device)
        out_TD, indices_TK = model.draft(hidden_TD, tokens_T, batch, self.cache, indices_BK)
        last = batch.last_rows_B
        return out_TD[last], None if indices_TK is None else indices_TK[last]

    def verify_drafts(self, active: Sequence[_Sequence]) -> list[Emission]:
        """Drafts up to draft_tokens for each sequence, runs the trunk over them once, and keeps what agrees."""
        drafts = self._draft_tokens(active)
        spans = [Span(s.cache_id, s.cached, 1 + len(d)) for s, d in zip(active, drafts, strict=True)]
        tokens = [t for s, d in zip(active, drafts, strict=True) for t in (s.tokens[-1], *d)]
        hidden_TD, _ = self._step(spans, tokens)
        rows = [s.row for s, span in zip(active, spans, strict=True) for _ in range(span.count)]
        positions = [span.start + 1 + i for span in spans for i in range(span.count)]
        chosen = self.model.choose(self.sampling, hidden_TD, rows, positions)
        speculation = self.model.speculation
        speculation.rounds += 1
        emissions, first = [], 0
        for sequence, draft, span, hidden in zip(
            active, drafts, spans, hidden_TD.split([span.count for span in spans]), strict=True
        ):
            truth = chosen[first : first + span.count]
            first += span.count
            agreed = next((i for i, token in enumerate(draft) if token != truth[i]), len(draft))
            speculation.drafted += len(draft)
            speculation.accepted += agreed
            sequence.cached += 1 + agreed
            self._remember(sequence, hidden[: 1 + agreed])
            emissions.append(self._append(sequence, truth[: 1 + agreed]))
        return emissions

    def _draft_tokens(self, active: Sequence[_Sequence]) -> list[list[int]]:
        """Greedy drafts; fewer where the sequence is about to reach its limit."""
        digested = self._digest(active)
        if digested is None:
            raise InputError("the MTP layer has no trunk state to draft from")  # every active sequence has a pending state
        out_BD, indices_BK = digested
        wanted = [min(self.draft_tokens, s.remaining - 1) for s in active]
        drafts: list[list[int]] = [[] for _ in active]
        alive = [i for i, count in enumerate(wanted) if count > 0]
        out_BD, indices_BK = self._rows(out_BD, indices_BK, alive)
        while alive:
            rows, positions = [active[i].row for i in alive], [len(active[i].tokens) + len(drafts[i]) for i in alive]
            for i, token in zip(alive, self.model.choose(Sampling(), out_BD, rows, positions), strict=True):
                drafts[i].append(token)
            keep = [place for place, i in enumerate(alive) if len(drafts[i]) < wanted[i]]
            alive = [alive[place] for place in keep]
            if not alive:
                break
            out_BD, indices_BK = self._rows(out_BD, indices_BK, keep)
            spans = [Span(active[i].cache_id, active[i].drafted_to + len(drafts[i]) - 1, 1) for i in alive]
            shared = indices_BK if self.model.config.index_share_for_mtp_iteration else None
            out_BD, fresh_BK = self._draft(spans, [drafts[i][-1] for i in alive], out_BD, shared)
            indices_BK = shared if shared is not None else fresh_BK
        return drafts

    @staticmethod
    def _rows(out_BD: Tensor, indices_BK: Tensor | None, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        place = torch.tensor(rows, dtype=torch.int64, device=out_BD.device)
        return out_BD[place], None if indices_BK is None else indices_BK[place]
