"""device-check on machines without a GPU: it refuses clearly, and its machinery runs on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from glm5_port.cli.app import main
from glm5_port.testing import device_check, device_record
from glm5_port.testing.evidence import read_evidence
from tests.testing import work

SHORT = 8.0
"""Seconds of a check of which nothing comes."""


def test_it_is_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check(backend: str, **options: object) -> tuple[int, dict[str, object]]:
        print(f"checking {backend}")
        return 1, {"parity": {"failed": 1}, "directory": str(options["directory"])}

    monkeypatch.setattr(device_check, "check", check)
    with pytest.raises(SystemExit, match="1"):
        main(["device-check", "--backend", "npu", "--evidence", str(tmp_path), "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out) == {"parity": {"failed": 1}, "directory": str(tmp_path)}
    assert said.err == "checking npu\n"
    with pytest.raises(SystemExit, match="2"):
        main(["device-check", "--backend", "nup"])
    assert "--backend=nup: no such backend; did you mean npu?" in capsys.readouterr().err
    assert device_check.main(["--backend", "nup"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert device_check.main(["--evidence", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert "no device to check. cuda: this PyTorch" in printed
    assert "On a machine with one, within 460 s, in this order:" in printed
    assert "bfloat16 at GLM-5 widths: " in printed and "written anew every 10 s" in printed
    assert not list(tmp_path.iterdir())


def test_the_interpreter_is_no_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device_check.main([]) == 2
    assert "proves nothing" in capsys.readouterr().out


def installed_for_torch(wanted: tuple[str, ...] = ("torch", "triton", "numpy")) -> set[str]:
    """What a python with these distributions has: them, and what they ask for."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):  # what is for other systems
            asked = metadata.requires(name) or []
            found.add(name)
            waiting += [re.split(r"[^\w.-]", line)[0] for line in asked if "extra ==" not in line]
    return found


@pytest.fixture
def bare_machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(a source tree without what was built in it, so without the native extension; environment) of a python that has torch,
    triton and numpy, and nothing else."""
    tree, packages = tmp_path / "tree", tmp_path / "packages"
    packages.mkdir()
    for name in installed_for_torch():
        for file in metadata.files(name) or []:
            top = file.parts[0]
            source = Path(str(file.locate())).parents[len(file.parts) - 1] / top
            if top != ".." and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    source_tree = Path(device_check.__file__).parents[1]
    shutil.copytree(source_tree, tree / source_tree.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree, {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}


REHEARSAL = """
import sys
from glm5_port.testing import device_check

if __name__ == "__main__":
    device_check.items = lambda *_: [("rotate", "torch/eager", "bfloat16", False)]  # the CPU's own are native
    code, record = device_check.check("cpu", directory=None, seconds=100.0, processes=1, context=256)
    print(code, record["parity"]["passed"] > 0, len(record["timings"]))
    for module in ("typer", "rich", "pytest", "safetensors", "transformers", "yaml", "pydantic"):
        try:
            __import__(module)
        except ImportError:
            continue
        print(module, "could be imported")
"""


@pytest.mark.slow
def test_it_runs_from_a_source_tree_with_torch_triton_and_numpy_only(bare_machine: tuple[Path, dict[str, str]]) -> None:
    """-S: without the packages of this environment. Workers get the same."""
    tree, environment = bare_machine
    assert not list(tree.rglob("*.so"))
    command = [sys.executable, "-S", "-m", "glm5_port.testing.device_check"]
    refused = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert (refused.returncode, refused.stderr) == (2, "")
    assert "no device to check" in refused.stdout
    (tree / "rehearsal.py").write_text(REHEARSAL)
    done = subprocess.run(
        [sys.executable, "-S", "rehearsal.py"], cwd=tree, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines()[-1] == "0 True 2", done.stdout + done.stderr


def test_the_time_is_kept_while_everything_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parity and speed: a kernel that never ends, or is never compiled."""
    items = [("rotate", f"cuda/number_{number}", "bfloat16", True) for number in range(3)]
    monkeypatch.setattr(device_check, "items", lambda *_: items)
    monkeypatch.setattr(device_check, "run_item", work.hang)
    monkeypatch.setattr(device_check, "time_item", work.hang)
    begin = time.monotonic()
    code, record = device_check.check("cpu", directory=tmp_path, seconds=SHORT, processes=2, context=256)
    assert time.monotonic() - begin < SHORT + device_check.GRACE
    assert code == 1 and record["complete"] is True
    said = [f"{device_check._name(item)}: out of time, after 0 cases" for item in items]
    assert record["not_run"] == [*said, "rotate decode, context 256: out of time", "rotate prefill 64, context 256: out of time"]


