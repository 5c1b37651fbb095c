"""`glm5-port inspect`: shows what the weight files of a checkpoint hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text

BAR = 40
"""Characters of the longest bar of a histogram."""


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="PATH", help="Directory of a checkpoint: bf16, block-FP8 or INT4.")],
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Also summarise this tensor; a quantised weight is NAME.weight."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Show what a checkpoint's files hold: format, group, rule, counts and bytes by component. Exit 1 if files are not whole."""
    from glm5_port.quant.inspection import inspect_checkpoint

    found = inspect_checkpoint(checkpoint, tensor)
    print_json(found) if as_json else _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    from glm5_port.quant.sizes import show_bytes

    rule = found["rule"]
    lines = {
        "family": found["family"],
        "format": found["format"],
        "group": "none" if found["group_size"] is None else str(found["group_size"]),
        "rule": "not recorded" if rule is None else f"{rule['name']} v{rule['version']}: {rule['rounding']}",
        "made by": found["made_by"] or "not recorded",
        "files": f"{found['files']:,} with {found['tensors']:,} tensors, {show_bytes(found['bytes'])}",
        "quantised": f"{found['quantized_weights']:,} weights in INT4",
    }
    print_text("\n".join(f"{name + ':':11}{text}" for name, text in lines.items()) + "\n")
    rows = [[e["component"], e["stored"], f"{e['weights']:,}", show_bytes(e["bytes"])] for e in found["components"]]
    print_table(("component", "stored as", "weights", "bytes"), rows)
    if "tensor" in found:
        _print_tensor(found["tensor"])
    for problem in found["problems"]:
        print_text(f"WRONG    {problem}")


def _print_tensor(tensor: dict[str, Any]) -> None:
    print_text(f"\n{tensor['name']} {tensor['shape']} in {tensor['file']}")
    if "codes" in tensor:
        print_text(f"  groups of {tensor['group_size']}; first codes {tensor['first_codes']}")
        most = max(tensor["codes"].values())
        for code, count in tensor["codes"].items():
            print_text(f"  {code:>3} {count:>12,} {'#' * (BAR * count // max(most, 1))}".rstrip())
    values = tensor["scales"] if "scales" in tensor else tensor["values"]
    what = "scales" if "scales" in tensor else f"values ({tensor['dtype']})"
    print_text(
        f"  {what}: {values['smallest']:.6g} to {values['largest']:.6g}, mean {values['mean']:.6g}, "
        f"{values['zeros']:,} zeros, {values['not_finite']:,} not finite"
    )
