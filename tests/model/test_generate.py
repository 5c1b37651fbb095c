"""Generation: unequal batches, pages, chunks, the cache against recomputation, stops, limits, streams and wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_port.errors import InputError
from glm5_port.model import decoder, generate
from glm5_port.model.decoder import Glm5Model
from tests.model.models import calls, difference, prompt, quick_config, quick_model

PROMPTS = [prompt(13), prompt(1), prompt(6, seed=1), prompt(29, seed=2)]
NEW = 9


@pytest.fixture(scope="module")
def model() -> Glm5Model:
    return quick_model(block_size=5)


@pytest.fixture(scope="module")
def expected(model: Glm5Model) -> list[list[int]]:
    """Each prompt alone, continued by recomputing everything for every token."""
    results = []
    for tokens in PROMPTS:
        row = list(tokens)
        for _ in range(NEW):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        results.append(row)
    assert len({tuple(row[-NEW:]) for row in results}) == len(PROMPTS), "the continuations should differ"
    return results


def step_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Makes every step at most `tokens` long."""
    for module in (decoder, generate):
        monkeypatch.setattr(module, "MAX_STEP_TOKENS", tokens)


def test_a_batch_equals_each_alone_and_the_cache_equals_recomputation(model: Glm5Model, expected: list[list[int]]) -> None:
    together = model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=())
    alone = [model.generate([tokens], max_new_tokens=NEW, stop_ids=())[0] for tokens in PROMPTS]
    assert together == expected
    assert alone == expected


@pytest.mark.parametrize("block_size", [1, 64, 4096])
def test_pages_of_any_size(block_size: int, expected: list[list[int]]) -> None:
    assert quick_model(block_size=block_size).generate(PROMPTS, max_new_tokens=NEW, stop_ids=()) == expected


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_chunked_prefill(model: Glm5Model, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """7: steps that end one prompt and begin the next, and a decode step that fits all four; 1: decode goes one by one."""
    step_tokens(monkeypatch, tokens)
    sizes = [
        len(args["x"])
        for name, args, _ in calls(model, lambda: model.generate(PROMPTS, max_new_tokens=1))
        if name == "add_rms_norm"
    ]
    assert max(sizes) == tokens
    assert model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=()) == expected


def test_one_step_holds_several_sequences(model: Glm5Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step_tokens(monkeypatch, 16)
    starts = [
        args["query_starts"].tolist()
        for name, args, _ in calls(model, lambda: model.generate(PROMPTS, max_new_tokens=1))
        if name == "sparse_mla_attention"
    ]
    layers = model.config.num_hidden_layers
    assert starts[::layers] == [[0, 13, 14, 16], [0, 4, 16], [0, 16], [0, 1]]


def test_chunked_logits_equal_whole_ones(model: Glm5Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([PROMPTS[3], PROMPTS[3][::-1]])
    whole = model(tokens)
    step_tokens(monkeypatch, 7)
    assert difference(model(tokens), whole) < 1e-10


def test_logits_of_a_padded_batch(model: Glm5Model) -> None:
    lengths = [13, 0, 29]
    padded = torch.full((3, 29), 38)
    padded[0, :13], padded[2] = torch.tensor(PROMPTS[0]), torch.tensor(PROMPTS[3])
    logits = model(padded, lengths=lengths)
    assert difference(logits[0, :13], model(torch.tensor([PROMPTS[0]]))[0]) < 1e-10
    assert difference(logits[2], model(torch.tensor([PROMPTS[3]]))[0]) < 1e-10
    assert not logits[0, 13:].any()
    assert not logits[1].any()
    assert model(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, model.config.vocab_size)


def test_logits_for_last_positions_only(model: Glm5Model) -> None:
    vocabulary = model.config.vocab_size
    found = calls(model, lambda: model.generate(PROMPTS, max_new_tokens=3, stop_ids=()))
    heads = [result.shape for name, _, result in found if name == "linear" and result.shape[-1] == vocabulary]
    assert heads == [(len(PROMPTS), vocabulary)] * 3


# -- stops and limits --------------------------------------------------------------------------------------------------


def cut(row: list[int], start: int, stops: set[int]) -> list[int]:
    """`row` up to and with the first stop from `start` on."""
    place = next((i for i in range(start, len(row)) if row[i] in stops), len(row) - 1)
    return row[: place + 1]


def test_stop_ids(model: Glm5Model, expected: list[list[int]]) -> None:
    stop = expected[0][len(PROMPTS[0]) + 3]
    wanted = [cut(row, len(tokens), {stop}) for row, tokens in zip(expected, PROMPTS, strict=True)]
    assert wanted != expected
    assert model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=[stop]) == wanted
    before, model.stop_ids = model.stop_ids, (stop,)
    try:
        assert model.generate(PROMPTS, max_new_tokens=NEW) == wanted, "stop_ids of the model hold when none are given"
        assert model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=()) == expected, "an empty tuple means none"
    finally:
        model.stop_ids = before


def test_stop_ids_default_to_the_config(model: Glm5Model) -> None:
    assert model.stop_ids == (39,)


