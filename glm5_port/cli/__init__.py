"""The `glm5-port` command: one file per command.

A module of this package that defines a function (or a `typer.Typer` named `app`) under its own name is a command;
`glm5_port.cli.app` finds it. Such a module imports at its top only what is light (typer, `output`, errors); what computes is
imported inside the function, so that `glm5-port --help` is quick.
"""
