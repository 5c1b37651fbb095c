"""The command line as a whole: exit codes, where text goes, both ways to start it, and what starting it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import glm5_port
from glm5_port.cli import app as app_module
from glm5_port.cli.app import app, main

ROOT = Path(__file__).parents[2]


def run_module(*arguments: str, **flags: str) -> subprocess.CompletedProcess[str]:
    """A real process, without the flags of this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLM5_PORT_")} | flags
    return subprocess.run(
        [sys.executable, "-m", "glm5_port", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_misspelt_flag_stops_every_command_with_the_suggestion() -> None:
    done = run_module("doctor", GLM5_PORT_BACKND="cpu")
    assert done.returncode == 2
    assert "unknown flag GLM5_PORT_BACKND; did you mean GLM5_PORT_BACKEND?" in done.stderr
    assert done.stdout == ""


def test_json_is_alone_on_stdout() -> None:
    done = run_module("doctor", "--json", GLM5_PORT_LOG="trace")
    assert done.returncode == 0
    assert json.loads(done.stdout)["versions"]["glm5_port"] == glm5_port.__version__


@pytest.mark.parametrize("command", ["flags", "explain", "doctor"])
def test_a_misspelt_flag_stops(command_line, command: str) -> None:
    done = command_line(command, GLM5_PORT_STRICTT="1")
    assert (done.code, done.out) == (2, "")
    assert "did you mean GLM5_PORT_STRICT?" in done.err


def test_an_unknown_value_stops(command_line) -> None:
    done = command_line("doctor", GLM5_PORT_STRICT="yes")
    assert done.code == 2
    assert "GLM5_PORT_STRICT=yes: no such value" in done.err


def test_an_unknown_backend_in_the_environment_stops(command_line) -> None:
    done = command_line("flags", GLM5_PORT_BACKEND="cudda")
    assert done.code == 2
    assert "GLM5_PORT_BACKEND=cudda: no such backend; did you mean cuda?" in done.err


def test_wrong_use_of_the_command_line_is_2(command_line) -> None:
    assert command_line("no-such-command").code == 2
    assert command_line("doctor", "--no-such-option").code == 2


def test_help_and_version_are_0(command_line) -> None:
    page = command_line("--help")
    assert page.code == 0
    places = [page.out.index(f"\n  {name} ") for name in app_module.ORDER]
    assert places == sorted(places)
    assert command_line("--version").out == f"glm5_port {glm5_port.__version__}\n"


def test_help_is_shown_even_with_a_wrong_flag(command_line) -> None:
    assert command_line("--help", GLM5_PORT_BACKND="cpu").code == 0


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, set_flags) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(app_module.flags, "current", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["doctor"])


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch, command_line) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module.flags, "current", interrupt)
    assert command_line("doctor").code == 130


def test_every_command_has_help_and_json() -> None:
    runner = CliRunner()
    for name in ("doctor", "explain", "flags"):
        page = runner.invoke(app, [name, "--help"])
        assert page.exit_code == 0
        assert "--json" in page.stdout


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, glm5_port.cli.app; print([m for m in ('transformers', 'safetensors', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
