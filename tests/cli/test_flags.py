"""`glm5-port flags`, and docs/flags.md, which it writes."""

from __future__ import annotations

import json
from pathlib import Path

from glm5_port.flags import FLAGS, OPERATOR

DOCUMENT = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_committed_document_is_what_the_command_writes(command_line) -> None:
    assert DOCUMENT.read_text() == command_line("flags", "--markdown").out, "run `make docs`"


def test_every_flag_is_documented(command_line) -> None:
    text = command_line("flags", "--markdown").out
    for flag in (*FLAGS, OPERATOR):
        assert f"## `{flag.name}`" in text
        assert flag.help in text


def test_the_document_does_not_depend_on_the_environment(command_line) -> None:
    assert command_line("flags", "--markdown").out == command_line("flags", "--markdown", GLM5_PORT_LOG="quiet").out


def test_what_is_set_now(command_line) -> None:
    report = json.loads(command_line("flags", "--json", GLM5_PORT_LOG="quiet", GLM5_PORT_OP_RMS_NORM="reference").out)
    assert report["in_force"] == {"GLM5_PORT_LOG": "quiet", "GLM5_PORT_OP_RMS_NORM": "reference"}
    assert [flag["name"] for flag in report["flags"]] == [*(flag.name for flag in FLAGS), OPERATOR.name]


def test_the_table_shows_pins(command_line) -> None:
    assert "GLM5_PORT_OP_RMS_NORM" in command_line("flags", GLM5_PORT_OP_RMS_NORM="reference").out
