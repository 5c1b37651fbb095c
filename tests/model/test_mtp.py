"""The MTP layer against a model written a second time, and speculation against plain decoding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.errors import ConfigError, InputError
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.generate import _Sequence, _Session
from glm5_port.model.sampling import Sampling
from tests.model.models import calls, difference, prompt, quick_config, quick_model
from tests.model.plain_model import PlainModel, Selection

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "theta_1e6_no_sharing": {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "index_share_for_mtp_iteration": False,
    },
}
TOKENS = prompt(23, seed=4)


def pair(**changes: Any) -> tuple[Glm5Model, PlainModel]:
    """(our model, the plain model) with the same weights, in float64. The eps of the latents differs from that of the blocks."""
    config = quick_config(**changes)
    model = quick_model(config, mtp=True, block_size=5, latent_norm_eps=1e-3)
    read = functools.cache(random_weights(config, dtype=torch.float64, mtp=True))
    return model, PlainModel(model.config, read)


def run_mtp(model: Glm5Model, passes: list[tuple[int, Tensor, list[int], Tensor | None]]) -> list[tuple[Tensor, Tensor]]:
    """Passes (first position, hidden, next tokens, shared indices) of one sequence through one cache."""
    cache = model.new_cache([64])
    sequence, results = cache.open(), []
    for start, hidden, tokens, shared in passes:
        batch = cache.batch([Span(sequence, start, len(tokens))])
        with torch.no_grad():
            results.append(model.mtp(hidden, model.embed(torch.tensor(tokens)), model.locate(batch), cache.layers[-1], shared))
    return results


def as_sets(selection: Selection) -> list[set[int]]:
    return [set(seen) for seen in selection]


def visible(indices: Tensor) -> list[set[int]]:
    return [{int(place) for place in row if place >= 0} for row in indices]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_trunk_equals_the_plain_model(variant: str) -> None:
    model, plain = pair(**VARIANTS[variant])
    expected = plain.logits(plain.trunk(TOKENS))
    assert difference(model(torch.tensor([TOKENS]))[0], expected) < 1e-10
    assert expected.std() > 0.1


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_mtp_layer_equals_the_plain_model(variant: str) -> None:
    model, plain = pair(**VARIANTS[variant])
    hidden = plain.trunk(TOKENS)[:-1]
    expected, chosen = plain.mtp(hidden, TOKENS[1:])
    assert max(map(len, chosen)) == model.config.index_topk < len(hidden), "selection should leave something out"
    ((out, indices),) = run_mtp(model, [(0, hidden, TOKENS[1:], None)])
    assert difference(out, expected) < 1e-10
    assert visible(indices) == as_sets(chosen)
    pieces = run_mtp(model, [(0, hidden[:9], TOKENS[1:10], None), (9, hidden[9:], TOKENS[10:], None)])
    assert difference(torch.cat([out for out, _ in pieces]), expected) < 1e-10


@pytest.mark.parametrize("share", [True, False])
def test_recycled_drafts_equal_the_plain_model(share: bool) -> None:
    """Each further draft takes the output after the norm in place of the trunk's state; with IndexShare it keeps the first
    draft's positions, which do not contain its own."""
    model, plain = pair()
    hidden, tokens = plain.trunk(TOKENS)[:-1], TOKENS[1:]
    expected, chosen = plain.mtp(hidden, tokens)
    (out, indices), *_ = run_mtp(model, [(0, hidden, tokens, None)])
    shared = indices[-1:] if share else None
    passes: list[tuple[int, Tensor, list[int], Tensor | None]] = [(0, hidden, tokens, None)]
    overriding: Selection = []
    for draft in (7, 30, 11):
        hidden, tokens = torch.cat([hidden, expected[-1:]]), [*tokens, draft]
        overriding = [*overriding, chosen[len(passes[0][1]) - 1]] if share else []
        expected, all_chosen = plain.mtp(hidden, tokens, overriding)
        passes.append((len(hidden) - 1, out[-1:], [draft], shared))
        out, indices = run_mtp(model, passes)[-1]
        assert difference(out[-1], expected[-1]) < 1e-10
        assert visible(indices)[-1] == set(all_chosen[-1])
    own = plain.mtp(hidden, tokens, [] if share else [chosen[len(passes[0][1]) - 1]] * 3)[0]
    assert difference(own[-1], expected[-1]) > 1e-6, "sharing should make a difference here"


@pytest.mark.parametrize("share", [True, False])
def test_drafts_of_a_batch_equal_the_plain_model(share: bool) -> None:
    """What `generate` drafts after prefill, sequence by sequence: greedy tokens of the plain chain."""
    model, plain = pair(index_share_for_mtp_iteration=share)
    prompts = [TOKENS, prompt(1, seed=8), prompt(6, seed=9)]
    cache = model.new_cache([64] * 3)
    session = _Session(model, cache, frozenset(), Sampling(), draft_tokens=4)
    sequences = [_Sequence(row, cache.open(), list(tokens), len(tokens) + 30) for row, tokens in enumerate(prompts)]
    with torch.inference_mode():
        session.prefill(sequences)
        drafts = session._draft_tokens(sequences)
    for sequence, drafted in zip(sequences, drafts, strict=True):
        hidden, tokens = plain.trunk(sequence.tokens[:-1]), sequence.tokens[1:]
        expected, chosen = plain.mtp(hidden, tokens)
        first, wanted, overriding = chosen[-1], [int(plain.logits(expected[-1]).argmax())], []
        for _ in range(3):
            hidden, tokens = torch.cat([hidden, expected[-1:]]), [*tokens, wanted[-1]]
            overriding = [*overriding, first] if share else []
            expected, _ = plain.mtp(hidden, tokens, overriding)
            wanted.append(int(plain.logits(expected[-1]).argmax()))
        assert drafted == wanted


