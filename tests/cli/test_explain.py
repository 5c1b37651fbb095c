"""`glm5-port explain`."""

from __future__ import annotations

import json

import pytest

from glm5_port.cli.explain import assumed_facts
from glm5_port.operators import rms_norm
from glm5_port.registry import BACKENDS, OPERATORS, PORTABLE
from glm5_port.testing.tiny import TINY


@pytest.fixture
def musa_kernel():
    """An rms_norm of musa that takes widths up to 4096 only."""
    rms_norm.implement(
        "musa", variant="madeup", not_supported=lambda *, width, **_: ["width above 4096"] if width > 4096 else []
    )(lambda x, weight, eps: x)
    yield "musa/madeup"
    del rms_norm.implementations["musa/madeup"]
    rms_norm._memo.clear()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_the_model_knows_every_fact_of_every_operator_and_no_other(name: str) -> None:
    assert sorted(assumed_facts(None)[name]) == sorted(OPERATORS[name].facts)


def test_the_facts_of_a_checkpoint(command_line, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    record = json.loads(command_line("explain", "lightning_indexer", "--checkpoint", str(tmp_path), "--json").out)
    assert record["facts"]["heads"] == TINY["index_n_heads"]
    assert record["facts"]["top_k"] == TINY["index_topk"]
    missing = command_line("explain", "--checkpoint", str(tmp_path / "nowhere"))
    assert (missing.code, missing.out) == (2, "")


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_answers_for_any_chip_without_having_it(command_line, backend: str) -> None:
    done = command_line("explain", "rms_norm", "--as", backend, "--json")
    record = json.loads(done.out)
    assert done.code == 0
    assert record["hypothetical"] == backend
    assert record["chosen"].split("/")[0] in (backend, PORTABLE)
    assert record["facts"]["device_type"] == BACKENDS[backend].device_type


def test_sparse_mla_attention_as_npu(command_line) -> None:
    done = command_line("explain", "sparse_mla_attention", "--as", "npu")
    assert done.code == 0
    assert done.out.startswith("sparse_mla_attention: ")
    assert "as if npu were here" in done.out
    assert "heads=64" in done.out
    assert "top_k=2048" in done.out


def test_a_fact_decides(command_line, musa_kernel: str) -> None:
    refused = command_line("explain", "rms_norm", "--as", "musa")
    assert "-> torch/eager" in refused.out
    assert f"{musa_kernel}  width above 4096" in refused.out
    taken = command_line("explain", "rms_norm", "--as", "musa", "--fact", "width=2048")
    assert f"-> {musa_kernel}" in taken.out
    assert f"torch/eager  outranked by {musa_kernel}" in taken.out


def test_promises_are_shown(command_line) -> None:
    done = command_line("explain", "lightning_indexer", "--as", "npu")
    assert "promises  npu/aclnn: none; npu/ordered: deterministic, tie_rule; npu/aclnn_int8: none; " in done.out
    assert "torch/eager: deterministic, tie_rule" in done.out
    record = json.loads(command_line("explain", "select_top_k", "--as", "npu", "--json").out)
    assert "tie_rule" in record["promises"]["torch/eager"]


def test_nothing_fits_is_1_with_the_record_on_stdout(command_line) -> None:
    done = command_line("explain", "rms_norm", "--as", "gcu", GLM5_PORT_STRICT="1")
    assert done.code == 1
    assert "NOTHING FITS" in done.out
    assert "GLM5_PORT_STRICT=1 refuses portable implementations" in done.out
    record = json.loads(command_line("explain", "rms_norm", "--as", "gcu", "--json", GLM5_PORT_STRICT="1").out)
    assert record["chosen"] is None


def test_a_backend_that_is_not_here_is_a_reason(command_line) -> None:
    if BACKENDS["gcu"].probe().missing is None:
        pytest.skip("gcu is usable here")
    done = command_line("explain", "rms_norm", GLM5_PORT_BACKEND="gcu")
    assert done.code == 1
    assert "gcu: torch_gcu is not installed" in done.out


def test_all_operators_as_a_table(command_line) -> None:
    done = command_line("explain", "--as", "mlu")
    assert all(f"\n{name} " in f"\n{done.out}" for name in OPERATORS)
    records = json.loads(command_line("explain", "--as", "mlu", "--json").out)
    assert [record["operator"] for record in records] == list(OPERATORS)


def test_in_the_table_a_fact_holds_where_it_exists(command_line) -> None:
    records = json.loads(command_line("explain", "--as", "npu", "--fact", "page_size=128", "--json").out)
    with_pages = [r for r in records if "page_size" in r["facts"]]
    assert with_pages
    assert {r["facts"]["page_size"] for r in with_pages} == {128}
    unknown = command_line("explain", "--fact", "page_sise=128")
    assert unknown.code == 2
    assert "did you mean page_size?" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rms_nrm",), "no such operator: rms_nrm; did you mean rms_norm?"),
        (("rms_norm", "--as", "npuu"), "as=npuu: no such backend; did you mean npu?"),
        (("rms_norm", "--dtype", "bfloat61"), "did you mean bfloat16?"),
        (("rms_norm", "--fact", "widht=3"), "rms_norm: unknown fact 'widht'; did you mean width?"),
        (("rms_norm", "--fact", "width=wide"), "--fact width=wide: expected a whole number, such as 6144"),
        (("rms_norm", "--fact", "width"), "a fact is given as NAME=VALUE"),
        (("rms_norm", "--fact", "needs_grad=perhaps"), "expected true or false"),
    ],
)
def test_wrong_use_is_2_with_a_suggestion(command_line, arguments: tuple[str, ...], said: str) -> None:
    done = command_line("explain", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_gradients_are_asked_for(command_line) -> None:
    record = json.loads(command_line("explain", "rms_norm", "--needs-grad", "--dtype", "float32", "--json").out)
    assert record["facts"] | {"needs_grad": True, "dtype": "float32"} == record["facts"]
    assert rms_norm.implementations[record["chosen"]].differentiable
