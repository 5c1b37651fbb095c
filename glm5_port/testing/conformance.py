"""The parity suite as pytest items, for this project and for plugin authors alike:

    pytest --pyargs glm5_port.testing.conformance [--require-backend NAME]

One item per operator, implementation, chip and dtype runs all cases and names every one that fails; cases at GLM-5 widths
are items of their own (marker `glm5_width`). Needs the pytest plugin of this package, which an installation brings along.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from glm5_port import plugins
from glm5_port.registry import BACKENDS, OPERATORS, Implementation
from glm5_port.requests import probe
from glm5_port.testing import parity
from glm5_port.testing.cases import WIDTH, load_suites


@dataclass(frozen=True)
class Item:
    """One pytest item. `dtype` is None where the chip is missing, so that one skip stands for all of them."""

    implementation: Implementation
    backend: str
    dtype: torch.dtype | None
    width: bool

    @property
    def id(self) -> str:
        dtype = f"-{str(self.dtype).removeprefix('torch.')}" if self.dtype is not None else ""
        return (
            f"{self.backend}-{self.implementation.operator.name}-{self.implementation.id}{dtype}{'-width' if self.width else ''}"
        )


def items() -> list[Item]:
    """Every implementation on every usable chip, and one item for each whose chip is not here."""
    plugins.load_plugins()
    suites = load_suites()
    found: list[Item] = []
    for backend in BACKENDS:
        usable = probe(backend).missing is None
        for implementation in parity.implementations_on(backend):
            if implementation.operator.name not in suites:
                continue
            if implementation.portable and BACKENDS[backend].by_name_only:
                continue  # no chip of its own: proven on the one whose device it shares
            if not usable:
                found += [] if implementation.portable else [Item(implementation, backend, None, False)]
                continue
            cases = suites[implementation.operator.name].cases
            kinds = {(dtype, bool(case.tags & WIDTH)): None for case in cases for dtype in case.dtypes}
            found += [Item(implementation, backend, dtype, width) for dtype, width in kinds]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises the two tests below."""
    if "parity_item" in metafunc.fixturenames:
        params = [pytest.param(i, id=i.id, marks=[pytest.mark.glm5_width] if i.width else []) for i in items()]
        metafunc.parametrize("parity_item", params)
    if "parity_backend" in metafunc.fixturenames:
        plugins.load_plugins()
        metafunc.parametrize("parity_backend", list(BACKENDS))


def test_every_operator_has_cases_and_a_portable_implementation() -> None:
    """A new operator is held against its gold from its first day, on every chip."""
    assert not set(OPERATORS) - set(load_suites()), "operators without parity cases"
    portable = {i.operator.name for i in parity.implementations_on("cpu") if i.portable}
    assert not set(OPERATORS) - portable, "operators without a portable implementation"


def test_backend_is_usable(parity_backend: str, request: pytest.FixtureRequest) -> None:
    """Says in the report of every run which chips were not there."""
    request.node.user_properties.append(("glm5_port_backend", parity_backend))
    if (missing := probe(parity_backend).missing) is not None:
        pytest.skip(f"{parity_backend}: {missing}")


def test_parity(parity_item: Item, request: pytest.FixtureRequest) -> None:
    """One implementation in one dtype against the float64 gold of all its operator's cases."""
    properties = request.node.user_properties
    properties.append(("glm5_port_backend", parity_item.backend))
    results = parity.run(
        [parity_item.implementation],
        backend=parity_item.backend,
        dtypes=None if parity_item.dtype is None else [parity_item.dtype],
        without_tags=frozenset() if parity_item.width else WIDTH,
        only_tags=WIDTH if parity_item.width else frozenset(),
    )
    properties.append(("glm5_port_parity", [result.as_dict() for result in results]))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        pytest.fail(f"{len(failed)} of {len(results)} cases failed:\n" + "\n".join(f"  {r}" for r in failed), pytrace=False)
    if not any(result.status == "passed" for result in results):
        reasons = sorted({problem for result in results for problem in result.problems})
        pytest.skip("; ".join(reasons) or "no case")
