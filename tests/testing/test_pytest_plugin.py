"""The pytest plugin: `--require-backend`, failures that name their cases, and the matrix, alone and under pytest-xdist."""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from glm5_port.operators import rms_norm
from glm5_port.registry import BACKENDS
from glm5_port.requests import usable_backends
from glm5_port.testing import conformance, parity
from glm5_port.testing.cases import WIDTH

pytest_plugins = ["pytester"]

INSTALLED = any(point.name == "glm5_port" for point in metadata.entry_points(group="pytest11"))
PLUGIN = [] if INSTALLED else ["-p", "glm5_port.testing.pytest_plugin"]
ONLY_NORM = ["-k", "(test_parity and cpu-rms_norm and eager and not width) or usable"]


@pytest.fixture(scope="module")
def all_modules():
    """Runs parity once outside of pytester, which forgets the modules that an inner run imports; torch's must stay."""
    parity.run(parity.implementations_on("cpu", ["rms_norm"]), without_tags=WIDTH)


@pytest.fixture
def run(pytester, monkeypatch, all_modules):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(test_conformance="from glm5_port.testing.conformance import *")
    root = str(Path(conformance.__file__).parents[2])
    monkeypatch.syspath_prepend(root)
    monkeypatch.setenv("PYTHONPATH", root)
    return lambda *options: pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", *(options or ONLY_NORM))


def test_matrix_closes_the_run(run):
    result = run()
    assert result.ret == 0
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == 3 + len(usable_backends())
    assert outcomes["skipped"] == len(BACKENDS) - len(usable_backends())
    result.stdout.fnmatch_lines(
        ["*parity: operator x backend*", "*rms_norm *passed*", "*expert_mlp*NO TEST*", "NOT TESTED HERE: npu (*"]
    )


def test_a_run_without_parity_prints_no_matrix(pytester, run):
    pytester.makepyfile(test_conformance="def test_nothing(): pass")
    result = run("-q")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*operator x backend*")


def test_a_required_backend_that_is_proven(run):
    assert run(*ONLY_NORM, "--require-backend", "cpu").ret == 0


def test_skips_of_a_required_backend_fail(run):
    result = run(*ONLY_NORM, "--require-backend", "npu")
    assert result.ret == 1
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*--require-backend npu: skipped, and skips count as failures here*"])
    result.stdout.fnmatch_lines(["*--require-backend npu: no parity case passed on it*"])


def test_a_required_backend_without_any_case_fails(run):
    result = run("-k", "usable and cpu", "--require-backend", "cpu")
    assert result.ret == 1
    assert result.parseoutcomes()["passed"] == 1
    result.stdout.fnmatch_lines(["*--require-backend cpu: no parity case passed on it*"])


def test_an_unknown_required_backend_is_wrong_use(run):
    result = run("--require-backend", "npuu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--require-backend npuu: no such backend; did you mean npu?*"])


@pytest.fixture
def broken():
    rms_norm.implement("cpu", variant="broken")(lambda x, weight, eps: x * 1.5)
    yield
    del rms_norm.implementations["cpu/broken"]


def test_a_failure_names_every_case(run, broken):
    result = run("-k", "broken and float32 and not width")
    assert result.ret == 1
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(
        ["*cases failed:*", "*rms_norm cpu/broken ?one_token, float32? failed:*over its budget*", "*?odd_width, float32? failed*"]
    )
    result.stdout.fnmatch_lines(["*rms_norm*FAILED*"])


def test_items_are_few_and_complete():
    found = conformance.items()
    assert len({item.id for item in found}) == len(found)
    ours = [item for item in found if item.implementation.operator is rms_norm and item.backend == "cpu"]
    assert {(str(item.dtype), item.width) for item in ours} >= {("torch.float32", False), ("torch.bfloat16", True)}
    of_each = Counter((item.backend, item.implementation.operator.name, item.implementation.id) for item in found)
    assert max(of_each.values()) <= 6  # three dtypes, at small widths and at GLM-5's: cases have no items of their own
    assert sum(item.implementation.backend != "cpu" for item in found) < 300  # the CPU has kernels for each instruction set


def test_matrix_is_whole_under_xdist(pytester, run):
    """The one test here that starts processes of its own."""
    pytest.importorskip("xdist")
    result = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", "-n", "1", *ONLY_NORM, "--require-backend", "cpu")
    assert result.ret == 0, result.stdout.str()
    alone = run()
    line = next(line for line in alone.outlines if line.strip().startswith("rms_norm"))
    assert line in result.outlines
