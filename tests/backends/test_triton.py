"""What can be known of the Triton kernels without a GPU and without the interpreter: reasons, and that every kernel compiles.

What a kernel is compiled with is what its implementation launches it with on the cases at GLM-5 widths.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm5_port.backends import cuda
from glm5_port.backends.cuda import triton_support
from glm5_port.backends.cuda.triton_support import BACKEND, VARIANT, assume, capability, generation, launch, recording
from glm5_port.errors import InputError
from glm5_port.registry import OPERATORS, Implementation
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
    return [i for i in parity.implementations_on(BACKEND) if i.backend == BACKEND and i.variant.startswith(VARIANT)]


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
        if case.tags & WIDTH:
            continue
        arguments = case.arguments(operator, torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0])
        facts = operator.facts_of(arguments)
        if implementation.not_supported(**facts):
            continue
        given = prepared_arguments(implementation, facts, arguments)
        with fake_devices(), torch.no_grad():
            implementation.function(**{name: on_cuda(value) for name, value in given.items()})
        tried += 1
    assert tried


def decode_steps() -> Iterator[tuple[int, int]]:
    """(sequences, pages of the block table) of each class of numbers for which Triton would compile anew: 1, divided by 16, any
    other."""
    return itertools.product((1, 2, 5, 16), (16, 17, 48, 1000))


def test_a_batch_of_another_size_does_not_wait_for_the_compiler() -> None:
    """Triton compiles a kernel anew for a number that is 1 or that 16 divides, unless told not to."""
    top_k, heads, page = 2048, 16, 64
    attention = OPERATORS["sparse_mla_attention"].implementations["cuda/triton_split"].function
    indexer = OPERATORS["lightning_indexer"].implementations["cuda/triton"].function
    with assume((9, 0)), recording() as launches, torch.no_grad():
        for batch, pages in decode_steps():
            cache = [torch.empty(8, page, width, dtype=torch.bfloat16) for width in (512, 64, 128)]
            table = torch.zeros(batch, pages, dtype=torch.int32)
            starts, lengths = torch.arange(batch + 1, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
            query, query_rope = (torch.empty(batch, heads, width, dtype=torch.bfloat16) for width in (512, 64))
            indices = torch.empty(batch, top_k, dtype=torch.int32)
            attention(query, query_rope, cache[:2], indices, table, starts, lengths, scale=1.0, cache_format="plain")
            keys, weights = torch.empty(batch, heads, 128, dtype=torch.bfloat16), torch.empty(batch, heads)
            indexer(keys, weights, cache[2:], table, starts, lengths, top_k=top_k, cache_format="plain")
    compiled = Counter(launch.kernel.__name__ for launch in distinct(launches))
    assert compiled == {
        "attend": 1,
        "combine": 2,  # adds 8 or 16 splits
        "scores_of_tokens": 1,
        "count_digits": 4,  # the digits
        "count_selected": 1,
        "write_selected": 3,  # room for the counts of 1, 2 or 32 tiles
    }


def test_tensors_of_two_devices_and_grids_that_no_card_starts_are_refused() -> None:
    def kernel() -> None: ...

    here, elsewhere = torch.empty(4), torch.empty(4, device="meta")
    with pytest.raises(InputError, match="kernel: tensors on cpu and meta; all must be on one device"):
        launch(kernel, (1,), here, here, elsewhere)
    with pytest.raises(InputError, match=r"a grid of \(1, 65536\) programs; the second and third dimension have at most 65535"):
        launch(kernel, (1, 65_536), here)


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


def test_no_result_can_depend_on_the_number_of_multiprocessors() -> None:
    """Nothing asks for it: the one property of a card that decides on tiles is its compute capability."""
    folder = Path(cuda.__path__[0])
    sources = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    assert "get_device_capability" in sources["triton_support.py"] and len(sources) > 20
    asking = ("multi_processor_count", "multiprocessor_count", "get_device_properties", "num_sms")
    assert [(name, word) for name, text in sources.items() for word in asking if word in text.lower()] == []


def test_registering_does_not_import_triton() -> None:
    code = (
        "import sys; from glm5_port.plugins import load_plugins; load_plugins(); from glm5_port.registry import OPERATORS;"
        "assert OPERATORS['rotate'].implementations['cuda/triton']; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
