"""The onnxruntime backend: what its kernels make of our bytes, when it is chosen, and what it refuses. That it computes the
operators is held by parity (tests/parity)."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port import flags
from glm5_port.backends import onnxruntime as backend
from glm5_port.dispatch import Bound
from glm5_port.errors import InputError
from glm5_port.operators.int4 import expert_mlp_int4, int4_matmul
from glm5_port.preparation import Preparation
from glm5_port.quant.export import export
from glm5_port.quant.int4 import Int4Rule, dequantize, quantize_packed
from glm5_port.quant.packing import pack_int4, unpack_int4
from glm5_port.registry import BACKENDS
from glm5_port.requests import resolve_backend
from glm5_port.testing.cases import WIDTH
from glm5_port.testing.parity import run
from tests.quant import exports

MATMUL = {"width_in": 64, "width_out": 48, "group_size": 32}
EXPERTS = {"width": 64, "width_between": 32, "experts": 8, "top_k": 3, "group_size": 32}


def weight(*shape: int, seed: int = 0, group_size: int = 32) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return quantize_packed(drawn, Int4Rule("amax7", group_size))


def bind(operator: Any, dtype: torch.dtype = torch.bfloat16, **facts: Any) -> Any:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return operator.bind(backend="onnxruntime", device_type="cpu", dtype=dtype, **facts)


def matmul(packed: Tensor, scales: Tensor, group_size: int = 32) -> Any:
    facts = {"width_in": packed.shape[1] * 8, "width_out": packed.shape[0], "group_size": group_size}
    bound = bind(int4_matmul, torch.float32, **facts)
    preparation: Preparation = bound.prepare()
    preparation.add(None, {"packed": packed, "scales": scales})
    prepared = preparation.finish()
    return (lambda x: bound(x, group_size=group_size, **prepared)), prepared


# -- the kernels ---------------------------------------------------------------------------------------------------------


def test_the_identity_shows_the_rounded_weight_bit_for_bit() -> None:
    packed, scales = weight(48, 128)
    product, _ = matmul(packed, scales)
    shown = product(torch.eye(128)).T
    assert torch.equal(shown, dequantize(unpack_int4(packed), scales).float())


def test_the_identity_shows_q_times_s_bit_for_bit_without_the_remainders() -> None:
    packed, scales = weight(48, 128)
    bound = bind(int4_matmul, torch.float32, width_in=128, width_out=48, group_size=32)
    preparation = bound.prepare()
    preparation.add(None, {"packed": packed, "scales": scales})
    prepared = preparation.finish()
    assert torch.equal(prepared["codes"], packed.view(torch.uint8)), "our bytes go in as they are"
    prepared["remainders"] = torch.full_like(prepared["remainders"], 0x88)
    shown = bound(torch.eye(128), group_size=32, **prepared).T
    exact = unpack_int4(packed).float().unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)
    assert torch.equal(shown, exact.flatten(-2))
    assert not torch.equal(shown, dequantize(unpack_int4(packed), scales).float())


def test_every_code_by_every_mantissa_and_small_and_large_scales() -> None:
    mantissas = torch.arange(128, dtype=torch.int16)
    scales = torch.cat([((exponent << 7) + mantissas).view(torch.bfloat16) for exponent in (1, 60, 127, 240)])
    scales = torch.cat((scales, -scales)).unsqueeze(1)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(scales.shape[0], 1)
    product, _ = matmul(pack_int4(codes), scales, group_size=16)
    assert torch.equal(product(torch.eye(16)).T, dequantize(codes, scales).float())


def test_infinities_stay_infinities_and_a_scale_that_is_no_number_spoils_its_row_only() -> None:
    packed, scales = weight(6, 64)
    scales[2, 1] = float("nan")
    x = torch.ones(1, 64)
    x[0, 3] = float("inf")
    y = matmul(packed, scales)[0](x)[0]
    assert y[2].isnan()
    right = torch.where(dequantize(unpack_int4(packed), scales)[:, 3] == 0, float("nan"), float("inf"))
    right = right * dequantize(unpack_int4(packed), scales)[:, 3].float().sign()
    assert torch.equal(y[[0, 1, 3, 4, 5]].nan_to_num(nan=7.0), right[[0, 1, 3, 4, 5]].nan_to_num(nan=7.0))


def test_scales_that_overflow_are_refused() -> None:
    with pytest.raises(InputError, match="overflows"):
        matmul(pack_int4(torch.full((1, 32), -7, dtype=torch.int8)), torch.full((1, 1), 3.0e38).bfloat16())


def test_a_session_goes_with_its_weight() -> None:
    from glm5_port.backends.onnxruntime import sessions

    before = len(sessions._sessions)
    product, prepared = matmul(*weight(8, 32))
    product(torch.ones(1, 32))
    product(torch.ones(2, 32))
    assert len(sessions._sessions) == before + 1, "one session for both calls"
    del product, prepared
    gc.collect()
    assert len(sessions._sessions) == before


def test_missing_weights_are_told() -> None:
    with pytest.raises(InputError, match="never arrived"):
        bind(int4_matmul, **MATMUL).prepare().finish()
    preparation = bind(expert_mlp_int4, **EXPERTS).prepare()
    (gate_up, gate_up_scales), (down, down_scales) = weight(64, 64), weight(64, 32)
    expert = {"gate_up_packed": gate_up, "gate_up_scales": gate_up_scales, "down_packed": down, "down_scales": down_scales}
    preparation.add(3, expert)
    with pytest.raises(InputError, match=r"experts missing: \[0, 1, 2, 4, 5, 6, 7\]"):
        preparation.finish()
    with pytest.raises(InputError, match="expected experts 0 to 7"):
        preparation.add(8, expert)


@pytest.mark.parametrize(("operator", "variant"), [(int4_matmul, "matmul_nbits"), (expert_mlp_int4, "qmoe")])
def test_parity_covers_it(operator: Any, variant: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    results = run([operator.implementations[f"onnxruntime/{variant}"]], dtypes=(torch.bfloat16,), without_tags=WIDTH)
    assert [r for r in results if r.status == "failed"] == []
    assert sum(r.status == "passed" for r in results) >= 10


def test_a_model_computes_its_experts_with_it_and_builds_one_session_for_each_layer(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from glm5_port.backends.onnxruntime import sessions

    export(exports.write_source(tmp_path / "source"), tmp_path / "int4", exports.SMALL_SHARDS)
    gc.collect()
    before = len(sessions._sessions)
    model = glm5_port.load(tmp_path / "int4", backend="onnxruntime")
    bound = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Bound)]
    experts = [b.implementation.id for b in bound if b.implementation.operator is expert_mlp_int4]
    assert set(experts) == {"onnxruntime/qmoe"}
    tokens = model.generate([[1, 2, 3, 4, 5]], max_new_tokens=4)[0]
    assert tokens[:5] == [1, 2, 3, 4, 5]
    assert 6 <= len(tokens) <= 9
    assert len(sessions._sessions) == before + 3, "prefill and decode share a session; the MTP layer is not run"


# -- when it is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "facts"), [(int4_matmul, MATMUL), (expert_mlp_int4, EXPERTS)])
def test_auto_never_chooses_it(operator: Any, facts: dict[str, Any]) -> None:
    record = operator.select(device_type="cpu", dtype=torch.bfloat16, **facts)
    assert record.chosen is not None
    assert record.chosen.backend != "onnxruntime"
    mine = next(c for c in record.candidates if c.id.startswith("onnxruntime/"))
    assert "runs only when asked for by name" in mine.reasons
    assert resolve_backend("auto").name != "onnxruntime"


def test_it_is_chosen_by_name_and_by_pin() -> None:
    assert bind(int4_matmul, **MATMUL).implementation.id == "onnxruntime/matmul_nbits"
    assert bind(expert_mlp_int4, **EXPERTS).implementation.id == "onnxruntime/qmoe"
    script = (
        "import torch; from glm5_port.operators.int4 import int4_matmul\n"
        "facts = dict(device_type='cpu', dtype=torch.float32, width_in=64, width_out=48, group_size=32)\n"
        "print(int4_matmul.bind(**facts).implementation.id)"
    )
    for variable, value in (
        ("GLM5_PORT_BACKEND", "onnxruntime"),
        ("GLM5_PORT_OP_INT4_MATMUL", "matmul_nbits"),
        ("GLM5_PORT_OP_INT4_MATMUL", "onnxruntime/matmul_nbits"),
    ):
        environment = {**_clean_environment(), variable: value}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "onnxruntime/matmul_nbits"


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GLM5_PORT_")}


@pytest.mark.parametrize(
    ("operator", "facts", "reason"),
    [
        (int4_matmul, {**MATMUL, "group_size": 8}, "group size 8 (ONNX Runtime takes 16, 32, 64, 128, 256)"),
        (int4_matmul, {**MATMUL, "group_size": -1}, "group size -1"),
        (int4_matmul, {**MATMUL, "dtype": torch.float64}, "float64 activations want more"),
        (int4_matmul, {**MATMUL, "device_type": "cuda"}, "tensors are on cuda, onnxruntime computes on cpu"),
        (int4_matmul, {**MATMUL, "needs_grad": True}, "forward only, and a gradient is asked for"),
        (expert_mlp_int4, {**EXPERTS, "group_size": 8}, "group size 8"),
        (expert_mlp_int4, {**EXPERTS, "dtype": torch.float32}, "QMoE does not round q * s to bfloat16, which results in float32"),
        (expert_mlp_int4, {**EXPERTS, "dtype": torch.float16}, "results in float16 would show"),
        (expert_mlp_int4, {**EXPERTS, "top_k": 9}, "9 choices of 8 experts"),
    ],
)
def test_what_it_cannot_do_it_says_beforehand(operator: Any, facts: dict[str, Any], reason: str) -> None:
    from glm5_port.selection import decide

    complete = operator.complete_facts({"device_type": "cpu", "dtype": torch.bfloat16} | facts)
    record = decide(operator, complete, backend="onnxruntime")
    mine = next(c for c in record.candidates if c.id.startswith("onnxruntime/"))
    assert not mine.chosen
    assert any(reason in given for given in mine.reasons), mine.reasons


# -- the probe -----------------------------------------------------------------------------------------------------------


def test_the_probe_names_what_is_there() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    found = backend.probe()
    assert found.missing is None
    assert {"torch", "onnx", "onnxruntime", "providers"} <= set(found.details)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    if package == "onnxruntime":
        pytest.importorskip("onnx")
    assert backend.probe().missing == f"{package} is not installed: pip install 'glm5_port[onnx]'"


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "onnx.py").write_text('raise ImportError("lib.so: not found")\n')
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert backend.probe().missing == ("onnx is installed and fails to import (ImportError: lib.so: not found): reinstall it")


@pytest.fixture
def ask_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets GLM5_PORT_ONNXRUNTIME_PROVIDER for one test."""

    def ask(value: str) -> None:
        monkeypatch.setenv("GLM5_PORT_ONNXRUNTIME_PROVIDER", value)
        flags.reset()

    yield ask
    monkeypatch.undo()
    flags.reset()


