"""The example plugin of docs/adding-a-backend.md, installed into a folder of its own and used from fresh processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "glm5_port_toychip"
DOCUMENT = ROOT / "docs" / "adding-a-backend.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed plugin."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(PLUGIN)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return target


def run(installed: Path, *arguments: str, **flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLM5_PORT_", "PYTEST_"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]), "OMP_NUM_THREADS": "1", **flags}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=installed, env=environment, capture_output=True, text=True, timeout=300
    )


def test_doctor_shows_the_chip_its_origin_and_its_kernels(installed: Path) -> None:
    report = json.loads(run(installed, "glm5_port", "doctor", "--json").stdout)
    row = report["backends"]["toychip"]
    assert row["usable"]
    assert row["origin"] == "plugin glm5_port_toychip"
    assert row["operators_of_its_own"] == 2
    assert row["details"]["firmware"] == "1.0"
    assert list(report["backends"])[-3:] == ["toychip", "cpu", "onnxruntime"]


def test_a_plugin_can_be_left_out(installed: Path) -> None:
    report = json.loads(run(installed, "glm5_port", "doctor", "--json", GLM5_PORT_PLUGINS="none").stdout)
    assert "toychip" not in report["backends"]


def test_explain_says_which_kernels_run_and_why_not(installed: Path) -> None:
    chosen = run(installed, "glm5_port", "explain", "rms_norm", GLM5_PORT_BACKEND="toychip")
    assert chosen.returncode == 0
    assert "-> toychip/lanes" in chosen.stdout
    refused = run(installed, "glm5_port", "explain", "rms_norm", "--as", "toychip", "--fact", "width=77")
    assert "-> torch/eager" in refused.stdout
    assert "width 77 is not a multiple of the 8 lanes" in refused.stdout
    gradient = run(installed, "glm5_port", "explain", "linear", "--needs-grad", "--as", "toychip")
    assert "forward only, and a gradient is asked for" in gradient.stdout


def test_the_plugins_own_tests_pass(installed: Path) -> None:
    done = run(installed, "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(PLUGIN / "tests"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b5 passed", done.stdout)


def test_the_shipped_conformance_holds_the_plugin_to_the_gold(installed: Path) -> None:
    arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "-k", "toychip and not width and (lanes or transposed)"]
    done = run(installed, "pytest", *arguments, "--pyargs", "glm5_port.testing.conformance")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


def test_a_plugin_that_fails_to_import_is_a_row_and_not_a_crash(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_chip.py").write_text("raise OSError('libbroken.so: cannot open shared object file')\n")
    record = tmp_path / "broken_chip-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_chip\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[glm5_port.backends]\nbroken = broken_chip:register\n")
    done = run(tmp_path, "glm5_port", "doctor", "--json")
    assert done.returncode == 0
    row = json.loads(done.stdout)["backends"]["broken"]
    assert not row["usable"]
    assert "OSError: libbroken.so: cannot open shared object file" in row["missing"]


def test_the_document_quotes_the_plugin_as_it_is() -> None:
    sources = "\n".join(path.read_text() for path in sorted(PLUGIN.rglob("*")) if path.suffix in (".py", ".toml"))
    quoted = re.findall(r"```(?:python|toml)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(quoted) >= 4
    for block in quoted:
        assert block in sources, f"docs/adding-a-backend.md quotes what the plugin does not say:\n{block}"