# -- speculation -------------------------------------------------------------------------------------------------------

FEW = {"vocab_size": 4, "eos_token_id": [3], "pad_token_id": None}
"""With four tokens a random draft is right now and then."""
FEW_PROMPTS = [prompt(13, vocabulary=4), prompt(1, vocabulary=4), prompt(6, vocabulary=4), prompt(30, vocabulary=4)]


@pytest.fixture(scope="module")
def few() -> tuple[Glm5Model, Glm5Model]:
    """(without MTP, with MTP), same weights."""
    return quick_model(quick_config(**FEW), block_size=5), quick_model(quick_config(**FEW), block_size=5, mtp=True)


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 2, 5, 12])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_equal_those_without_speculation(
    few: tuple[Glm5Model, Glm5Model], draft_tokens: int, limit: int, temperature: float
) -> None:
    plain, speculating = few
    options: dict[str, Any] = {"max_new_tokens": limit, "temperature": temperature, "seed": 1}
    for stop_ids in ((), (2,), (0, 1)):
        expected = plain.generate(FEW_PROMPTS, stop_ids=stop_ids, **options)
        assert speculating.generate(FEW_PROMPTS, stop_ids=stop_ids, draft_tokens=draft_tokens, **options) == expected


def test_some_drafts_are_accepted_and_save_steps(few: tuple[Glm5Model, Glm5Model]) -> None:
    _, model = few
    speculation = model.speculation
    speculation.rounds = speculation.drafted = speculation.accepted = 0
    steps = []
    for emissions in model.stream(FEW_PROMPTS, max_new_tokens=20, stop_ids=(), draft_tokens=3):
        steps.append([len(emission.tokens) for emission in emissions])
    assert 0 < speculation.accepted < speculation.drafted
    assert speculation.rounds == len(steps) - 1 < 20
    assert max(map(max, steps)) > 1
    assert sum(map(sum, steps)) == 20 * len(FEW_PROMPTS) == len(FEW_PROMPTS) + speculation.accepted + sum(map(len, steps[1:]))


def test_a_stop_inside_accepted_drafts_ends_the_text(few: tuple[Glm5Model, Glm5Model]) -> None:
    """Find an accepted run of several tokens, and make one of its inner tokens the stop."""
    plain, model = few
    for emissions in model.stream(FEW_PROMPTS, max_new_tokens=20, stop_ids=(), draft_tokens=3):
        runs = [e for e in emissions if len(e.tokens) > 1 and e.tokens[0] != e.tokens[-1]]
        if runs:
            break
    assert runs, "choose another seed: no run of different tokens was accepted"
    stop = runs[0].tokens[0]
    for stops in ((stop,), (runs[0].tokens[-1],)):
        assert model.generate(FEW_PROMPTS, max_new_tokens=20, stop_ids=stops, draft_tokens=3) == plain.generate(
            FEW_PROMPTS, max_new_tokens=20, stop_ids=stops
        )


def test_speculation_in_small_steps(few: tuple[Glm5Model, Glm5Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefill feeds the MTP layer chunk by chunk; verification never exceeds the step either."""
    from glm5_port.model import generate

    plain, model = few
    expected = plain.generate(FEW_PROMPTS, max_new_tokens=12, stop_ids=())
    monkeypatch.setattr(generate, "MAX_STEP_TOKENS", 7)
    found = calls(model, lambda: model.generate(FEW_PROMPTS, max_new_tokens=12, stop_ids=(), draft_tokens=2))
    assert max(len(args["hidden"]) for name, args, _ in found if name == "mla_prologue_into_cache") == 7
    assert model.generate(FEW_PROMPTS, max_new_tokens=12, stop_ids=(), draft_tokens=2) == expected
    with pytest.raises(InputError, match="draft_tokens=7: a step holds 7 tokens"):
        model.generate(FEW_PROMPTS, max_new_tokens=2, draft_tokens=7)


def test_speculation_with_dense_attention() -> None:
    config = quick_config(**FEW, index_topk=64)
    plain, model = quick_model(config, max_context=64), quick_model(config, max_context=64, mtp=True)
    assert model.dense_attention
    expected = plain.generate(FEW_PROMPTS, max_new_tokens=12, stop_ids=())
    assert model.generate(FEW_PROMPTS, max_new_tokens=12, stop_ids=(), draft_tokens=3) == expected
    assert model.speculation.accepted > 0


def test_mtp_of_a_model_that_has_none() -> None:
    config = quick_config(num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="this model has no MTP layer: num_nextn_predict_layers = 0"):
        build(config, random_weights(config, dtype=torch.float64), mtp=True)
