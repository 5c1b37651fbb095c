"""Native attention on every instruction set of this machine: tails, threads, batches, strides, and what must not leak.

What the operators mean is held to by parity; here are the sizes and layouts that its cases do not reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.dispatch import Operator
from glm5_port.operators.cache import cache_layout, slots_at
from glm5_port.operators.mla import attention_output, mla_attention_absorbed, mla_attention_expanded
from glm5_port.operators.sparse_attention import sparse_mla_attention

ISAS = [isa for isa in extension.MATRIX if not extension.isa_missing(isa)]
FORMATS = ("plain", "fp8", "int8")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Relative root-mean-square error against float64: bfloat16 rounds the result (1.7e-3), weights and expanded keys once each."""

pytestmark = pytest.mark.skipif(not ISAS, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")


@pytest.fixture(autouse=True)
def fresh_flags() -> Iterator[None]:
    yield
    flags.reset()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(flags.CPU_ISA.name, request.param)
    flags.reset()
    return str(request.param)


@pytest.fixture
def widest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flags.CPU_ISA.name, raising=False)
    flags.reset()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def make_call(
    operator: Operator,
    *,
    heads: int = 3,
    widths: tuple[int, int] = (24, 8),
    new: tuple[int, ...] = (2, 1),
    lengths: tuple[int, ...] = (21, 7),
    top_k: int = 9,
    page_size: int = 4,
    cache_format: str = "plain",
    dtype: torch.dtype = torch.bfloat16,
    nope_value: tuple[int, int] = (10, 12),
) -> dict[str, Any]:
    """Arguments of an attention operator; rows that are not written are NaN."""
    tokens, latent, rope = sum(new), *widths
    columns = -(-max(lengths) // page_size)
    pages = len(lengths) * columns
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(torch.int32).view(len(lengths), columns)
    layout = cache_layout("latent", cache_format)
    cache = layout.allocate(pages, page_size, widths, dtype)
    for field in cache:
        field.view(torch.uint8).fill_(0xFF)
    for sequence, length in enumerate(lengths):
        rows = [normal(length, width, seed=10 * sequence + width, dtype=dtype) for width in widths]
        slots = slots_at(table, torch.tensor(sequence), torch.arange(length), page_size)
        for field, values in zip(cache, layout.encode(rows), strict=True):
            field.flatten(0, 1)[slots] = values.to(field.dtype)
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    batch = {"block_table": table, "query_starts": starts, "lengths": torch.tensor(lengths, dtype=torch.int32)}
    call: dict[str, Any] = {"latent_cache": cache, **batch, "scale": (latent + rope) ** -0.5, "cache_format": cache_format}
    call["query_rope"] = normal(tokens, heads, rope, seed=3, dtype=dtype)
    if operator is mla_attention_expanded:
        nope, value = nope_value
        call["query_nope"] = normal(tokens, heads, nope, seed=4, dtype=dtype)
        call["w_uk"] = normal(heads, nope, latent, seed=5, dtype=dtype, std=latent**-0.5)
        call["w_uv"] = normal(heads, value, latent, seed=6, dtype=dtype, std=latent**-0.5)
    else:
        call["query_latent"] = normal(tokens, heads, latent, seed=4, dtype=dtype)
    if operator is sparse_mla_attention:
        reach = max(lengths)
        picks = [torch.randperm(reach, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(tokens)]
        call["indices"] = torch.stack(picks).to(torch.int32)
        call["indices"][:, ::5] = -1
    return call


def run(operator: Operator, call: dict[str, Any], isa: str | None = None) -> Tensor:
    bound = operator.bind(**operator.facts_of(call) | {"device_type": "cpu", "dtype": dtype_of(call)})
    assert bound.implementation.id.startswith("cpu/")
    if isa is not None:
        assert bound.implementation.id == f"cpu/{nearest(isa, bound.implementation.operator)}"
    result: Tensor = bound(**call)
    return result


def dtype_of(call: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = call["query_rope" if "query_rope" in call else "latent_out"].dtype
    return dtype


def nearest(isa: str, operator: Operator) -> str:
    """The widest instruction set up to `isa` that the operator is registered for."""
    known = [name for name in extension.ISAS if f"cpu/{name}" in operator.implementations]
    return [name for name in known if extension.ISAS.index(name) <= extension.ISAS.index(isa)][-1]


def gold(operator: Operator, call: dict[str, Any]) -> Tensor:
    raised = {name: raise_to_float64(value) for name, value in call.items()}
    result: Tensor = operator.reference(**raised)
    return result


def raise_to_float64(value: Any) -> Any:
    if isinstance(value, list):
        return [raise_to_float64(item) for item in value]
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(out).all()
    error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= TOLERANCE[out.dtype], f"relative error {error:.2e}"


ATTENTION = (sparse_mla_attention, mla_attention_absorbed, mla_attention_expanded)
every_operator = pytest.mark.parametrize("operator", ATTENTION, ids=lambda operator: operator.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@every_operator
@every_dtype
def test_tails_of_heads_widths_and_keys(isa: str, operator: Operator, dtype: torch.dtype) -> None:
    """Every remainder of tiles, vectors, panels, blocks and splits, each on both sides."""
    sizes: list[dict[str, Any]] = [{"heads": heads} for heads in (1, 2, 5, 6, 7, 16, 17, 33, 48, 64, 65, 70)]
    sizes += [{"widths": widths} for widths in ((1, 2), (15, 2), (16, 16), (17, 18), (31, 6), (64, 32), (65, 2), (130, 64))]
    sizes += [{"lengths": (keys, 7), "top_k": keys} for keys in (3, 63, 64, 65, 127, 128, 129, 511, 512, 513, 641)]
    sizes += [{"new": (new, 1), "lengths": (new + 3, 2)} for new in (1, 31, 32, 33, 64, 65, 130)]
    if operator is mla_attention_expanded:
        sizes += [{"nope_value": pair} for pair in ((1, 1), (16, 15), (17, 64), (65, 31), (64, 130))]
    for size in sizes:
        call = make_call(operator, dtype=dtype, **size)
        assert_near(run(operator, call, isa), gold(operator, call))


@every_operator
@every_dtype
@pytest.mark.parametrize("cache_format", FORMATS)
def test_formats(isa: str, operator: Operator, dtype: torch.dtype, cache_format: str) -> None:
    call = make_call(
        operator, dtype=dtype, cache_format=cache_format, widths=(512, 64), lengths=(141, 7), top_k=139, nope_value=(192, 256)
    )
    assert_near(run(operator, call, isa), gold(operator, call))


@every_operator
@pytest.mark.parametrize("cache_format", FORMATS)
def test_any_number_of_threads_gives_the_same_bits(isa: str, operator: Operator, cache_format: str) -> None:
    call = make_call(
        operator, widths=(512, 64), new=(1, 3), lengths=(1300, 9), top_k=1250, page_size=16, cache_format=cache_format
    )
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run(operator, call, isa))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.int16), other.view(torch.int16))


@every_operator
@every_dtype
def test_a_sequence_alone_gives_the_bits_of_the_batch(isa: str, operator: Operator, dtype: torch.dtype) -> None:
    call = make_call(operator, dtype=dtype, new=(1, 70, 0, 3), lengths=(600, 70, 5, 130), top_k=560)
    together = run(operator, call, isa)
    starts = call["query_starts"]
    for sequence in range(4):
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        rows = {name: call[name][first:last] for name in ("query_latent", "query_nope", "query_rope", "indices") if name in call}
        own = {"query_starts": starts[sequence : sequence + 2] - first}
        own |= {name: call[name][sequence : sequence + 1] for name in ("lengths", "block_table")}
        alone = run(operator, call | rows | own, isa)
        assert torch.equal(alone, together[first:last])


@every_operator
@every_dtype
def test_strided_and_unaligned_tensors(isa: str, operator: Operator, dtype: torch.dtype) -> None:
    """Queries inside wider rows, caches that are views of a wider pool at an odd offset, a block table of a wider one."""
    call = make_call(operator, dtype=dtype)
    expected = run(operator, call, isa)

    def within(x: Tensor, *, before: int, behind: int) -> Tensor:
        wide = torch.full(
            (*x.shape[:-1], before + x.shape[-1] + behind), torch.nan if x.is_floating_point() else -5, dtype=x.dtype
        )
        view = wide[..., before : before + x.shape[-1]]
        view.copy_(x)
        return view

    def every_second(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    moved = {name: within(x, before=3, behind=2) for name, x in call.items() if isinstance(x, Tensor) and x.dim() > 1}
    moved["latent_cache"] = [within(field, before=1, behind=4) for field in call["latent_cache"]]
    assert torch.equal(run(operator, call | moved, isa), expected)
    apart = {name: every_second(x) for name, x in call.items() if isinstance(x, Tensor) and x.dim() > 1}
    apart["latent_cache"] = [every_second(field) for field in call["latent_cache"]]
    assert torch.equal(run(operator, call | apart, isa), expected)


@every_operator
@pytest.mark.parametrize("cache_format", FORMATS)
def test_rows_that_are_not_seen_do_not_leak(isa: str, operator: Operator, cache_format: str) -> None:
    """NaN in every row that no token may see: unwritten ones (`make_call`) and, for the sparse form, those not selected."""
    call = make_call(operator, widths=(512, 64), cache_format=cache_format)
    expected = run(operator, call, isa)
    assert torch.isfinite(expected).all()
    if operator is sparse_mla_attention:
        seen = {int(i) for row in call["indices"] for i in row if i >= 0}
        for sequence in range(2):
            for position in set(range(int(call["lengths"][sequence]))) - seen:
                slot = int(slots_at(call["block_table"], torch.tensor(sequence), torch.tensor(position), 4))
                for field in call["latent_cache"]:
                    field.flatten(0, 1)[slot].view(torch.uint8).fill_(0xFF)
        assert torch.equal(run(operator, call, isa), expected)


@every_operator
def test_nan_in_a_visible_row_reaches_its_own_sequence_alone(isa: str, operator: Operator) -> None:
    call = make_call(operator, new=(2, 2), lengths=(9, 7), top_k=9)
    if operator is sparse_mla_attention:
        call["indices"] = torch.arange(9, dtype=torch.int32).expand(4, 9).contiguous()
    slot = int(slots_at(call["block_table"], torch.tensor(0), torch.tensor(2), 4))
    call["latent_cache"][0].flatten(0, 1)[slot] = torch.nan
    out = run(operator, call, isa)
    assert out[:2].isnan().all()
    assert torch.isfinite(out[2:]).all()


@every_operator
def test_no_tokens_and_padding(isa: str, operator: Operator) -> None:
    call = make_call(operator)
    padded = {
        name: torch.cat((call[name], call[name][:2]))
        for name in call
        if name.startswith(("query_", "indices")) and name != "query_starts"
    }
    out = run(operator, call | padded, isa)
    assert torch.equal(out[:3], run(operator, call, isa))
    assert (out[3:] == 0).all()
    empty = {name: x[:0] for name, x in padded.items()}
    none = run(operator, call | empty | {"query_starts": torch.zeros_like(call["query_starts"])}, isa)
    assert none.shape == (0, *out.shape[1:])


def test_an_index_twice_counts_twice(isa: str) -> None:
    call = make_call(sparse_mla_attention, new=(1, 1), top_k=3)
    call["indices"] = torch.tensor([[4, 4, 2], [-1, 0, -1]], dtype=torch.int32)
    assert_near(run(sparse_mla_attention, call, isa), gold(sparse_mla_attention, call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_caches_of_other_dtypes_are_read(widest: None, dtype: torch.dtype) -> None:
    call = make_call(mla_attention_absorbed, dtype=torch.float32)
    other = call | {"latent_cache": [field.to(dtype) for field in call["latent_cache"]]}
    assert_near(run(mla_attention_absorbed, other), gold(mla_attention_absorbed, other))


def test_a_foreign_cache_format_is_refused_beforehand() -> None:
    facts = sparse_mla_attention.facts_of(make_call(sparse_mla_attention)) | {"device_type": "cpu", "cache_format": "nz"}
    reasons = sparse_mla_attention.implementations["cpu/avx2"].not_supported(**facts)
    assert "reads caches of format plain, fp8, int8, not nz" in reasons


# -- attention_output --------------------------------------------------------------------------------------------------------


def output_call(tokens: int, heads: int, latent: int, value: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_out": normal(tokens, heads, latent, seed=1, dtype=dtype),
        "w_uv": normal(heads, value, latent, seed=2, dtype=dtype, std=latent**-0.5),
        "o": normal(width, heads * value, seed=3, dtype=dtype, std=(heads * value) ** -0.5),
    }


@every_dtype
def test_output_tails(isa: str, dtype: torch.dtype) -> None:
    """Every remainder of lanes, panels, rows of a task and words, each on both sides."""
    sizes = [(tokens, 2, 16, 8, 24) for tokens in (1, 15, 16, 17, 33, 64, 65, 130)]
    sizes += [(3, 1, latent, 5, 7) for latent in (1, 2, 15, 17, 31, 33, 600)]
    sizes += [(3, 3, 24, value, width) for value, width in ((1, 1), (6, 63), (7, 64), (64, 65), (65, 130))]
    for size in sizes:
        call = output_call(*size, dtype)
        assert_near(run(attention_output, call, isa), gold(attention_output, call))


def test_output_is_the_same_for_threads_batches_and_strides(isa: str) -> None:
    call = output_call(70, 5, 48, 33, 129, torch.bfloat16)
    expected = run(attention_output, call, isa)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            assert torch.equal(run(attention_output, call, isa), expected)
    finally:
        torch.set_num_threads(before)
    for token in (0, 69):
        alone = run(attention_output, call | {"latent_out": call["latent_out"][token : token + 1]}, isa)
        assert torch.equal(alone, expected[token : token + 1])
    moved = {name: torch.cat((x[..., :3], x, x[..., :2]), -1)[..., 3:-2] for name, x in call.items()}
    assert torch.equal(run(attention_output, moved, isa), expected)
    apart = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in call.items()}
    assert torch.equal(run(attention_output, apart, isa), expected)
