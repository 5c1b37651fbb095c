"""Agreement with Hugging Face transformers, in float32, always with index_topk below the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.model.decoder import Glm5Model
from tests.model import hugging_face

LENGTH = 40

VARIANTS: dict[str, dict[str, Any]] = {
    "glm5_all_full_top_2": {"index_topk": 2, "index_topk_freq": 1, "index_skip_topk_offset": 2},
    "glm52_shared_top_8": {},
    "pattern_top_5": {"index_topk": 5, "index_topk_pattern": "FSFSSFS"},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups_not_renormalised": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "all_dense": {"first_k_dense_replace": 7},
    "all_moe": {"first_k_dense_replace": 0, "index_topk": 3},
    "theta_1e6": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, hugging_face.make(directory, seed=7, **VARIANTS[request.param])


def ours(directory: Path, **options: Any) -> Glm5Model:
    return glm5_port.load(directory, backend="cpu", dtype="float32", latent_norm_eps=1e-6, **options)


def prompt(seed: int = 3) -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def record_selection(model: Glm5Model) -> list[Tensor]:
    """Collects what every lightning_indexer of our model returns."""
    seen: list[Tensor] = []
    for bound in model.binder.bindings:
        if bound.selection.operator == "lightning_indexer":
            inner = bound.function

            def watched(*args: Any, _inner: Any = inner, **kwargs: Any) -> Tensor:
                result: Tensor = _inner(*args, **kwargs)
                seen.append(result)
                return result

            bound.function = watched
    return seen


def visible_sets(indices_SK: Tensor) -> list[set[int]]:
    """Selected positions of each row that the causal cut leaves (Hugging Face also lists future ones in early rows)."""
    return [{int(i) for i in row if 0 <= i <= position} for position, row in enumerate(indices_SK)]


@pytest.mark.parametrize("checkpoint", list(VARIANTS), indirect=True)
def test_logits_and_selection_agree(checkpoint: tuple[Path, Any]) -> None:
    directory, theirs = checkpoint
    model = ours(directory)
    assert not model.dense_attention
    ours_seen = record_selection(model)
    tokens = prompt()[:1]
    with torch.no_grad(), hugging_face.watch_selection() as theirs_seen:
        expected = theirs(tokens).logits
        logits = model(tokens)
    assert (logits - expected).abs().max() < 1e-5
    assert expected.std() > 0.3, "logits too flat to prove anything"
    owners = sum(model.config.owns_indexer(i) for i in model.config.layers)
    assert len(ours_seen) == len(theirs_seen) == owners
    for mine, other in zip(ours_seen, theirs_seen, strict=True):
        assert visible_sets(mine) == visible_sets(other[0])


@pytest.mark.parametrize("checkpoint", ["glm52_shared_top_8", "glm5_all_full_top_2"], indirect=True)
def test_no_row_ties_at_the_cut(checkpoint: tuple[Path, Any]) -> None:
    """The comparison above is only fair where the selection is unique: Hugging Face's top-k keeps no tie rule."""
    directory, _ = checkpoint
    model = ours(directory)
    from glm5_port.operators import indexer_scores

    gaps: list[float] = []
    for bound in model.binder.bindings:
        if bound.selection.operator == "lightning_indexer":
            inner = bound.function

            def watched(*args: Any, _inner: Any = inner, top_k: int, cache_format: str) -> Tensor:
                scores = indexer_scores.reference(*args, cache_format=cache_format)
                ranked = scores.sort(-1, descending=True).values
                rows = torch.isfinite(ranked[:, min(top_k, ranked.shape[1] - 1)])
                if rows.any():
                    gaps.append(float((ranked[rows, top_k - 1] - ranked[rows, top_k]).min()))
                result: Tensor = _inner(*args, top_k=top_k, cache_format=cache_format)
                return result

            bound.function = watched
    with torch.no_grad():
        model(prompt()[:1])
    assert gaps and min(gaps) > 0


@pytest.mark.parametrize("checkpoint", ["glm52_shared_top_8"], indirect=True)
def test_latent_norm_eps_is_the_callers_choice(checkpoint: tuple[Path, Any]) -> None:
    directory, theirs = checkpoint
    tokens = prompt()[:1]
    engines = glm5_port.load(directory, backend="cpu", dtype="float32")
    assert engines.config.latent_norm_eps == engines.config.rms_norm_eps == 1e-5
    with torch.no_grad():
        at_1e6 = theirs(tokens).logits
        hugging_face.set_latent_eps(theirs, 1e-5)
        at_1e5 = theirs(tokens).logits
        hugging_face.set_latent_eps(theirs, 1e-6)
        assert (engines(tokens) - at_1e5).abs().max() < 1e-5
        assert (engines(tokens) - at_1e6).abs().max() > 1e-5


@pytest.mark.parametrize("checkpoint", ["glm52_shared_top_8", "pattern_top_5", "groups"], indirect=True)
def test_greedy_tokens_agree_with_and_without_cache(checkpoint: tuple[Path, Any]) -> None:
    directory, theirs = checkpoint
    model = ours(directory, block_size=5)
    tokens = prompt()
    with torch.no_grad():
        expected = theirs.generate(tokens, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=256)
        cached = model.generate(tokens, max_new_tokens=16, stop_ids=())
        uncached = tokens
        for _ in range(16):
            uncached = torch.cat([uncached, model(uncached)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, expected)
    assert torch.equal(uncached, expected)


@pytest.mark.parametrize("checkpoint", ["glm52_shared_top_8"], indirect=True)
def test_dense_attention_agrees_when_the_context_fits_into_index_topk(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    theirs = hugging_face.make(tmp_path, seed=11, index_topk=64)
    tokens = prompt()
    dense, sparse = ours(tmp_path, max_context=64), ours(tmp_path)
    assert dense.dense_attention and not sparse.dense_attention
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (dense(tokens) - expected).abs().max() < 1e-5
        assert (sparse(tokens) - expected).abs().max() < 1e-5
        generated = theirs.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(dense.generate(tokens, max_new_tokens=8, stop_ids=()), generated)


def test_tie_rule_agrees_with_a_stable_sort(tmp_path: Path) -> None:
    """Four index heads tie often (all dots negative: score exactly zero). With Hugging Face's top-k replaced by a stable sort
    both sides hold the same rule, and everything agrees again."""
    theirs = hugging_face.make(tmp_path, seed=5, index_n_heads=4, index_topk=4)
    model = ours(tmp_path)
    tokens = prompt()[:1]
    mine = record_selection(model)
    with torch.no_grad():
        with hugging_face.StableTopK(), hugging_face.watch_selection() as seen:
            expected = theirs(tokens).logits
        logits = model(tokens)
    for own, other in zip(mine, seen, strict=True):
        assert visible_sets(own) == visible_sets(other[0])
    assert (logits - expected).abs().max() < 1e-5
