"""What a judge says when it cannot run, disagrees or agrees. The judges themselves run in environments of their own: `make
test-llama-cpp` and `make test-kt-kernel`, not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.outside import judging
from tests.outside.judging import AGREES, DISAGREES, NOT_RUN, NotRun, Verdict, main, play


def test_a_judge_that_cannot_run_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judge(verdict: Verdict, directory: Path) -> None:
        raise NotRun("no such processor")

    assert main("kt-kernel", judge) == NOT_RUN != 0
    assert capsys.readouterr().err == "NOT RUN: kt-kernel: no such processor\n"


def test_one_difference_is_enough_to_disagree(capsys: pytest.CaptureFixture[str]) -> None:
    def judge(verdict: Verdict, directory: Path) -> None:
        verdict.check(True, "tokens")
        verdict.check(differs, "logits")

    differs = False
    assert main("llama.cpp", judge) == DISAGREES != 0
    assert "DIFFERS  logits" in capsys.readouterr().out
    differs = True
    assert main("llama.cpp", judge) == AGREES == 0


def test_an_environment_that_is_not_there_is_no_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "ROOT", tmp_path)
    with pytest.raises(NotRun, match="there is no .venv-llama-cpp: make test-llama-cpp"):
        play(".venv-llama-cpp", "llama_cpp_player.py")
