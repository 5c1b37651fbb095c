"""The parity cases notice a broken kernel: every mutant fails one of the cases that are named with it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from glm5_port.registry import OPERATORS
from glm5_port.testing import parity
from glm5_port.testing.cases import load_suites
from tests.interpreter.mutants import KERNELS, MUTANTS, KernelMutant

PACKAGE = "glm5_port.backends.cuda.kernels"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_the_text_of_every_mutant_stands_once(mutant: KernelMutant) -> None:
    assert mutant.source() != (KERNELS / f"{mutant.module}.py").read_text()
    assert set(mutant.cases) <= {case.name for case in load_suites()[mutant.operator].cases}


def load(path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernel module at `path`, in place of the one of that name."""
    name = f"{PACKAGE}.{module}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelMutant], None]:
    """Lets a mutant compute its operator."""

    def apply(mutant: KernelMutant) -> None:
        path = tmp_path / f"{mutant.module}.py"
        path.write_text(mutant.source())
        loaded = load(path, mutant.module, monkeypatch)
        if mutant.module != mutant.family:
            loaded = load(KERNELS / f"{mutant.family}.py", mutant.family, monkeypatch)
        wrapper = sys.modules[OPERATORS[mutant.operator].implementations["cuda/triton"].function.__module__]
        real = importlib.import_module("glm5_port.backends.cuda.triton_support").kernels
        for module in {wrapper, importlib.import_module("glm5_port.backends.cuda.matmul")}:
            monkeypatch.setattr(module, "kernels", lambda family: loaded if family == mutant.family else real(family))

    return apply


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_every_mutant_is_caught(mutant: KernelMutant, exchange: Callable[[KernelMutant], None]) -> None:
    exchange(mutant)
    suite = load_suites()[mutant.operator]
    implementation = OPERATORS[mutant.operator].implementations["cuda/triton"]
    results = [
        parity.run_case(suite, implementation, case, getattr(torch, mutant.dtype))
        for case in suite.cases
        if case.name in mutant.cases
    ]
    assert [result.case for result in results if result.status == "failed"], "; ".join(map(str, results))
