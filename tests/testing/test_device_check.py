"""device-check on machines without a GPU: it refuses clearly, and its machinery runs on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glm5_port.cli.app import main
from glm5_port.testing import device_check
from glm5_port.testing.evidence import read_evidence


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
    assert "On a machine with one, within 480 s, in this order:" in printed
    assert "bfloat16 at GLM-5 widths: " in printed and "written anew every 10 s" in printed
    assert not list(tmp_path.iterdir())


def test_the_interpreter_is_no_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device_check.main([]) == 2
    assert "proves nothing" in capsys.readouterr().out


def test_it_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys; import glm5_port.testing.device_check;"
        "print([name for name in ('typer', 'rich', 'pytest', 'safetensors', 'transformers', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_most_valuable_evidence_comes_first() -> None:
    found = device_check.items("cuda")
    assert {operator for operator, *_ in found} >= {"sparse_mla_attention", "lightning_indexer", "rotate", "linear"}
    kinds = list(dict.fromkeys((dtype == "bfloat16", width) for _, _, dtype, width in found))
    assert kinds == [(True, True), (True, False), (False, False), (False, True)]
    assert [operator for operator, *_ in found][:3] == ["sparse_mla_attention", "sparse_mla_attention", "lightning_indexer"]


def test_a_run_that_is_cut_off_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the speed of what passed parity never comes."""
    results = [
        {"operator": "rotate", "implementation": "torch/eager", "case": "one_token", "dtype": "bfloat16", "status": "passed",
         "problems": [], "errors": {}, "backend": "cpu"}
    ]  # fmt: skip

    def parity(*_: object, save: Callable[..., None], **__: object) -> None:
        save(results, ["rms_norm cpu/avx2 bfloat16: not ended yet"])
        raise KeyboardInterrupt

    monkeypatch.setattr(device_check, "run_parity", parity)
    monkeypatch.setattr(device_check, "SAVED_EVERY", 0.0)
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
    code, record = device_check.check("cpu", directory=tmp_path, seconds=60.0, workers=1, operators=["rotate"], context=256)
    printed = capsys.readouterr().out
    if "NOT RUN" in printed or not device_check.items("cpu", ["rotate"]):
        pytest.skip("no native kernels here, so that nothing is the CPU's own")
    assert code == 0, printed
    assert [json.loads(path.read_text()) for path in tmp_path.glob("cpu-*.json")] == [record]
    assert record["parity"]["passed"] > 0 and record["parity"]["failed"] == 0
    assert any(timing["seconds"] > 0 for timing in record["timings"])
    (parity,) = read_evidence(tmp_path)
    assert {row["operator"] for row in parity["rows"]} == {"rotate"}