def test_tensor_input_is_padded(model: Glm5Model) -> None:
    tokens = torch.tensor([prompt(6, seed=5), prompt(6, seed=6)])
    free = model.generate(tokens, max_new_tokens=NEW, stop_ids=())
    assert isinstance(free, torch.Tensor)
    assert free.dtype == tokens.dtype
    stop = int(free[0, 8])
    rows = [cut(row, 6, {stop}) for row in free.tolist()]
    longest = max(map(len, rows))
    assert len(rows[0]) < longest, "choose another seed: no row ends early"
    result = model.generate(tokens, max_new_tokens=NEW, stop_ids=[stop])
    assert result.tolist() == [row + [38] * (longest - len(row)) for row in rows]

    without_pad = quick_model(quick_config(pad_token_id=None), block_size=5)
    result = without_pad.generate(tokens, max_new_tokens=NEW, stop_ids=[stop])
    assert result.tolist() == [row + [row[-1]] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("mtp", [False, True])
def test_the_stream_concatenates_to_the_result(mtp: bool) -> None:
    model = quick_model(block_size=5, mtp=mtp)
    result = model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=())
    stop = result[3][len(PROMPTS[3]) + 2]
    result = model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=[stop])
    rows = [list(tokens) for tokens in PROMPTS]
    ends: dict[int, str] = {}
    for emissions in model.stream(PROMPTS, max_new_tokens=NEW, stop_ids=[stop]):
        assert emissions
        for emission in emissions:
            assert emission.row not in ends, "nothing comes after the end"
            assert emission.tokens
            rows[emission.row] += emission.tokens
            if emission.finished:
                ends[emission.row] = emission.finished
    assert rows == result
    assert ends == {row: "stop" if tokens[-1] == stop else "length" for row, tokens in enumerate(result)}
    assert set(ends.values()) == {"stop", "length"}


def test_an_abandoned_stream_leaves_the_model_usable(model: Glm5Model, expected: list[list[int]]) -> None:
    stream = model.stream(PROMPTS, max_new_tokens=NEW, stop_ids=())
    next(stream)
    assert model.generate(PROMPTS, max_new_tokens=NEW, stop_ids=()) == expected
    stream.close()


def test_nothing_to_generate(model: Glm5Model) -> None:
    assert model.generate(PROMPTS, max_new_tokens=0) == PROMPTS
    assert list(model.stream(PROMPTS, max_new_tokens=0)) == []
    assert model.generate([], max_new_tokens=3) == []
    tokens = torch.tensor([PROMPTS[0]])
    assert torch.equal(model.generate(tokens, max_new_tokens=0), tokens)
    assert model.generate(torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=2).shape == (0, 0)


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 2], []], {}, "prompt 1 is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "prompt 0 is empty"),
        ([[1, 40]], {}, r"token ids must lie in 0\.\.39, got 1\.\.40"),
        ([[-1, 3]], {}, r"token ids must lie in 0\.\.39, got -1\.\.3"),
        ([[2**70]], {}, r"token ids must lie in 0\.\.39"),
        ([[1.5]], {}, "integer token ids"),
        (torch.zeros(1, 3), {}, "integer token ids"),
        ([1, 2, 3], {}, "a list of prompts"),
        (torch.zeros(3, dtype=torch.int64), {}, r"must be \[B, S\] or a list of prompts"),
        ([[1] * 250], {"max_new_tokens": 7}, "257 positions were asked for, this model was loaded for max_context=256"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ([[1]], {"draft_tokens": 0}, "draft_tokens at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature must be 0"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p must lie in"),
    ],
)
def test_wrong_input(model: Glm5Model, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(prompts, **{"max_new_tokens": 2, **options})


def test_a_stream_refuses_before_its_first_step(model: Glm5Model) -> None:
    with pytest.raises(InputError, match="prompt 0 is empty"):
        model.stream([[]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("input_ids", "lengths", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"input_ids must be \[B, S\]"),
        (torch.zeros(1, 3), None, "must hold integers, got torch.float32"),
        (torch.full((1, 3), 40), None, r"token ids must lie in 0\.\.39"),
        (torch.zeros(1, 257, dtype=torch.int64), None, "257 positions"),
        (torch.zeros(2, 3, dtype=torch.int64), [3], "lengths="),
        (torch.zeros(2, 3, dtype=torch.int64), [3, 4], "lengths="),
    ],
)
def test_wrong_input_of_forward(model: Glm5Model, input_ids: torch.Tensor, lengths: list[int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(input_ids, lengths=lengths)


def test_the_whole_context_can_be_used(model: Glm5Model) -> None:
    (row,) = model.generate([[1] * 250], max_new_tokens=6, stop_ids=())
    assert len(row) == 256


def test_a_model_without_weights_says_so() -> None:
    from glm5_port.model.decoder import Glm5Model

    empty = Glm5Model(quick_config(), backend="cpu", requested=None, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(InputError, match="has no weights yet"):
        empty.generate([[1]], max_new_tokens=1)


def test_a_model_keeps_its_dtype_and_device_type() -> None:
    model = quick_model(dtype=torch.bfloat16)
    assert model.to("cpu") is model
    for move in (lambda: model.to(torch.float32), lambda: model.to("meta"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(InputError, match=r"were bound for torch\.bfloat16 on cpu"):
            move()
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("correction_bias")} == {torch.float32}