def test_a_driver_that_never_answers_is_left() -> None:
    """It holds the interpreter, so that nothing in Python could end it."""
    code = (
        "import ctypes\nfrom glm5_port.testing import device_check as check\n"
        "check.GRACE, check.probe = 1.0, lambda backend: ctypes.PyDLL(None).sleep(600)\n"
        "check.check('cpu', directory=None, seconds=1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr and "device_check.py" in done.stderr


def test_what_failed_or_was_lost_in_one_process_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [("rotate", name, "bfloat16", False) for name in ("cuda/lost", "cuda/fine")]
    monkeypatch.setattr(device_check, "run_item", work.lost_or_fine)
    results, unfinished = device_check.run_parity("cpu", items, processes=1, until=time.monotonic() + 90, save=lambda *_: None)
    assert [(result["implementation"], result["status"]) for result in results] == [
        ("cuda/lost", "failed"), ("cuda/fine", "passed"),
    ]  # fmt: skip
    assert unfinished == ["rotate cuda/lost bfloat16: RuntimeError: CUDA error: unspecified launch failure, after 1 cases"]


def test_a_backend_without_own_implementations_has_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    """It would pass without having looked."""
    assert device_check.check("cpu", directory=None, operators=["dispatch_tokens"]) == (2, {})
    assert "nothing to check: cpu has no implementation of its own here" in capsys.readouterr().out


def test_the_most_valuable_evidence_comes_first() -> None:
    found = device_check.items("cuda")
    assert {operator for operator, *_ in found} >= {"sparse_mla_attention", "lightning_indexer", "rotate", "linear"}
    kinds = list(dict.fromkeys((dtype == "bfloat16", width) for _, _, dtype, width in found))
    assert kinds == [(True, True), (True, False), (False, False), (False, True)]
    assert [operator for operator, *_ in found][2:4] == ["sparse_mla_attention", "lightning_indexer"]


def test_a_run_that_is_cut_off_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the speed of what passed parity never comes."""
    monkeypatch.setattr(device_check, "items", lambda *_: [("rotate", "torch/eager", "bfloat16", False)])
    results = [
        {"operator": "rotate", "implementation": "torch/eager", "case": "one_token", "dtype": "bfloat16", "status": "passed",
         "problems": [], "errors": {}, "backend": "cpu"}
    ]  # fmt: skip

    def parity(*_: object, save: Callable[..., None], **__: object) -> None:
        save(results, ["rms_norm cpu/avx2 bfloat16: not ended yet"])
        raise KeyboardInterrupt

    monkeypatch.setattr(device_check, "run_parity", parity)
    monkeypatch.setattr(device_record, "SAVED_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        device_check.check("cpu", directory=tmp_path)
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("cpu-*.json")]
    assert record["complete"] is False and record["parity"]["passed"] == 1
    assert record["not_run"] == ["rms_norm cpu/avx2 bfloat16: not ended yet"]
    (written,) = read_evidence(tmp_path)
    assert [row["operator"] for row in written["rows"]] == ["rotate"]


@pytest.mark.slow
def test_rehearsal_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The CPU's own rotate: parity in another process, speed, both records."""
    code, record = device_check.check("cpu", directory=tmp_path, seconds=60.0, processes=1, operators=["rotate"], context=256)
    printed = capsys.readouterr().out
    if not device_check.items("cpu", ["rotate"]):
        pytest.skip("no native kernels here, so that nothing is the CPU's own")
    assert code == 0, printed
    assert [json.loads(path.read_text()) for path in tmp_path.glob("cpu-*.json")] == [record]
    assert record["parity"]["passed"] > 0 and record["parity"]["failed"] == 0
    assert any(timing["seconds"] > 0 for timing in record["timings"])
    (parity,) = read_evidence(tmp_path)
    assert {row["operator"] for row in parity["rows"]} == {"rotate"}
