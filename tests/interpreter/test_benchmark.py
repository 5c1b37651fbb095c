"""benchmarks.cuda at tiny widths on the CPU: every contest runs to its end, so that a card's minutes are not spent on a slip. Its
times mean nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cuda.__main__ import ALL, main

NOT_HERE = {
    "cuda/flash_mla": "ValueError: flash_mla is not installed",  # and reads fp8 rows alone
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", list(ALL))
def test_every_contest_runs(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--tiny", "--device", "cpu", "--only", suite, "--out", str(out)])
    assert main() == 0
    results = json.loads(out.read_text())["results"]
    assert results and all(result["floor_us"] > 0 for result in results)
    for result in results:
        expected = NOT_HERE.get(result["contender"])
        assert (result["us"] is None) == (expected is not None), result
        assert result["refused"].startswith(expected or ""), result
    assert any(result["contender"].startswith(("cuda/triton", "glm5_port")) for result in results)
