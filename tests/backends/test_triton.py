"""What can be known of the Triton kernels without a GPU and without the interpreter: reasons, and that every kernel compiles.

What a kernel is compiled with is what its implementation launches it with on the cases at GLM-5 widths.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from glm5_port.backends.cuda import triton_support
from glm5_port.backends.cuda.triton_support import BACKEND, assume, capability, generation
from glm5_port.registry import Implementation
from glm5_port.testing import parity
from glm5_port.testing.calls import prepared_arguments
from glm5_port.testing.cases import WIDTH, load_suites
from tests.backends.triton_compile import SHARED_MEMORY, TARGETS, TENSOR_MEMORY, Compiled, compile_launch, distinct, launches_of
from tests.fake_devices import fake_devices

FAST_TARGET = 90
SPILLED = 256
"""Bytes of stack that a thread may take: 64 of its numbers. The attention over quantised rows takes up to 168, all others none or
a few."""


def implementations() -> list[Implementation]:
    return [i for i in parity.implementations_on(BACKEND) if i.backend == BACKEND]


def check_compiles(implementation: Implementation, target: int, dtypes: tuple[torch.dtype, ...]) -> list[Compiled]:
    cases = [case for case in load_suites()[implementation.operator.name].cases if case.tags & WIDTH]
    launches = [
        launch
        for dtype in dtypes
        for case in cases
        if dtype in case.dtypes
        for launch in launches_of(implementation, case, dtype, target)
    ]
    assert launches, f"no case at GLM-5 widths launches anything in {dtypes}"
    made = [compile_launch(launch, target) for launch in distinct(launches)]
    too_large = [str(c) for c in made if c.stack > SPILLED or c.shared > SHARED_MEMORY[target] or c.tensor > TENSOR_MEMORY]
    assert not too_large, "\n".join(too_large)
    return made


def of(implementation: Implementation) -> str:
    return f"{implementation.operator.name}-{implementation.variant}"


@pytest.mark.parametrize("implementation", implementations(), ids=of)
def test_kernels_compile_for_hopper(implementation: Implementation) -> None:
    check_compiles(implementation, FAST_TARGET, (torch.bfloat16,))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("implementation", implementations(), ids=of)
def test_kernels_compile_for_every_target(implementation: Implementation, target: int) -> None:
    check_compiles(implementation, target, (torch.bfloat16, torch.float32))


def on_cuda(value: Any) -> Any:
    """The same tensors as fakes on a card that is not here."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
    return [on_cuda(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("implementation", implementations(), ids=of)
def test_no_wrapper_waits_for_the_card(implementation: Implementation) -> None:
    """Everything but the kernels runs on fake tensors, where reading one on the host raises: a step can be captured."""
    operator = implementation.operator
    tried = 0
    for case in load_suites()[operator.name].cases:
        arguments = case.arguments(operator, torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0])
        facts = operator.facts_of(arguments)
        if case.tags & WIDTH or implementation.not_supported(**facts):
            continue
        given = prepared_arguments(implementation, facts, arguments)
        with fake_devices(), torch.no_grad():
            implementation.function(**{name: on_cuda(value) for name, value in given.items()})
        tried += 1
    assert tried


def test_reasons_of_versions_and_cards() -> None:
    reasons = triton_support._machine_reasons
    assert reasons((3, 6, 0), (2, 10, 0), (8, 0)) == []
    assert reasons((3, 9), (2, 13), None) == []
    (missing,) = reasons(None, (2, 13), (9, 0))
    assert "not installed" in missing
    (old,) = reasons((3, 5, 1), (2, 13), (9, 0))
    assert "needs triton 3.6 or newer, 3.5.1 is installed" in old
    (card,) = reasons((3, 6), (2, 13), (7, 5))
    assert "compute capability 8.0" in card and "this card has 7.5" in card
    assert len(reasons((3, 5), (2, 9), (7, 0))) == 3


def test_float64_is_refused_before_anything_is_launched() -> None:
    for implementation in implementations():
        suite = load_suites()[implementation.operator.name]
        facts = implementation.operator.facts_of(suite.cases[0].arguments(suite.operator, torch.float32))
        with assume((9, 0)):
            assert any("not float64" in reason for reason in implementation.not_supported(**facts | {"dtype": torch.float64}))
        with assume((7, 5)):
            assert any("this card has 7.5" in reason for reason in implementation.not_supported(**facts))


@pytest.mark.parametrize(
    ("card", "tiles"), [((8, 0), "small"), ((8, 9), "small"), ((9, 0), "large"), ((10, 0), "large"), ((12, 0), "small")]
)
def test_tiles_of_a_card(card: tuple[int, int], tiles: str) -> None:
    with assume(card):
        assert capability() == card
        assert generation() == tiles


def test_registering_does_not_import_triton() -> None:
    code = (
        "import sys; from glm5_port.plugins import load_plugins; load_plugins(); from glm5_port.registry import OPERATORS;"
        "assert OPERATORS['rotate'].implementations['cuda/triton']; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