def test_a_build_without_the_provider(ask_for: Callable[[str], None]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for asked in ("CUDAExecutionProvider", "CPUExecutionProvider, CUDAExecutionProvider"):
        ask_for(asked)
        missing = backend.probe().missing
        assert missing is not None
        expected = "GLM5_PORT_ONNXRUNTIME_PROVIDER asks for CUDAExecutionProvider, which this build of onnxruntime does not have"
        assert missing.startswith(f"{expected} (it has ")
        assert "CPUExecutionProvider" in missing.partition("(it has ")[2]
    ask_for("CpuExecutionProvider")
    assert "did you mean CPUExecutionProvider?" in str(backend.probe().missing)


def test_a_provider_that_is_not_there_is_an_error_before_any_session() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    script = (
        "import torch; from glm5_port.operators.int4 import int4_matmul\n"
        "facts = dict(device_type='cpu', dtype=torch.float32, width_in=64, width_out=48, group_size=32)\n"
        "int4_matmul.bind(backend='onnxruntime', **facts)"
    )
    environment = {**_clean_environment(), "GLM5_PORT_ONNXRUNTIME_PROVIDER": "CUDAExecutionProvider"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SelectionError" in done.stderr
    assert "asks for CUDAExecutionProvider, which this build of onnxruntime does not have (it has" in done.stderr


def test_sessions_get_the_providers_that_were_asked_for_and_no_fallback(
    ask_for: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What onnxruntime is told; of its providers only the CPU's can run on this machine."""
    onnxruntime = pytest.importorskip("onnxruntime")
    built: list[tuple[list[str], str]] = []

    class Told(Exception):
        pass

    def session(model: bytes, options: Any, providers: list[str]) -> None:
        entry = "session.disable_cpu_ep_fallback"
        try:
            built.append((providers, options.get_session_config_entry(entry)))
        except RuntimeError:  # never set
            built.append((providers, "0"))
        raise Told

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    product, _ = matmul(*weight(8, 32))
    for asked in ("CPUExecutionProvider", "OpenVINOExecutionProvider", "OpenVINOExecutionProvider,CPUExecutionProvider"):
        ask_for(asked)
        with pytest.raises(Told):
            product(torch.ones(1, 32))
    assert built == [
        (["CPUExecutionProvider"], "0"),
        (["OpenVINOExecutionProvider"], "1"),
        (["OpenVINOExecutionProvider", "CPUExecutionProvider"], "0"),
    ]


def test_the_import_of_the_library_loads_neither_package() -> None:
    script = (
        "import sys, glm5_port; from glm5_port.registry import BACKENDS; "
        "assert 'onnxruntime' in BACKENDS; print('onnx' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert BACKENDS["onnxruntime"].by_name_only
