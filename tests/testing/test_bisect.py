"""Bisect names the operator that is broken, and no other, however far its error spreads through the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port.errors import InputError
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.testing.bisect import bisect, build_pair
from tests.model.models import prompt, quick_config
from tests.test_config_int4 import IGNORE, block
from tests.testing.mutants import MUTANTS, Mutant

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "indexer_types": ["full", "shared", "full"],
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 3,
}
PROMPTS = [prompt(13), prompt(7, seed=1)]

GROUP = 8
"""INT4 group size of the quick model, whose rows are short."""

Pair = tuple[Glm5Model, Glm5Model]


def pair(*, ties: bool = False, int4: bool = False, ignore: tuple[str, ...] = tuple(IGNORE), **options: Any) -> Pair:
    """(suspect, reference). With `int4` what `ignore` does not name is random codes and scales. With `ties` one index head, so
    that most scores are zero; and experts come in pairs with one score, of which three are chosen, so that the cut always goes
    through a pair."""
    options = {"dtype": torch.float32, "block_size": 5, "backend": "cpu", **options}
    packed = {"quantization_config": {**block(group_size=GROUP), "ignore": [*ignore]}, "v_head_dim": 12} if int4 else {}
    config = quick_config(**SHAPE, index_n_heads=1 if ties else 8, **packed)
    weights = random_weights(config, dtype=options["dtype"], mtp=options.get("mtp", False))

    def read(name: str) -> Tensor:
        tensor = weights(name)
        if name.endswith("weight_packed"):
            return torch.randint(-(2**31), 2**31, tensor.shape, generator=torch.Generator().manual_seed(len(name))).to(
                torch.int32
            )
        if name.endswith("weight_scale"):
            return 0.01 + 0.05 * tensor.abs()
        if ties and name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
            tensor[1::2] = tensor[::2]
        return tensor

    return build(config, read, **options), build(config, read, **options, implementation="reference")


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {
        "sparse": pair(),
        "dense": pair(max_context=4),
        "mtp": pair(mtp=True),
        "bfloat16": pair(dtype=torch.bfloat16, mtp=True),
        "ties": pair(ties=True),
        "int4": pair(int4=True),
        "projections": pair(int4=True, ignore=("lm_head", "re:.*weights_proj"), int4_activations="int8"),
    }


def run(models: Pair, *, dense: bool = False) -> Any:
    """Two prompts, prefill and one step of decoding."""
    return bisect(*models, [tokens[:2] for tokens in PROMPTS] if dense else PROMPTS, max_new_tokens=2)


@contextmanager
def broken(model: Glm5Model, operator: str, function: Any, only: int | None = None) -> Iterator[list[int]]:
    """Every binding of `operator` (or the one at place `only` among them) runs `function`; yields their numbers."""
    numbers = [n for n, bound in enumerate(model.binder.bindings) if bound.selection.operator == operator]
    numbers = numbers if only is None else [numbers[only]]
    bindings = [model.binder.bindings[number] for number in numbers]
    before = [bound.function for bound in bindings]
    for bound in bindings:
        bound.function = function
    try:
        yield numbers
    finally:
        for bound, inner in zip(bindings, before, strict=True):
            bound.function = inner


# -- nothing is broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "dense", "mtp", "bfloat16", "ties", "int4", "projections"])
def test_nothing_is_found_where_nothing_is_broken(pairs: dict[str, Pair], kind: str) -> None:
    seen: list[tuple[str, int, int]] = []
    prompts = [tokens[:2] for tokens in PROMPTS] if kind == "dense" else PROMPTS
    report = bisect(*pairs[kind], prompts, max_new_tokens=2, progress=lambda *told: seen.append(told))
    assert report.first is None
    assert report.operators == {}
    bound = {binding.selection.operator for binding in pairs[kind][0].binder.bindings}
    assert set(report.worst_share) == bound, "every operator of the model was called"
    assert all(share <= 1 for share in report.worst_share.values())
    assert any(share > 0 for share in report.worst_share.values()), "rounding should be seen"
    assert [place for _, place, _ in seen] == list(range(report.calls))
    assert {operator for operator, _, _ in seen} == bound


def test_the_reference_is_as_it_was(pairs: dict[str, Pair]) -> None:
    functions = [[bound.function for bound in model.binder.bindings] for model in pairs["sparse"]]
    run(pairs["sparse"])
    assert [[bound.function for bound in model.binder.bindings] for model in pairs["sparse"]] == functions


def test_a_report_is_json(pairs: dict[str, Pair]) -> None:
    with broken(pairs["sparse"][0], "linear", lambda x, weight: 2 * x @ weight.T):
        report = json.loads(json.dumps(run(pairs["sparse"]).as_dict()))
    assert report["first"]["operator"] == "linear"
    assert report["first"]["problems"]


# -- mutants -----------------------------------------------------------------------------------------------------------

NOT_IN_A_MODEL = {
    "mla_prologue", "indexer_scores", "select_top_k",  # models bind the operators that contain them
    "dispatch_tokens", "combine_tokens",  # only between ranks
    "int4_quantize", "int4_quantize_measured", "int4_dequantize",  # export and training call them
    "int8_matmul",  # no model computes with it yet
}  # fmt: skip
INVISIBLE = {
    "mla_prologue_into_cache: padding token written": "a model makes no padding",
    "write_cache: padding token written to slot 0": "a model makes no padding",
    "write_cache: fp8 scale left out": "plain cache",
    "write_cache: int8 values cut instead of rounded": "plain cache",
    "write_cache: index scale rounded down to a power of two": "plain cache",
    "sparse_mla_attention: causal cut left out": "the indexer selects no later position",
    "expert_mlp: foreign ids taken modulo": "ids are foreign under expert parallelism only",
    "rms_norm: sum of squares in the working dtype": "within the budget at a width of 32",
}
"""Mutants that change nothing in these models. Parity catches them."""
IN_BFLOAT16 = {"indexer_prologue: head weights rounded to the working dtype"}
"""In float32 this is no mistake."""
MORE = (
    Mutant("mla_prologue_into_cache", "rope layout of the other kind", {
        "query_rope = rotate.reference(query_rope, cos, sin, interleaved=rope_interleaved":
        "query_rope = rotate.reference(query_rope, cos, sin, interleaved=not rope_interleaved"}),
    Mutant("indexer_prologue", "half-split pairs, as in DeepSeek's indexer", {
        "key_TX = rotate.reference(key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved":
        "key_TX = rotate.reference(key_TX.unsqueeze(1), cos, sin, interleaved=not rope_interleaved"}),
)  # fmt: skip
DENSE_ONLY = {"mla_project", "mla_attention_expanded", "mla_attention_absorbed"}
PROJECTIONS_ONLY = {"rotate", "linear_per_head", "int4_matmul", "expert_mlp_int4_w4a8"}
IN_MODELS = [m for m in (*MUTANTS, *MORE) if m.operator not in NOT_IN_A_MODEL and m.id not in INVISIBLE]


def kind_of(mutant: Mutant) -> str:
    if mutant.id in IN_BFLOAT16:
        return "bfloat16"
    if mutant.mistake.startswith("ties"):
        return "ties"
    if mutant.operator in DENSE_ONLY:
        return "dense"
    if mutant.operator == "expert_mlp_int4":
        return "int4"
    if mutant.operator in PROJECTIONS_ONLY:
        return "projections"
    return "mtp" if mutant.operator == "rms_norm" else "sparse"


def test_the_lists_name_mutants_that_exist() -> None:
    known = {mutant.id for mutant in MUTANTS}
    assert set(INVISIBLE) | IN_BFLOAT16 <= known
    assert {mutant.operator for mutant in MUTANTS} >= NOT_IN_A_MODEL


def test_every_operator_of_a_model_has_a_mutant_here(pairs: dict[str, Pair]) -> None:
    bound = {b.selection.operator for models in pairs.values() for b in models[0].binder.bindings}
    assert bound == {mutant.operator for mutant in IN_MODELS}


@pytest.mark.parametrize("mutant", IN_MODELS, ids=lambda mutant: mutant.id)
def test_the_broken_operator_is_named_and_no_other(pairs: dict[str, Pair], mutant: Mutant) -> None:
    kind = kind_of(mutant)
    with broken(pairs[kind][0], mutant.operator, mutant.function()) as numbers:
        report = run(pairs[kind], dense=kind == "dense")
    assert report.first is not None, "not found"
    assert report.first.operator == mutant.operator
    assert report.first.binding in numbers
    assert list(report.operators) == [mutant.operator], "later layers compute with wrong inputs, and are not blamed"


@pytest.mark.parametrize("operator", ["sparse_mla_attention", "gated_mlp", "lightning_indexer"])
@pytest.mark.parametrize("place", [0, -2])
def test_one_binding_of_many(pairs: dict[str, Pair], operator: str, place: int) -> None:
    """-2 is the prefill of the last layer that has one (or its dense MLP): the layers before it are right."""
    mutant = next(m for m in IN_MODELS if m.operator == operator)
    suspect, _ = pairs["sparse"]
    tokens = torch.tensor([PROMPTS[0]])
    right = suspect(tokens)
    with broken(suspect, operator, mutant.function(), only=place) as (number,):
        assert (suspect(tokens) - right).abs().max() > 1e-3, "the logits should show it"
        report = run(pairs["sparse"])
    assert report.first is not None
    assert report.first.binding == number
    assert list(report.operators) == [operator]


def test_what_an_operator_raises_is_reported(pairs: dict[str, Pair]) -> None:
    def fails(**_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    with broken(pairs["sparse"][0], "expert_mlp", fails):
        report = run(pairs["sparse"])
    assert report.first is not None
    assert report.first.operator == "expert_mlp"
    assert report.first.problems == ["raised RuntimeError: no kernel image is available"]
    assert list(report.operators) == ["expert_mlp"]


def test_two_broken_operators_are_listed_in_the_order_of_the_model(pairs: dict[str, Pair]) -> None:
    suspect, _ = pairs["sparse"]
    with (
        broken(suspect, "expert_mlp", next(m for m in IN_MODELS if m.operator == "expert_mlp").function()),
        broken(suspect, "attention_output", next(m for m in IN_MODELS if m.operator == "attention_output").function()),
    ):
        report = run(pairs["sparse"])
    assert list(report.operators) == ["attention_output", "expert_mlp"]


# -- the pair ----------------------------------------------------------------------------------------------------------


def test_different_models_are_refused(pairs: dict[str, Pair]) -> None:
    with pytest.raises(InputError, match="two builds of one model"):
        bisect(pairs["sparse"][0], pairs["mtp"][1], PROMPTS)
    other = quick_config(num_hidden_layers=3, indexer_types=["full", "full", "shared"])
    suspect = build(other, random_weights(other, dtype=torch.float32), backend="cpu")
    with pytest.raises(InputError, match="two builds of one model"):
        bisect(suspect, pairs["sparse"][1], PROMPTS)


def test_a_weight_that_was_loaded_wrongly_is_found_too(pairs: dict[str, Pair]) -> None:
    """The suspect keeps its own weights, so a bad one looks like a bad operator of that layer."""
    suspect, _ = pairs["sparse"]
    weight = suspect.layers[2].attention.output.o
    before = weight.clone()
    try:
        with torch.no_grad():
            weight.copy_(before.flip(1))
        report = run(pairs["sparse"])
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert list(report.operators) == ["attention_output"]
    assert report.operators["attention_output"] == 2, "one layer, prefill and decode"


@pytest.mark.parametrize("mtp", [False, True])
def test_build_pair_gives_both_the_same_weights(mtp: bool) -> None:
    suspect, reference = build_pair(quick_config(), backend="cpu", dtype=torch.float64, mtp=mtp)
    assert (suspect.mtp is not None) == mtp
    assert {s.chosen.id for s in reference.decisions() if s.chosen} == {"reference"}
    assert "reference" not in {s.chosen.id for s in suspect.decisions() if s.chosen}
    for (name, mine), (other, theirs) in zip(suspect.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
