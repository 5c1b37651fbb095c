"""device-check on machines without a GPU: it refuses clearly, and its machinery runs on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm5_port.testing import device_check
from glm5_port.testing.evidence import read_evidence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert device_check.main(["--evidence", str(tmp_path)]) == 2
    assert "no device to check. cuda: this PyTorch" in capsys.readouterr().out
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


def test_small_cases_come_first_and_in_bfloat16() -> None:
    found = device_check.items("cuda")
    assert {operator for operator, *_ in found} >= {"sparse_mla_attention", "lightning_indexer", "rotate"}
    assert [width for *_, width in found] == sorted(width for *_, width in found)
    assert found[0][2] == "bfloat16"


@pytest.mark.slow
def test_rehearsal_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The CPU's own rotate: parity in another process, speed, both records."""
    code = device_check.check("cpu", directory=tmp_path, seconds=60.0, workers=1, operators=["rotate"], context=256)
    printed = capsys.readouterr().out
    if "NOT RUN" in printed or not device_check.items("cpu", ["rotate"]):
        pytest.skip("no native kernels here, so that nothing is the CPU's own")
    assert code == 0, printed
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("cpu-*.json")]
    assert record["parity"]["passed"] > 0 and record["parity"]["failed"] == 0
    assert any(timing["seconds"] > 0 for timing in record["timings"])
    (parity,) = read_evidence(tmp_path)
    assert {row["operator"] for row in parity["rows"]} == {"rotate"}
