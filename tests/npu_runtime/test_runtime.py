"""The runtime itself: the genuine package starts on it, memory behaves, and no kernel runs that nobody has written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch_npu

from tests.npu_runtime import aten, machine

SHOW = """
import sys
from tests.npu_runtime import machine
machine.start(*sys.argv[1:])
import torch, torch_npu
from torch_npu.npu.utils import get_cann_version
print(torch.npu.get_device_name(0), get_cann_version("CANN"), torch.ones(2, device="npu").cpu().tolist())
"""


def test_the_package_is_the_vendors_own() -> None:
    assert torch_npu.__version__.startswith("2.13.0")
    assert torch.npu.device_count() == 1
    assert hasattr(torch.ops.npu, "npu_lightning_indexer")


@pytest.mark.parametrize(("chip", "cann"), [("A3", "8.5.0"), ("950", "9.1.0")])
def test_chip_and_version_are_what_was_asked_for(chip: str, cann: str) -> None:
    command = [sys.executable, "-c", SHOW, chip, cann]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert shown.strip() == f"{machine.CHIPS[chip]} ({machine.TITLE}) {cann} [1.0, 1.0]"


def test_tensors_keep_their_values_views_and_strides() -> None:
    x = torch.randn(5, 7)
    here = x.npu()
    assert here.device == torch.device("npu", 0)
    assert torch.equal(here.t()[2:, 1::2].cpu(), x.t()[2:, 1::2])
    here[1:, ::3] = 4.0
    x[1:, ::3] = 4.0
    assert torch.equal(here.cpu(), x)
    assert torch.equal((here.bfloat16() @ here.bfloat16().t()).cpu(), x.bfloat16() @ x.bfloat16().t())


def test_memory_that_nobody_wrote_is_poison() -> None:
    assert (aten.on_cpu(torch.empty(1 << 21, dtype=torch.uint8, device="npu")) == 0xA5).any()


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(aten.OtherDevice, match="same device"):
        torch.ones(3, device="npu") + torch.ones(3)


def test_a_kernel_without_a_body_refuses() -> None:
    x = torch.randn(4, 8).npu().t()
    with machine.recorded() as calls, pytest.raises(RuntimeError, match="aclnnFastGelu"):
        torch_npu.fast_gelu(x)
    assert [(call.kernel, call.ran) for call in calls] == [("aclnnFastGelu", False)]
    given = [tensor for tensor in calls[0].tensors if tensor.strides == (1, 8)]  # the result is contiguous
    assert [(tensor.dtype, tensor.shape, tensor.offset, tensor.format) for tensor in given] == [("float32", (8, 4), 0, 2)]


def test_the_old_way_of_launching_is_refused_too() -> None:
    with pytest.raises(RuntimeError):
        torch_npu.npu_silu_(torch.ones(3, 4, device="npu"))


@pytest.mark.parametrize(
    ("dtype", "given_as", "columns"),
    [(torch.int8, None, 32), (torch.bfloat16, None, 16), (torch.int32, None, 16), (torch.int32, torch.int32, 8)],
)
def test_fractal_format_permutes_memory(dtype: torch.dtype, given_as: torch.dtype | None, columns: int) -> None:
    plain = torch.randint(-100, 100, (3, 40, 70)).to(dtype)
    with machine.recorded() as calls:
        fractal = torch_npu.npu_format_cast(plain.npu(), aten.FORMAT_NZ, customize_dtype=given_as)
    assert aten.in_fractal_format(fractal)
    blocks = (-(-70 // columns), 3, 16, columns)
    assert calls[-1].kernel == "aclnnNpuFormatCast"
    assert calls[-1].tensors[0].storage == (3, *blocks)
    memory = aten.on_cpu(fractal).as_strided((3 * blocks[0] * 3 * 16 * columns,), (1,)).view(3, *blocks)
    for matrix, row, column in ((0, 0, 0), (1, 17, 33), (2, 39, 69)):
        assert memory[matrix, column // columns, row // 16, row % 16, column % columns] == plain[matrix, row, column]
    assert torch.equal(fractal.cpu(), plain)
    with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
        fractal + 1
