"""Every chip's descriptor, and what its probe says on machines that are not at hand: described by facts or fake modules."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from glm5_port.backends import BUILT_IN, probing
from glm5_port.backends.probing import NVIDIA, CudaFacts, cuda_facts, identify
from glm5_port.plugins import PLUGIN_ORDER
from glm5_port.registry import BACKENDS, Probe

VENDOR_CHIPS = ("npu", "musa", "mlu", "gcu")

H200 = CudaFacts("2.11.0+cu130", cuda="13.0", devices=8, device_name="NVIDIA H200", architecture="sm_90")
MI300X = CudaFacts(
    "2.11.0+rocm7.0", hip="7.0", devices=1, device_name="AMD Instinct MI300X", architecture="gfx942:sramecc+:xnack-"
)
BW1000 = CudaFacts("2.10.0", hip="6.3", devices=8, device_name="BW1000", architecture="gfx936:sramecc+:xnack-")
Z100 = CudaFacts("2.10.0+das.opt1.dtk2504", hip="6.1", devices=1, device_name="Z100", architecture="gfx906")
C550 = CudaFacts("2.10.0+metax3.5.3.9", cuda="11.6", maca="3.5.3.9", devices=8, device_name="MetaX C550", architecture="sm_80")
P800 = CudaFacts("2.10.0+cu118", cuda="11.8", xmlir=True, devices=8, device_name="P800", architecture="sm_80")
BI150 = CudaFacts("2.10.0", cuda="10.2", devices=16, device_name="Iluvatar BI-V150", architecture="sm_70")
PPU = CudaFacts("2.10.0", cuda="12.6", devices=8, device_name="PPU-ZW810E", architecture="sm_80")
CPU_BUILD = CudaFacts("2.13.0+cpu")


def describe(monkeypatch: pytest.MonkeyPatch, facts: CudaFacts) -> None:
    monkeypatch.setattr(probing, "cuda_facts", lambda: facts)


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_built_in_chips_are_searched_in_the_published_order_with_the_cpu_after_every_accelerator() -> None:
    built_in = [b for b in BACKENDS.values() if b.origin == "built in"]
    in_order = [b.name for b in sorted(built_in, key=lambda b: b.order)]
    assert tuple(in_order) == BUILT_IN
    assert in_order == ["cuda", "npu", "musa", "mlu", "gcu", "hygon", "metax", "kunlunxin", "iluvatar", "cpu", "onnxruntime"]
    assert len({b.order for b in built_in}) == len(built_in)
    assert max(b.order for b in built_in if b.device_type != "cpu") < PLUGIN_ORDER < BACKENDS["cpu"].order


@pytest.mark.parametrize(
    ("name", "device_type", "package", "collective"),
    [
        ("cuda", "cuda", None, "nccl"),
        ("npu", "npu", "torch_npu", "hccl"),
        ("musa", "musa", "torch_musa", "mccl"),
        ("mlu", "mlu", "torch_mlu", "cncl"),
        ("gcu", "gcu", "torch_gcu", "eccl"),
        ("hygon", "cuda", None, "nccl"),
        ("metax", "cuda", None, "nccl"),
        ("kunlunxin", "cuda", "torch_xmlir", "nccl"),
        ("iluvatar", "cuda", None, "nccl"),
        ("cpu", "cpu", None, "gloo"),
        ("onnxruntime", "cpu", None, "gloo"),
    ],
)
def test_descriptor(name: str, device_type: str, package: str | None, collective: str) -> None:
    backend = BACKENDS[name]
    assert (backend.device_type, backend.package, backend.collective) == (device_type, package, collective)
    assert importlib.import_module(f"glm5_port.backends.{name}").__doc__


def test_the_cpu_is_usable_here_and_says_what_it_is() -> None:
    found = BACKENDS["cpu"].probe()
    assert found.missing is None
    assert found.details["torch"] == torch.__version__


# -- who answers as cuda -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "title", "backend"),
    [
        (H200, "NVIDIA", "cuda"),
        (MI300X, "AMD", None),
        (BW1000, "Hygon DCU", "hygon"),
        (Z100, "Hygon DCU", "hygon"),
        (C550, "MetaX", "metax"),
        (P800, "Kunlunxin", "kunlunxin"),
        (BI150, "Iluvatar CoreX", "iluvatar"),
        (CudaFacts("2.10.0+corex.4.3", cuda="10.2", corex=True), "Iluvatar CoreX", "iluvatar"),
        (CudaFacts("2.8.0", cuda="11.6", devices=1, device_name="MetaX C500"), "MetaX", "metax"),
        (PPU, "T-Head PPU", None),
        (CudaFacts("2.11.0", hip="7.0", devices=1, device_name="AMD Instinct MI50", architecture="gfx906"), "AMD", None),
    ],
    ids=lambda value: value.device_name if isinstance(value, CudaFacts) else None,
)
def test_identify_tells_the_pretenders_of_cuda_apart(facts: CudaFacts, title: str, backend: str | None) -> None:
    found = identify(facts)
    assert found is not None
    chip, evidence = found
    assert (chip.title, chip.backend) == (title, backend)
    assert evidence


def test_identify_finds_nothing_in_a_cpu_build() -> None:
    assert identify(CPU_BUILD) is None


@pytest.mark.parametrize(
    ("name", "facts"), [("cuda", H200), ("hygon", BW1000), ("metax", C550), ("kunlunxin", P800), ("iluvatar", BI150)]
)
def test_each_chip_is_usable_on_its_own_machine_and_on_no_other(
    monkeypatch: pytest.MonkeyPatch, name: str, facts: CudaFacts
) -> None:
    describe(monkeypatch, facts)
    usable = [b.name for b in BACKENDS.values() if b.device_type == "cuda" and b.probe().missing is None]
    assert usable == [name]
    details = BACKENDS[name].probe().details
    assert details["device"] == facts.device_name
    assert details["devices"] == str(facts.devices)


def test_a_pretender_says_which_backend_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, C550)
    missing = BACKENDS["cuda"].probe().missing
    assert missing is not None
    assert "answers as cuda here is MetaX (torch.version.maca=3.5.3.9), not NVIDIA" in missing
    assert "GLM5_PORT_BACKEND=metax" in missing


@pytest.mark.parametrize(("facts", "title"), [(MI300X, "AMD"), (PPU, "T-Head PPU")])
def test_a_chip_without_backend_is_named(monkeypatch: pytest.MonkeyPatch, facts: CudaFacts, title: str) -> None:
    describe(monkeypatch, facts)
    for name in ("cuda", "hygon"):
        missing = BACKENDS[name].probe().missing
        assert missing is not None
        assert title in missing
        assert "no backend for it yet" in missing


def test_three_reasons_why_cuda_is_missing_are_three_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sentences = []
    for facts in (
        CPU_BUILD,
        CudaFacts("2.13.0+cu130", cuda="13.0", failure="RuntimeError: Found no NVIDIA driver on your system."),
        CudaFacts("2.13.0+cu130", cuda="13.0", failure="RuntimeError: No CUDA GPUs are available"),
    ):
        describe(monkeypatch, facts)
        sentences.append(BACKENDS["cuda"].probe().missing)
    build, driver, device = sentences
    assert build == (
        "this PyTorch (2.13.0+cpu) is built without CUDA or HIP: "
        "install a CUDA build of PyTorch (pytorch.org), and the NVIDIA driver"
    )
    assert driver == (
        "no usable driver: install or update the NVIDIA driver (torch says: RuntimeError: Found no NVIDIA driver on your system.)"
    )
    assert device == (
        "no NVIDIA device visible: give this process one; CUDA_VISIBLE_DEVICES= may hide it "
        "(torch says: RuntimeError: No CUDA GPUs are available)"
    )


def test_a_build_for_another_chip_without_any_device_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, CudaFacts("2.13.0+cu130", cuda="13.0", failure="RuntimeError: no driver"))
    missing = BACKENDS["hygon"].probe().missing
    assert missing is not None
    assert missing.startswith("this PyTorch is made for NVIDIA (torch.version.cuda=13.0): install Hygon's DTK build")


def test_cuda_facts_reads_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "maca", "3.5", raising=False)
    monkeypatch.setattr(torch, "corex", object(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A name", gcnArchName="gfx936"))
    facts = probing.cuda_facts()
    assert (facts.cuda, facts.maca, facts.corex, facts.devices) == ("13.0", "3.5", True, 2)
    assert (facts.device_name, facts.architecture, facts.failure) == ("A name", "gfx936", "")


def test_cuda_facts_keeps_the_text_of_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Found no NVIDIA driver\n on your system")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert probing.cuda_facts().failure == "RuntimeError: Found no NVIDIA driver on your system"


# -- chips with a package of their own ---------------------------------------------------------------------------------


def install_fake(monkeypatch: pytest.MonkeyPatch, name: str, *, devices: int | None = None) -> None:
    """A vendor package that imports; with `devices`, it also brings `torch.<device type>`."""
    package = ModuleType(f"torch_{name}")
    package.__spec__ = ModuleSpec(package.__name__, loader=None)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/somewhere")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delattr(torch, name, raising=False)
    if devices is not None:
        namespace = SimpleNamespace(device_count=lambda: devices, get_device_name=lambda _: f"{name} chip")
        monkeypatch.setattr(torch, name, namespace, raising=False)


def install_broken(monkeypatch: pytest.MonkeyPatch, tmp_path, name: str, error: str) -> None:
    (tmp_path / f"torch_{name}.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/somewhere")
    monkeypatch.setattr(torch.version, "cuda", None)


def probe(name: str) -> Probe:
    return BACKENDS[name].probe()


def need_absent(name: str) -> None:
    if importlib.util.find_spec(f"torch_{name}") is not None:
        pytest.skip(f"torch_{name} is installed here: this test is about its absence")


@pytest.mark.parametrize("name", VENDOR_CHIPS)
def test_package_not_installed(name: str) -> None:
    need_absent(name)
    missing = probe(name).missing
    assert missing is not None
    assert missing.startswith(f"torch_{name} is not installed: ")


@pytest.mark.parametrize("name", VENDOR_CHIPS)
def test_package_that_fails_to_import_gives_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path, name: str) -> None:
    need_absent(name)
    install_broken(monkeypatch, tmp_path, name, 'ImportError("libvendor.so: cannot open shared object file")')
    missing = probe(name).missing
    assert missing is not None
    assert "is installed and fails to import (ImportError: libvendor.so: cannot open shared object file): check " in missing


@pytest.mark.parametrize("name", VENDOR_CHIPS)
def test_package_without_its_torch_namespace(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install_fake(monkeypatch, name)
    missing = probe(name).missing
    assert missing is not None
    assert f"brings no torch.{name}" in missing


@pytest.mark.parametrize("name", VENDOR_CHIPS)
def test_no_device_visible(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install_fake(monkeypatch, name, devices=0)
    missing = probe(name).missing
    assert missing is not None
    assert missing.startswith(f"no device visible (torch.{name}.device_count() is 0)")


@pytest.mark.parametrize("name", VENDOR_CHIPS)
def test_usable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install_fake(monkeypatch, name, devices=2)
    found = probe(name)
    assert found.missing is None
    assert (found.details["device"], found.details["devices"]) == (f"{name} chip", "2")


def test_a_driver_that_does_not_answer_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("driver 507899")

    install_fake(monkeypatch, "mlu", devices=1)
    monkeypatch.setattr(torch.mlu, "device_count", fail)
    missing = probe("mlu").missing
    assert missing is not None
    assert missing.startswith("torch.mlu does not answer (RuntimeError: driver 507899)")


def test_npu_without_cann_is_told_before_the_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, "npu", devices=1)
    monkeypatch.delenv("ASCEND_HOME_PATH")
    missing = probe("npu").missing
    assert missing is not None
    assert missing.startswith("CANN is not set up (ASCEND_HOME_PATH is not set)")


def test_npu_beside_a_cuda_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, "npu", devices=1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    missing = probe("npu").missing
    assert missing is not None
    assert missing.startswith("torch_npu refuses this CUDA build of PyTorch")


def test_npu_shows_the_settings_that_decide_whether_torch_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, "npu", devices=1)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    details = probe("npu").details
    assert (details["ASCEND_HOME_PATH"], details["TORCH_DEVICE_BACKEND_AUTOLOAD"]) == ("/somewhere", "0")


def test_what_has_neither_nvidias_name_nor_its_driver_is_not_taken_for_one() -> None:
    stranger = CudaFacts("2.12.0", cuda="13.0", devices=1, device_name="Neuling X1", architecture="sm_90")
    chip, evidence = identify(stranger)
    assert chip.backend is None and "Neuling X1" in evidence
    assert identify(dataclasses.replace(stranger, driver="580.65.06"))[0] is NVIDIA
    assert identify(dataclasses.replace(stranger, device_name="Tesla T4"))[0] is NVIDIA
    assert identify(dataclasses.replace(stranger, devices=0, device_name=""))[0] is NVIDIA


def test_the_drivers_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(probing, "NVIDIA_DRIVER", file)
    assert cuda_facts().driver == ""
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)",
    ):
        file.write_text(line)
        assert cuda_facts().driver in ("535.183.01", "580.65.06")
