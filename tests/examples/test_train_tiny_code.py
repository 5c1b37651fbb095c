"""The training of glm5-tiny-code, on a model of its shape that is smaller still."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5_port
from examples.train_tiny_code import corpus, evaluate, train
from examples.train_tiny_code.network import DENSE, SPARSE, WARM_UP, Network
from glm5_port.model.build import CORRECTION_BIAS
from tests.tiny_code import held_out_prompt

FIELDS: dict[str, Any] = {
    **train.CONFIG,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 8,
}
PLAN = train.Recipe(
    (train.Stage(DENSE, 2, 2, 32), train.Stage(WARM_UP, 2, 2, 32), train.Stage(SPARSE, 2, 2, 32)), warm_up=1, bfloat16=False
)


def batch(rows: int = 2, width: int = 34) -> torch.Tensor:
    return held_out_prompt(rows * width).view(rows, width)


@pytest.mark.parametrize("mode", [DENSE, SPARSE])
def test_steps_on_one_batch_lower_its_losses(mode: str) -> None:
    trainer = train.Trainer(train.Recipe((train.Stage(mode, 4, 2, 32),), warm_up=1, bfloat16=False), FIELDS)
    history = [trainer.train_step(batch()) for _ in range(4)]
    for loss in ("next", "mtp") + (("indexer",) if mode == SPARSE else ()):
        assert history[-1][loss] < history[0][loss]


def test_each_stage_trains_its_part() -> None:
    trainer = train.Trainer(PLAN, FIELDS)
    moved = []
    for step in range(6):
        before = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
        trainer.train_step(batch())
        changed = {name for name, weight in trainer.weights.items() if not torch.equal(weight, before[name])}
        if step % 2:
            moved.append(changed)
    indexers = {name for name in trainer.weights if ".indexer." in name}
    biases = {name for name in trainer.weights if name.endswith(CORRECTION_BIAS)}
    trunk = {name for name in trainer.weights if ".experts." not in name} - indexers  # an expert may see no token
    assert moved[0] - indexers >= trunk and not moved[0] & indexers
    assert moved[1] == indexers
    assert moved[2] >= trunk | indexers
    assert len(biases) == 4 and len(indexers) == 4 * 5


def test_the_routers_bias_moves_towards_experts_that_were_chosen_too_rarely() -> None:
    trainer = train.Trainer(PLAN, FIELDS)
    found, network = trainer.losses(batch(), DENSE)
    trainer.train_step(batch())
    assert found["next"] > 0
    for name, counts_E in network.observed.expert_counts.items():
        rare = counts_E < counts_E.float().mean()
        assert (trainer.weights[name][rare] > 0).all() and (trainer.weights[name][counts_E > counts_E.float().mean()] < 0).all()


def test_a_resumed_run_continues_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = train.Trainer(PLAN, FIELDS)
    for _ in range(5):
        expected = whole.train_step(batch())
    first = train.Trainer(PLAN, FIELDS)
    for _ in range(3):
        first.train_step(batch())
    first.save(tmp_path, {})
    second = train.Trainer(PLAN, FIELDS)
    second.resume(tmp_path)
    assert second.step == 3
    for _ in range(2):
        resumed = second.train_step(batch())
    assert resumed == expected
    assert all(torch.equal(second.weights[name], weight) for name, weight in whole.weights.items())


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    first = train.Trainer(PLAN, FIELDS)
    first.save(tmp_path, {})
    with pytest.raises(SystemExit, match="another recipe"):
        train.Trainer(train.Recipe(PLAN.stages, seed=1), FIELDS).resume(tmp_path)


def test_what_is_saved_loads_and_computes_what_was_trained(tmp_path: Path) -> None:
    trainer = train.Trainer(PLAN, FIELDS)
    for _ in range(3):
        trainer.train_step(batch())
    trainer.save(tmp_path, {})
    model = glm5_port.load(tmp_path, "cpu", "float32", mtp=True)
    assert not model.dense_attention
    rounded = {
        name: weight.detach() if name.endswith(CORRECTION_BIAS) else weight.detach().bfloat16().float()
        for name, weight in trainer.weights.items()
    }
    tokens = held_out_prompt(60)
    network = Network(trainer.config, rounded, mode=SPARSE, positions=60)
    with torch.no_grad():
        assert (network.logits(network.trunk(tokens)) - model(tokens)).abs().max() < 1e-4


def test_the_warm_up_does_not_count_for_the_trunks_rate() -> None:
    plan = train.recipe(dense=1000, warm_up=10, sparse=500, rate=1.0)
    rates = [plan.trunk_rate(step) for step in range(plan.steps)]
    assert rates[0] < 0.02 and max(rates) > 0.9 and rates[-1] < 0.03
    assert len(set(rates[1000:1011])) == 1, "unchanged while it rests, and for the step after"
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[60:]))


def test_held_out_files_are_chosen_by_name_and_never_trained_on() -> None:
    text = corpus.standard_library()
    assert not set(text.train) & set(text.held_out)
    assert all(corpus.is_held_out(name) for name in text.held_out) and not any(map(corpus.is_held_out, text.train))
    assert not any(corpus.SKIPPED & set(name.split("/")) for name in text.train)
    assert 0.01 < len(text.held_out) / len(text.train) < 0.1
    assert sum(map(len, text.held_out.values())) > 100_000


def test_windows_predict_every_byte_once() -> None:
    files = {"b.py": bytes(range(10)), "a.py": b"xyz"}
    windows = list(corpus.windows(files, context=4))
    assert [w.tolist() for w in windows] == [[257, *b"xyz"], [257, 0, 1, 2, 3], [3, 4, 5, 6, 7], [7, 8, 9]]
    stream = corpus.token_stream(files)
    assert stream.tolist() == [257, *b"xyz", 257, *range(10), 257]


def test_batches_depend_on_seed_and_step_only() -> None:
    stream = torch.arange(1000)
    shape = {"rows": 3, "width": 20}
    first = corpus.batch(stream, **shape, seed=0, step=4)
    assert torch.equal(first, corpus.batch(stream, **shape, seed=0, step=4))
    assert not torch.equal(first, corpus.batch(stream, **shape, seed=0, step=5))
    assert not torch.equal(first, corpus.batch(stream, **shape, seed=1, step=4))
    assert (first[:, 1:] - first[:, :-1] == 1).all()


def test_baselines_measure_what_they_say() -> None:
    even = {"a": bytes(range(256)) * 4}
    assert evaluate.order_2_bits_per_byte({"a": b"ab" * 5000}, {"b": b"ab" * 500}) < 0.1
    assert evaluate.order_2_bits_per_byte({"a": b""}, even) == pytest.approx(8.0)
    assert evaluate.gzip_bits_per_byte({"a": b"ab" * 5000}) < 0.1


def test_bits_per_byte_of_a_model_that_knows_nothing(tmp_path: Path) -> None:
    trainer = train.Trainer(PLAN, FIELDS)
    with torch.no_grad():
        trainer.weights["lm_head.weight"].zero_()
    trainer.save(tmp_path, {})
    model = glm5_port.load(tmp_path, "cpu")
    windows = list(corpus.windows({"a": b"import os\n" * 3}, context=16))
    assert evaluate.bits_per_byte(model, windows) == pytest.approx(torch.tensor(320.0).log2().item(), abs=1e-3)
