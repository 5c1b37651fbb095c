"""What is declared in pyproject.toml, constraints.txt and the Makefile holds together and is true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import glm5_port

tomllib = pytest.importorskip("tomllib", reason="development needs Python 3.11")

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
VENDOR_PACKAGES = ("torch_npu", "torch_musa", "torch_mlu", "torch_gcu", "torch_xmlir", "triton")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalised(name): version for name, version in pins}


def fresh(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_both_places_say_the_same_version() -> None:
    assert PROJECT["version"] == glm5_port.__version__


def test_everything_that_development_installs_is_pinned() -> None:
    pinned = constraints()
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert normalised(requirement.name) in pinned, f"{requirement.name} is missing in constraints.txt"
        assert requirement.specifier.contains(pinned[normalised(requirement.name)])
    assert pinned["torch"] == "2.13.0"
    assert not [name for name in pinned if name.startswith("nvidia") or name == "torch-npu"]


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    extras = PROJECT["optional-dependencies"]
    for requirement in (*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)):
        name = Requirement(requirement).name
        assert re.search(rf"(^|\W){re.escape(name)}(\W|$)", text), f"docs/dependencies.md does not say why {name}"


def test_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"cuda", "npu", "onnx", "transformers", "plots", "dev"}
    names = {extra: {Requirement(text).name for text in texts} for extra, texts in extras.items()}
    assert "torch_npu" not in set().union(*(each for extra, each in names.items() if extra != "npu"))
    assert [extra for extra, each in names.items() if "triton" in each] == ["dev"]


def test_import_brings_no_vendor_package_and_nothing_heavy() -> None:
    unwanted = (*VENDOR_PACKAGES, "transformers", "tokenizers", "safetensors", "typer", "rich", "pytest")
    loaded = "import torch, sys; before = set(sys.modules); import glm5_port; new = set(sys.modules) - before"
    code = f"{loaded}; print([name for name in {unwanted} if name in new])"
    assert fresh(code) == "[]"


def test_import_needs_torch_and_numpy_only() -> None:
    """In an interpreter where every other third-party package refuses to be imported."""
    allowed = sorted(sys.stdlib_module_names | {"torch", "numpy", "glm5_port"})
    code = f"""
import torch, sys, importlib.abc
loaded = {{name.partition(".")[0] for name in sys.modules}}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in loaded and top not in {allowed!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import glm5_port
print(glm5_port.__version__)
"""
    assert fresh(code) == glm5_port.__version__


def test_the_wheel_holds_the_package_and_its_entry_points(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = ["pyproject.toml", "LICENSE", *(["README.md"] if (ROOT / "README.md").exists() else [])]
    source.mkdir()
    for name in files:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "glm5_port", source / "glm5_port", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    # Without a C++ compiler: the wheel then holds everything but the native kernels, and installs.
    environment = os.environ | {"CXX": "/nonexistent", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment)
    (wheel,) = tmp_path.glob("glm5_port-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    packaged = {name for name in names if name.startswith("glm5_port/")}
    files = (path.relative_to(source).as_posix() for path in (source / "glm5_port").rglob("*") if path.is_file())
    assert packaged == {name for name in files if not name.startswith("glm5_port/backends/cpu/native/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "glm5-port = glm5_port.cli.app:main" in entry_points
    assert "glm5_port = glm5_port.testing.pytest_plugin" in entry_points


@needs_make
def test_make_knows_every_promised_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("env", "test", "test-all", "demo", "docs", "bench", "clean"):
        assert re.search(rf"^  make {target} ", done.stdout, re.MULTILINE), target


def test_ci_calls_both_test_targets() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test test-all\b", script.read_text(), re.MULTILINE)


@needs_make
def test_make_env_refuses_an_old_python_with_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 0)\n$2" \n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "env", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "is Python 3.9; development needs 3.11 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()
