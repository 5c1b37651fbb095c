"""`command_line(...)`: one `glm5-port` command line in this process, with clean flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from glm5_port.cli.app import main


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command_line(set_flags: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`command_line("doctor", "--json", GLM5_PORT_BACKEND="cpu")` -> exit code, stdout, stderr."""

    def run(*arguments: str, **flags: str) -> Finished:
        set_flags(**flags)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        code = stopped.value.code
        return Finished(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return run
