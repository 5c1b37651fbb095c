"""The native extension: built, chosen by machine and flag, one OpenMP runtime, and absent without harm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import glm5_port.backends.cpu.extension as extension
from glm5_port import flags
from glm5_port.backends.cpu import probe
from glm5_port.operators.int4 import int4_quantize
from glm5_port.quant.int4 import Int4Rule, quantize_packed

FACTS = {"device_type": "cpu", "dtype": torch.bfloat16, "width": 64, "group_size": 32, "rule": "amax7"}
HERE = [isa for isa in extension.ISAS if not extension.isa_missing(isa)]
built = pytest.mark.skipif(not HERE, reason=f"NOT TESTED: {extension.isa_missing('scalar')}")


@pytest.fixture
def isa_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def limit(isa: str) -> None:
        monkeypatch.setenv(flags.CPU_ISA.name, isa)
        flags.reset()

    yield limit
    monkeypatch.undo()
    flags.reset()


def chosen() -> str:
    return int4_quantize.select(**FACTS).chosen.id


@built
def test_scalar_comes_first_and_every_name_is_the_extensions() -> None:
    module = extension.kernels()
    assert tuple(module.isa_name(number) for number in range(module.isa_count)) == extension.ISAS
    assert HERE[0] == "scalar"


@built
def test_the_widest_instruction_set_is_chosen(isa_limit: Callable[[str], None]) -> None:
    widest = [isa for isa in extension.VECTOR if isa in HERE][-1]
    assert chosen() == (f"cpu/{widest}" if widest != "scalar" else "torch/eager")


@built
@pytest.mark.parametrize("isa", [isa for isa in extension.VECTOR if isa in HERE])
def test_the_flag_limits_it(isa_limit: Callable[[str], None], isa: str) -> None:
    isa_limit(isa)
    assert chosen() == f"cpu/{isa}"
    assert extension.widest_isa() == isa


@built
def test_a_refused_instruction_set_says_why(isa_limit: Callable[[str], None]) -> None:
    isa_limit("scalar")
    text = str(int4_quantize.select(**FACTS))
    assert "GLM5_PORT_CPU_ISA=scalar allows nothing wider" in text


def test_without_the_extension_portable_implementations_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_load", lambda: "the native kernels are not built: install a C++ compiler")
    extension.isa_missing.cache_clear()
    try:
        assert chosen() == "torch/eager"
        assert "install a C++ compiler" in str(int4_quantize.select(**FACTS))
        assert "install a C++ compiler" in probe().details["native kernels"]
    finally:
        extension.isa_missing.cache_clear()


def test_a_missing_extension_says_what_to_do_and_what_it_costs() -> None:
    code = """
import sys
sys.modules["glm5_port.backends.cpu._native"] = None
from glm5_port.backends.cpu.extension import isa_missing
print(isa_missing("avx2"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "many times slower" in done.stdout
    assert "install a C++ compiler" in done.stdout


@built
def test_one_openmp_runtime() -> None:
    """Two pools of threads in one process would share the cores badly."""
    code = """
import torch
from glm5_port.operators.int4 import int4_quantize
torch.set_num_threads(2)
int4_quantize(torch.randn(512, 64), group_size=32, rule="amax7")
torch.randn(512, 512) @ torch.randn(512, 512)
names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1] and ".so" in line}
print(len(names), len({name for name in open("/proc/self/maps") if "_native" in name}) > 0)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLM5_PORT_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout.split() == ["1", "True"]


@built
@pytest.mark.parametrize("isa", [isa for isa in extension.VECTOR if isa in HERE])
@pytest.mark.parametrize("group_size", [8, 16, 32, 128, -1])
def test_the_quantisers_bits_are_those_of_the_definition(isa_limit: Callable[[str], None], isa: str, group_size: int) -> None:
    """Every bfloat16 number once, in groups that hold all sorts, and float32 numbers between them."""
    isa_limit(isa)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shuffled = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(-1, 256)
    spread = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-38, 30, 64).unsqueeze(1)
    for weight in (bits.view(-1, 256), shuffled, spread, spread[:, :128], spread.t().contiguous().t()):
        bound = int4_quantize.bind(**FACTS | {"dtype": weight.dtype, "width": weight.shape[1], "group_size": group_size})
        assert bound.implementation.id == f"cpu/{isa}"
        packed, scales = bound(weight, group_size=group_size, rule="amax7")
        expected, expected_scales = quantize_packed(weight, Int4Rule("amax7", group_size), check=False)
        assert torch.equal(packed, expected)
        assert torch.equal(scales.view(torch.int16), expected_scales.view(torch.int16))
