"""Gradients of a trainable model: which weights get one, and that they are those of the references, through the cache too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.model import decoder
from glm5_port.model.decoder import Glm5Model
from tests.model.models import prompt, quick_config, quick_model

ROWS = torch.tensor([prompt(14), prompt(14, seed=1)])


def gradients(model: Glm5Model) -> dict[str, Tensor | None]:
    """Of a loss that weighs every logit of two rows differently."""
    logits = model(ROWS, lengths=[14, 9])
    weighting = torch.arange(logits.numel(), dtype=logits.dtype).sin().view(logits.shape)
    model.zero_grad()
    (logits * weighting).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def without_gradient(name: str) -> bool:
    """The selection is a set of integers: neither the router's bias nor the indexer's weights can have a gradient."""
    return name.endswith("correction_bias") or ".indexer." in name


@pytest.mark.parametrize("options", [{}, {"max_context": 14}], ids=["sparse", "dense"])
def test_every_weight_gets_the_gradient_of_the_references(options: dict[str, Any]) -> None:
    config = quick_config(index_topk=14 if options else 4)
    model = quick_model(config, trainable=True, block_size=5, **options)
    found = gradients(model)
    expected = gradients(quick_model(config, trainable=True, implementation="reference", **options))
    assert model.dense_attention == bool(options)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        if without_gradient(name):
            assert gradient is None
            assert expected[name] is None
            continue
        right = expected[name]
        assert gradient is not None, f"{name} has no gradient"
        assert right is not None
        assert gradient.abs().max() > 0, f"{name} has a gradient of zero"
        assert (gradient - right).abs().max() <= 1e-9 * right.abs().max(), name
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("correction_bias")]
    assert len(biases) == 4
    assert not any(parameter.requires_grad for parameter in biases)


def test_gradients_of_a_model_are_slopes() -> None:
    """Against finite differences along the gradient: nothing is detached on the way, the cache included."""
    model = quick_model(trainable=True, block_size=5)
    weighting = torch.arange(40, dtype=torch.float64).cos()

    def loss() -> Tensor:
        return (model(ROWS)[:, -1] * weighting).sum()  # the last position alone: earlier tokens matter through the cache only

    loss().backward()
    attention = model.layers[1].attention
    for parameter in (attention.prologue.kv_a, attention.prologue.w_uk, attention.output.w_uv, model.embedding):
        assert parameter is not None
        assert parameter.grad is not None
        direction, slope = parameter.grad / parameter.grad.norm(), float(parameter.grad.norm())
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(loss()))
                parameter.add_(direction, alpha=-step)
        assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-5 * slope


def test_gradients_through_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in several steps: the later ones read what the earlier ones cached, and write beside it."""
    model = quick_model(trainable=True, block_size=5)
    whole = gradients(model)
    monkeypatch.setattr(decoder, "MAX_STEP_TOKENS", 5)
    for name, gradient in gradients(model).items():
        right = whole[name]
        if gradient is not None and right is not None:
            assert (gradient - right).abs().max() <= 1e-9 * right.abs().max(), name


def test_a_trainable_model_generates_the_same() -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": ()}
    model = quick_model(trainable=True, mtp=True)
    assert model.generate(ROWS.tolist(), **options) == quick_model().generate(ROWS.tolist(), **options)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(bound.selection.facts["needs_grad"] for bound in model.binder.bindings)


def test_a_model_for_inference_records_nothing() -> None:
    logits = quick_model()(ROWS)
    assert not logits.requires_grad


def test_training_lowers_a_loss() -> None:
    model = quick_model(trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(ROWS[:, :-1]).flatten(0, 1), ROWS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
