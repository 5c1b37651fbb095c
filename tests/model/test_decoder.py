"""The decoder around its operators: IndexShare, dense attention within index_topk, contexts, what is built at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import glm5_port
from glm5_port.errors import InputError, SelectionError
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from tests.model.models import calls, difference, prompt, quick_config, quick_model

TOKENS = torch.tensor([prompt(24)])


# -- IndexShare --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["FFSFS", "FSSSS", "FFFFF"])
def test_shared_layers_attend_to_the_indices_of_the_last_full_layer(pattern: str) -> None:
    config = quick_config(indexer_types=[{"F": "full", "S": "shared"}[letter] for letter in pattern])
    model = quick_model(config)
    found = calls(model, lambda: model(TOKENS))
    selected = [result for name, _, result in found if name == "lightning_indexer"]
    used = [args["indices"] for name, args, _ in found if name == "sparse_mla_attention"]
    assert len(selected) == pattern.count("F")
    assert len(used) == len(pattern)
    for layer, indices in enumerate(used):
        owner = pattern[: layer + 1].rindex("F")
        assert indices is selected[pattern[: owner + 1].count("F") - 1]
    if len(selected) > 1:
        assert not torch.equal(selected[0], selected[-1]), "different indexers should select differently"


def test_shared_layers_have_neither_indexer_weights_nor_index_cache() -> None:
    model = quick_model(mtp=True)
    owners = [layer.attention.indexer is not None for layer in model.layers]
    assert owners == [True, True, False, True, False]
    cache = model.new_cache([10])
    assert [layer.index is not None for layer in cache.layers] == [*owners, True], "the MTP layer owns an indexer"
    read: list[str] = []
    weights = random_weights(model.config, dtype=torch.float64, mtp=True)
    build(model.config, lambda name: (read.append(name), weights(name))[1], dtype=torch.float64, mtp=True)
    assert {int(name.split(".")[2]) for name in read if ".indexer." in name} == {0, 1, 3, 5}
    assert len(read) == len(set(read)), "each tensor is read once"


# -- dense attention ---------------------------------------------------------------------------------------------------

WIDE = quick_config(index_topk=32)


@pytest.fixture(scope="module")
def dense() -> Glm5Model:
    return quick_model(WIDE, max_context=32, block_size=5)


def test_within_index_topk_dense_attention_is_the_same_function(dense: Glm5Model) -> None:
    sparse = quick_model(WIDE, block_size=5)
    assert dense.dense_attention
    assert not sparse.dense_attention
    assert difference(dense(TOKENS), sparse(TOKENS)) < 1e-10
    prompts = [prompt(13), prompt(1), prompt(22)]
    generated = [model.generate(prompts, max_new_tokens=9, stop_ids=()) for model in (dense, sparse)]
    assert generated[0] == generated[1]
    narrow = quick_model(quick_config(index_topk=4))
    assert difference(narrow(TOKENS), sparse(TOKENS)) > 1e-3, "selection should matter as soon as it leaves something out"


def test_the_limit_is_index_topk() -> None:
    assert quick_model(WIDE, max_context=32).dense_attention
    assert not quick_model(WIDE, max_context=33).dense_attention


def test_dense_attention_loads_no_indexer(dense: Glm5Model) -> None:
    read: list[str] = []
    weights = random_weights(WIDE, dtype=torch.float64)
    build(WIDE, lambda name: (read.append(name), weights(name))[1], dtype=torch.float64, max_context=32)
    assert read
    assert not [name for name in read if "indexer" in name]
    assert not {"lightning_indexer", "indexer_prologue", "sparse_mla_attention"} & {s.operator for s in dense.decisions()}
    assert all(layer.index is None for layer in dense.new_cache([32]).layers)


def test_prefill_is_expanded_and_decode_absorbed(dense: Glm5Model) -> None:
    found = calls(dense, lambda: dense.generate([prompt(7)], max_new_tokens=2, stop_ids=()))
    attention = [(name, len(args["query_rope"])) for name, args, _ in found if name.startswith("mla_attention")]
    layers = WIDE.num_hidden_layers
    assert attention == [("mla_attention_expanded", 7)] * layers + [("mla_attention_absorbed", 1)] * layers
    assert {name for name, _, _ in found} >= {"mla_project", "mla_prologue_into_cache", "attention_output", "write_cache"}


def test_both_forms_share_their_weights(dense: Glm5Model) -> None:
    attention = dense.layers[0].attention
    assert attention.project.q_b is attention.prologue.q_b
    assert attention.expanded.w_uk is attention.prologue.w_uk
    assert attention.expanded_output.weight is attention.output.o
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    indexers = sum(p.numel() for n, p in quick_model(WIDE).named_parameters() if "indexer" in n)
    assert parameters == sum(parameter.numel() for parameter in quick_model(WIDE).parameters()) - indexers


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_use_backend_around_a_built_model_raises() -> None:
    model = quick_model()
    with glm5_port.use_backend("cpu"):
        for run in (lambda: model(TOKENS), lambda: model.generate([[1]], max_new_tokens=1)):
            with pytest.raises(SelectionError, match=r"use_backend\('cpu'\) around a model that is built already has no effect"):
                run()
    model(TOKENS)


def test_use_backend_around_construction_decides() -> None:
    config = quick_config()
    with glm5_port.use_backend("cpu"):
        model = build(config, random_weights(config, dtype=torch.float64), dtype=torch.float64)
        model(TOKENS)
    assert model.backend == "cpu"
    assert {str(s.request) for s in model.decisions()} == {"asked for cpu (use_backend)"}
    model(TOKENS)
    with glm5_port.use_backend("auto"), pytest.raises(SelectionError, match="has no effect"):
        model(TOKENS)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 0}, r"max_context=0 is outside 1\.\.256"),
        ({"max_context": 257}, r"max_context=257 is outside 1\.\.256"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"latent_norm_eps": 0.0}, r"latent_norm_eps must be a positive number, got 0\.0"),
        ({"latent_norm_eps": float("nan")}, "latent_norm_eps must be a positive number, got nan"),
        ({"cache_format": "fp9"}, r"cache_format='fp9': no such layout for the latent cache; did you mean fp8\?"),
        ({"cache_format": "fp8"}, "the 656-byte row holds a latent of 512 and a rope key of 64"),
        ({"cache_format": "int8"}, "the 656-byte row holds a latent of 512 and a rope key of 64"),
        ({"dtype": "bfloat"}, r"dtype=bfloat: no such working dtype; did you mean bfloat16\?"),
        ({"dtype": torch.int8}, "dtype=int8: no such working dtype"),
    ],
)
def test_options_outside_their_range_are_refused_before_a_weight_is_read(options: dict[str, Any], message: str) -> None:
    def read(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    with pytest.raises(InputError, match=message):
        build(quick_config(), read, backend="cpu", **options)


def test_the_latent_eps_of_the_model_is_the_one_that_was_asked_for() -> None:
    assert quick_model().config.latent_norm_eps == 1e-5
    model = quick_model(latent_norm_eps=1e-3)
    assert model.config.latent_norm_eps == 1e-3
    assert model.config.rms_norm_eps == 1e-5
    eps = {args["latent_norm_eps"] for name, args, _ in calls(model, lambda: model(TOKENS)) if name == "mla_prologue_into_cache"}
    assert eps == {1e-3}
    assert difference(model(TOKENS), quick_model()(TOKENS)) > 1e-6
