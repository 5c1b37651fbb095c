"""Choosing tokens: greedy, the draw, top_k and top_p, and what a sampled text may depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.sampling import Sampling
from tests.model.models import prompt, quick_model

LOGITS = torch.tensor([1.0, 3.0, 2.0, -torch.inf, 0.0, 3.0])
DRAWS = 4000


def frequencies(sampling: Sampling, logits_V: Tensor = LOGITS) -> Tensor:
    """How often each token is drawn at `DRAWS` positions of one sequence."""
    tokens = sampling.choose(logits_V.expand(DRAWS, -1), [0] * DRAWS, list(range(DRAWS)))
    return torch.tensor(tokens).bincount(minlength=len(logits_V)) / DRAWS


def assert_near(found: Tensor, probabilities: Tensor) -> None:
    """Within five standard deviations, and exactly zero where the probability is."""
    deviation = (probabilities * (1 - probabilities) / DRAWS).sqrt()
    assert ((found - probabilities).abs() <= 5 * deviation).all(), (found, probabilities)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampling().choose(torch.stack([LOGITS, LOGITS.flip(0)]), [0, 1], [5, 5]) == [1, 0]
    assert Sampling(temperature=1.0).choose(LOGITS.expand(0, -1), [], []) == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    assert_near(frequencies(Sampling(temperature)), torch.softmax(LOGITS / temperature, -1))


def restricted(kept: list[int], temperature: float = 1.0) -> Tensor:
    probabilities = torch.zeros_like(LOGITS)
    probabilities[kept] = torch.softmax(LOGITS[kept] / temperature, -1)
    return probabilities


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 5]), (3, [1, 2, 5]), (6, [0, 1, 2, 4, 5]), (99, [0, 1, 2, 4, 5])])
def test_top_k(top_k: int, kept: list[int]) -> None:
    """Equal logits at the cut: the lower id is kept."""
    assert_near(frequencies(Sampling(1.0, top_k=top_k)), restricted(kept))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, [1]), (0.39, [1]), (0.5, [1, 5]), (0.9, [1, 2, 5]), (0.95, [0, 1, 2, 5]), (1.0, [0, 1, 2, 4, 5])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]) -> None:
    """Probabilities: 0.392, 0.392, 0.144, 0.053, 0.020."""
    probabilities = torch.softmax(LOGITS, -1)
    reach = sorted(probabilities.tolist(), reverse=True)
    assert sum(reach[: len(kept)]) >= min(top_p, 0.999999) > sum(reach[: len(kept) - 1])
    assert_near(frequencies(Sampling(1.0, top_p=top_p)), restricted(kept))


def test_top_p_is_of_what_top_k_kept() -> None:
    """Of three tokens (0.422, 0.422, 0.155) two reach 0.8; of all tokens three would be needed."""
    assert_near(frequencies(Sampling(1.0, top_k=3, top_p=0.83)), restricted([1, 5]))
    assert_near(frequencies(Sampling(1.0, top_p=0.83)), restricted([1, 2, 5]))


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.999}])
def test_probability_zero_is_never_drawn(monkeypatch: pytest.MonkeyPatch, draw: float, options: dict[str, float]) -> None:
    """The first and the last tokens are impossible, and the draw lies at the ends of its range."""
    monkeypatch.setattr(Sampling, "_uniform", lambda *_: draw)
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))
    logits[:, :100] = logits[:, 900:] = -torch.inf
    tokens = Sampling(1.0, **options).choose(logits, [0] * 50, [0] * 50)
    assert all(torch.isfinite(logits[row, token]) for row, token in enumerate(tokens))


def test_extreme_temperatures() -> None:
    assert set(Sampling(1e-40).choose(LOGITS[:5].expand(20, -1), [0] * 20, range(20))) == {1}
    assert (frequencies(Sampling(1e6)) > 0).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_and_seed(dtype: torch.dtype) -> None:
    for seed in (0, -1, 2**31, 10**30):
        assert_near(frequencies(Sampling(1.0, seed=seed), LOGITS.to(dtype)), torch.softmax(LOGITS, -1))


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    sampling = Sampling(1.0)
    grid = torch.tensor([[sampling._uniform(row, place) for place in range(60)] for row in range(60)], dtype=torch.float64)
    assert ((grid >= 0) & (grid < 1)).all()
    assert abs(float(grid.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 3600)
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    "options", [{"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 1.5}, {"top_p": -0.1}]
)
def test_options_outside_their_range(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)


# -- in a model --------------------------------------------------------------------------------------------------------

PROMPTS = [prompt(9), prompt(3, seed=1), prompt(17, seed=2)]
SAMPLED = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "stop_ids": (), "max_new_tokens": 8}


def test_a_sampled_text_depends_on_seed_place_and_prompt_only() -> None:
    model = quick_model(block_size=5)
    first = model.generate(PROMPTS, seed=3, **SAMPLED)
    assert model.generate(PROMPTS, seed=3, **SAMPLED) == first
    assert model.generate(PROMPTS, seed=4, **SAMPLED) != first
    others = model.generate([prompt(5), PROMPTS[1], prompt(30), prompt(2)], seed=3, **SAMPLED)
    assert others[1] == first[1], "the other prompts do not matter"
    copies = model.generate([PROMPTS[1]] * 4, seed=3, **SAMPLED)
    assert copies[1] == first[1]
    assert len({tuple(row) for row in copies}) == 4, "copies of a prompt are sampled differently"


def test_speculation_does_not_change_a_sampled_text() -> None:
    plain = quick_model().generate(PROMPTS, seed=3, **SAMPLED)
    model = quick_model(mtp=True)
    for draft_tokens in (1, 3):
        assert model.generate(PROMPTS, seed=3, draft_tokens=draft_tokens, **SAMPLED) == plain
    assert model.speculation.drafted > 0
