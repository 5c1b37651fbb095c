"""FP8 and INT8 caches in a model: they run, differ from plain by rounding and not by more, and are really quantised."""

from __future__ import annotations

import pytest
import torch

from glm5_port.model.accounting import cache_bytes_per_token
from glm5_port.model.decoder import Glm5Model
from glm5_port.testing.tiny import tiny_config
from tests.model.models import calls, difference, prompt, quick_model

# Widths that the 656-byte rows hold, and little else. Dense MLPs: a router turns rounding into another expert now and then.
CONFIG = tiny_config(
    num_hidden_layers=4, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=2,
    num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=4, index_n_heads=8,
    indexer_types=["full", "full", "shared", "full"], index_topk_freq=None, index_skip_topk_offset=None, index_topk=16,
)  # fmt: skip
TOKENS = torch.tensor([prompt(40, vocabulary=256)])
FORMATS = ["fp8", "int8"]


def made(cache_format: str, dtype: torch.dtype = torch.float32, **options: object) -> Glm5Model:
    return quick_model(CONFIG, dtype=dtype, cache_format=cache_format, block_size=16, **options)


@pytest.fixture(scope="module")
def plain() -> Glm5Model:
    return made("plain")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_logits_differ_by_rounding_only(plain: Glm5Model, cache_format: str) -> None:
    """40 tokens, of which each attends to 16. Where all fit, only values are rounded; beyond, a key near the cut may flip."""
    expected, logits = plain(TOKENS)[0], made(cache_format)(TOKENS)[0]
    error = (logits - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    assert 1e-4 < error[:16].max() < 0.1
    assert error[16:].median() < 0.2
    assert error.max() < 1.0
    wrong = made(cache_format)(TOKENS.flip(1))[0]
    assert ((wrong - expected).square().mean() / expected.square().mean()).sqrt() > 1.0, "what an unrelated text differs by"


@pytest.mark.parametrize("cache_format", FORMATS)
def test_dense_attention_reads_quantised_rows_too(cache_format: str) -> None:
    short = TOKENS[:, :16]
    expected, logits = made("plain", max_context=16)(short), made(cache_format, max_context=16)(short)
    assert 1e-4 < difference(logits, expected) / float(expected.std()) < 0.5


@pytest.mark.parametrize("cache_format", FORMATS)
def test_what_is_stored_is_what_the_accounts_say(cache_format: str) -> None:
    model = made(cache_format)
    cache = model.new_cache([64])
    stored = sum(field.nbytes for layer in cache.layers for field in [*layer.latent, *(layer.index or [])])
    assert stored == 64 * cache_bytes_per_token(CONFIG, torch.float32, cache_format).total
    assert cache.layers[0].latent[0].shape[-1] == 656
    assert cache.layers[0].index is not None
    assert cache.layers[0].index[0].element_size() == 1


@pytest.mark.parametrize("cache_format", FORMATS)
def test_generation_equals_recomputation(cache_format: str) -> None:
    """A row is quantised once, when it is written, so the cache holds the same bytes however the prompt was cut."""
    model = made(cache_format)
    prompts = [TOKENS[0, :20].tolist(), TOKENS[0, 20:25].tolist()]
    generated = model.generate(prompts, max_new_tokens=5, stop_ids=())
    for row in generated:
        again = model(torch.tensor([row]))[0]
        for place in range(len(row) - 5, len(row)):
            top = again[place - 1].topk(2)
            if top.values[0] - top.values[1] > 1e-3:
                assert int(top.indices[0]) == row[place]


@pytest.mark.parametrize("cache_format", FORMATS)
def test_every_operator_is_told_the_format(cache_format: str) -> None:
    model = made(cache_format, mtp=True)
    found = calls(model, lambda: model.generate([[1, 2, 3]], max_new_tokens=3, stop_ids=()))
    formats = {args["cache_format"] for _, args, _ in found if "cache_format" in args}
    assert formats == {cache_format}
    assert {s.facts["cache_format"] for s in model.decisions() if "cache_format" in s.facts} == {cache_format}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_the_reference_agrees(cache_format: str) -> None:
    """In float64, where both hand the same numbers to the rounding."""
    model = made(cache_format, torch.float64)
    reference = made(cache_format, torch.float64, implementation="reference")
    assert difference(model(TOKENS), reference(TOKENS)) < 1e-10
