"""The decode step that a CUDA graph captures, bound to cuda's own kernels, on fake tensors of a card that is not here: no
operator of it is one that a capture refuses (`tests/capture_rules.py`), and each kind of mistake is noticed. Its numbers are held
by tests/model/test_captured.py and tests/interpreter. No GPU runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glm5_port.dispatch import trace_through
from glm5_port.model.build import build, stored_dtype
from glm5_port.model.cache import Span
from glm5_port.model.captured import CapturedDecode
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.testing.tiny import tiny_config
from tests.capture_rules import NotCapturable, capturing
from tests.model.test_fake_tensors import device_guards, fake_model
from tests.test_config_int4 import block

OF_A_STEP = {
    "add_rms_norm",
    "expert_mlp",
    "indexer_prologue",
    "lightning_indexer",
    "mla_prologue_into_cache",
    "route_experts",
    "sparse_mla_attention",
    "write_cache",
}
OF_DENSE_ATTENTION = OF_A_STEP - {"indexer_prologue", "lightning_indexer", "sparse_mla_attention"} | {"mla_attention_absorbed"}
BY_CUBLAS = {"linear", "gated_mlp", "attention_output"}
"""Chosen from the portable ones, unless nothing portable may run."""
WITH_INT4 = OF_A_STEP - {"expert_mlp"} | {"expert_mlp_int4"}


def own_in_decode(model: Glm5Model) -> set[str]:
    """Operators that a decode step of the model computes by kernels of cuda."""
    chosen = [bound.selection for bound in model.binder.bindings if bound.implementation.backend == "cuda"]
    return {made.operator for made in chosen if made.facts.get("phase") in (None, "decode")}


def capture_by_the_rules(model: Glm5Model, *, length: int = 5000) -> int:
    """Captures a step of three sequences as on a card, and steps. Returns how many aten operators were looked at."""
    looked_at = 0

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        nonlocal looked_at
        with capturing() as rules:
            result = step()
        looked_at = rules.seen
        return lambda: None, result

    cache = model.new_cache([100, length, 70])
    sequences = [cache.open() for _ in range(3)]
    captured = CapturedDecode(model, cache, sequences=3, pages=80, capture=capture)
    tokens = torch.zeros(3, dtype=torch.int64, device=model.device)
    spans = [Span(sequence, first, 1) for sequence, first in zip(sequences, (99, length - 1, 0), strict=True)]
    logits = captured(tokens, spans)
    assert (logits.shape[0], logits.device) == (3, model.device)
    return looked_at


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, OF_A_STEP),
        ({"cache_format": "fp8"}, OF_A_STEP),
        ({"cache_format": "int8"}, OF_A_STEP),
        ({"max_context": 2048}, OF_DENSE_ATTENTION),
    ],
    ids=["plain", "fp8 cache", "int8 cache", "dense attention"],
)
def test_no_operator_of_a_step_is_refused_by_a_capture(options: dict[str, Any], own: set[str]) -> None:
    """GLM-5.2 at its true widths, in four layers: dense and experts, with an indexer and sharing one."""
    with fake_model("glm52", "cuda:0", 4, **options) as model:
        assert own_in_decode(model) >= own
        assert capture_by_the_rules(model, length=min(5000, model.max_context)) > 50


@contextlib.contextmanager
def tiny_fake_model(**options: Any) -> Iterator[Glm5Model]:
    """The tiny model with experts in INT4, in bfloat16, on a card that is not here."""
    config = tiny_config(num_hidden_layers=4, dtype="bfloat16", max_position_embeddings=8192, quantization_config=block())
    shapes = {name: spec.shape for name, spec in expected_tensors(config, mtp=False).items()}

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=stored_dtype(name, torch.bfloat16), device="cuda:0")

    with device_guards(), FakeTensorMode(), trace_through(), torch.no_grad():
        yield build(config, read, device="cuda:0", **options)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("activations", [None, "int8"], ids=["W4A16", "W4A8"])
def test_nor_with_experts_in_int4_and_nothing_portable(activations: str | None, set_flags: Callable[..., None]) -> None:
    set_flags(GLM5_PORT_STRICT="1")
    with tiny_fake_model(int4_activations=activations) as model:
        experts = "expert_mlp_int4_w4a8" if activations else "expert_mlp_int4"
        assert own_in_decode(model) >= OF_A_STEP - {"expert_mlp"} | BY_CUBLAS | {experts}
        assert capture_by_the_rules(model) > 50


def spoil(model: Glm5Model, operator: str, after: Callable[[Any], Any]) -> None:
    """Every result of an operator goes through `after`."""
    mine = [bound for bound in model.binder.bindings if bound.selection.operator == operator]
    assert mine
    for bound in mine:
        bound.function = lambda *args, inner=bound.function, **kwargs: after(inner(*args, **kwargs))


def branch(y: Tensor) -> Tensor:
    return y if (y > 0).all() else -y


def waiting(y: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return y


def written_by_mask(y: Tensor) -> Tensor:
    y[y > 0] = y.amax()
    return y


MISTAKES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda y: y * y.amax().item(),
    "tolist": lambda y: y * y[0, 0].tolist(),
    "cpu": lambda y: y + y.cpu().to(y.device),
    "branch": branch,
    "synchronize": waiting,
    "equal": lambda y: y if torch.equal(y, y) else -y,
    "a mask": lambda y: y[y[:, 0] > 0],
    "writing by a mask": written_by_mask,
    "nonzero": lambda y: y[torch.nonzero(y[:, 0])[:, 0]],
    "unique": lambda y: y * y.unique().numel(),
    "masked_select": lambda y: torch.masked_select(y, y > 0),
    "repeat_interleave": lambda y: y.repeat_interleave(torch.ones(len(y), dtype=torch.int64, device=y.device), dim=0),
    "tensor of a number": lambda y: y * torch.tensor(2.0, device=y.device),
    "copy to the card": lambda y: y * torch.tensor([2.0]).to(y.device, non_blocking=True),
    "zeros made on the host": lambda y: y + torch.zeros(y.shape, dtype=y.dtype).to(y.device),
}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_in_a_step_is_noticed(mistake: str) -> None:
    with tiny_fake_model() as model:
        spoil(model, "attention_output", MISTAKES[mistake])
        with pytest.raises(NotCapturable):
            capture_by_the_rules(model)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("operator", sorted(WITH_INT4 - {"write_cache"} | BY_CUBLAS))
def test_a_wait_in_any_operator_of_a_step_is_noticed(operator: str) -> None:
    """write_cache returns nothing to wait for."""

    def wait(y: Any) -> Any:
        (y[0] if isinstance(y, tuple) else y).amax().item()
        return y

    with tiny_fake_model() as model:
        spoil(model, operator, wait)
        with pytest.raises(NotCapturable, match="_local_scalar_dense"):
            capture_by_the_rules(model)
