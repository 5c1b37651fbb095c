"""Tables, progress and log lines of commands."""

from __future__ import annotations

import logging

import pytest

from glm5_port.cli import output
from glm5_port.cli.output import log_to_stderr, print_table, progress


def test_a_table_that_is_piped_is_not_wrapped_and_knows_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "a sentence that goes on " * 20 + "[bold]to here"
    print_table(("name", "why"), [("one", sentence)])
    assert sentence in capsys.readouterr().out


def test_progress_without_a_terminal_writes_lines_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter([0.0, 1.0, 2.5, 3.0, 5.0, 5.0])
    with output._lines("loading", 4, clock=lambda: next(ticks)) as advance:
        for step in range(4):
            advance(note=f"part {step}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loading: 2 of 4, about 2 s left part 1",
        "loading: 4 of 4, about 0 s left part 3",
        "loading: 4 of 4, done in 5 s",
    ]


def test_quick_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("quick", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_decisions_go_to_stderr_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("glm5_port")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    log_to_stderr()
    log_to_stderr()
    logger.info("rms_norm: torch/eager")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "rms_norm: torch/eager\n")
