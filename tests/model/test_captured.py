"""The decode step that a CUDA graph captures, with a stand-in for the capture: no GPU runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span
from glm5_port.model.captured import CapturedDecode
from glm5_port.testing.tiny import tiny_config

CONFIG = tiny_config(num_hidden_layers=4)
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1])


def stand_in(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """As a graph does: the result lies in one place, and nothing but the tensors that a step was captured with is read."""
    result = step()
    return lambda: result.copy_(step()), result


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CONFIG, random_weights(CONFIG, dtype=torch.float32))


def prefilled(model: Any) -> tuple[Any, list[int], Tensor]:
    cache = model.new_cache([40, 40])
    sequences = [cache.open() for _ in PROMPTS]
    spans = [Span(sequence, 0, len(prompt)) for sequence, prompt in zip(sequences, PROMPTS, strict=True)]
    batch = cache.batch(spans)
    with torch.no_grad():
        hidden = model.step(torch.tensor([token for prompt in PROMPTS for token in prompt]), batch, cache)
        return cache, sequences, model.logits(hidden[batch.last_rows_B]).argmax(-1)


def test_captured_steps_give_the_tokens_of_plain_ones(model: Any) -> None:
    plain_cache, plain_sequences, plain = prefilled(model)
    cache, sequences, tokens = prefilled(model)
    before = [[field.clone() for field in layer.latent] for layer in cache.layers]
    captured = CapturedDecode(model, cache, sequences=2, pages=3, capture=stand_in)
    for layer, fields in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.latent, fields, strict=True)), "capturing wrote the cache"
    for step in range(5):
        lengths = [len(prompt) + step for prompt in PROMPTS]
        spans = [Span(sequence, length, 1) for sequence, length in zip(plain_sequences, lengths, strict=True)]
        batch = plain_cache.batch(spans)
        with torch.no_grad():
            expected = model.logits(model.step(plain, batch, plain_cache))
        logits = captured(tokens, [Span(sequence, length, 1) for sequence, length in zip(sequences, lengths, strict=True)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        plain, tokens = expected.argmax(-1), logits.argmax(-1).clone()
        assert torch.equal(plain, tokens)


def test_other_shapes_are_refused(model: Any) -> None:
    cache, sequences, tokens = prefilled(model)
    with pytest.raises(InputError, match="a CUDA device"):
        CapturedDecode(model, cache, sequences=2, pages=3)
    captured = CapturedDecode(model, cache, sequences=2, pages=3, capture=stand_in)
    with pytest.raises(InputError, match="2 sequences with one new token each"):
        captured(tokens[:1], [Span(sequences[0], 11, 1)])
    with pytest.raises(InputError, match="as captured"):
        captured(tokens, [Span(sequences[0], 11, 2), Span(sequences[1], 3, 1)])
