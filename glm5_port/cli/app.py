"""The entry point: finds the commands, reads the flags before any of them, turns errors into texts and exit codes.

Exit codes: 0 good; 1 a check failed; 2 wrong use (a `Glm5PortError` or a command line that cannot be read); 130 interrupted.
Anything else is a defect of this library and shows its traceback.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

import glm5_port
from glm5_port import cli, flags
from glm5_port.errors import Glm5PortError

ORDER = (
    "doctor",
    "explain",
    "info",
    "generate",
    "plan",
    "probe",
    "export",
    "transcode",
    "verify",
    "inspect",
    "parity",
    "bench",
    "device-check",
    "demo",
    "flags",
)
"""The order of the help page: what a newcomer needs first. Commands not named here follow by name."""


class _InOrder(typer.core.TyperGroup):
    """Lists the commands in `ORDER`, whether they are functions or have subcommands of their own."""

    def list_commands(self, ctx: Any) -> list[str]:
        places = {name: place for place, name in enumerate(ORDER)}
        return sorted(super().list_commands(ctx), key=lambda name: (places.get(name, len(places)), name))


app = typer.Typer(
    name="glm5-port",
    cls=_InOrder,
    help="GLM-5 on any chip: see which implementation runs and why, run it, and prove that it is right.",
    epilog="Environment flags: glm5-port flags. Exit codes: 0 good, 1 a check failed, 2 wrong use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"glm5_port {glm5_port.__version__}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    from glm5_port.requests import request_for

    flags.current()  # an unknown flag or value stops every command, also one that would not look at it
    request_for(None, None)


def _mount_commands() -> None:
    """Every module of `glm5_port.cli` with a function or a Typer app under its own name is a command."""
    names = [module.name for module in pkgutil.iter_modules(cli.__path__) if module.name not in ("app", "output")]
    for name in names:
        module: Any = importlib.import_module(f"glm5_port.cli.{name}")
        if isinstance(getattr(module, "app", None), typer.Typer):
            app.add_typer(module.app, name=name)
        elif callable(getattr(module, name, None)):
            app.command(name.replace("_", "-"))(getattr(module, name))


_mount_commands()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line and ends the process with its exit code.

    Args:
        arguments: what stands after `glm5-port`; None takes the process's own.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="glm5-port")
    except Glm5PortError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
