"""`glm5-port probe`: measures links, matrix products and memory under torchrun, and writes the topology that `plan` reads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text, progress


def probe(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The topology file to write, .yaml.")],
    chip: Annotated[
        str | None, typer.Option("--chip", metavar="NAME", help="Which known chip this is: its other figures are taken over.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="The chip to run on; default: as GLM5_PORT_BACKEND says.")
    ] = None,
    small: Annotated[str | None, typer.Option("--small", metavar="SIZE", help="Small message, for example 256 KiB.")] = None,
    large: Annotated[str | None, typer.Option("--large", metavar="SIZE", help="Large message, for example 64 MiB.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Time for one measurement.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Measure the links between the ranks of torchrun, and the chips; write what `plan --hardware FILE` reads."""
    from glm5_port.parallel.probe import check_environment

    check_environment()
    report = run(output, chip, backend, (small, large), seconds)
    if report is not None:  # rank 0 speaks for all
        print_json(report) if as_json else _print(report)


def run(
    output: Path, chip: str | None, backend: str | None, sizes: tuple[str | None, str | None], seconds: float
) -> dict[str, Any] | None:
    """Measures on every rank and writes the files on rank 0.

    Args:
        output: the topology file.
        chip: a known chip, or None.
        backend: which backend, or None.
        sizes: (small, large) message with units, or None.
        seconds: of one measurement.

    Returns:
        What was measured, as plain data; None on other ranks.

    Raises:
        HardwareError: sizes, chip or place that cannot be, or ranks that disagree.
    """
    import torch.distributed as dist

    from glm5_port.errors import HardwareError
    from glm5_port.parallel import probe as probing
    from glm5_port.parallel.hardware import find_chip
    from glm5_port.parallel.probe_file import write_files
    from glm5_port.parallel.quantities import parse_quantity
    from glm5_port.requests import resolve_backend

    if output.suffix not in (".yaml", ".yml") or not output.absolute().parent.is_dir():
        raise HardwareError(f"--output {output}: expected a file ending in .yaml in a directory that exists")
    base = None if chip is None else find_chip(chip)
    found = resolve_backend(backend)
    least, most = probing.SIZES.get(found.collective, probing.LARGE_SIZES)
    small = least if sizes[0] is None else int(parse_quantity(sizes[0], "size"))
    large = most if sizes[1] is None else int(parse_quantity(sizes[1], "size"))
    if not 0 < 4 * small <= large:
        raise HardwareError(
            f"--small is {small:,} bytes and --large {large:,}: the large message takes at least four times as many"
        )
    try:
        group = probing.Group(found, {"chip": chip, "messages": [small, large], "seconds": seconds})
        shown: Any = progress("probe", probing.steps(group.ranks, group.machines)) if group.rank == 0 else nullcontext(_silent)
        with shown as advance:
            measured = probing.measure(group, (small, large), seconds, lambda note: advance(note=note))
        if group.rank:
            return None
        files = write_files(measured, base, output)
        return {"files": [str(file) for file in files], **measured.as_dict()}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _silent(steps: int = 1, note: str = "") -> None:
    """Other ranks than 0 show no progress."""


def _print(report: dict[str, Any]) -> None:
    from glm5_port.parallel.probe import form
    from glm5_port.parallel.quantities import show_bandwidth, show_seconds

    print_text(f"{report['machines']} machines x {report['ranks']} ranks, {report['device']}, {report['library']}")
    print_text(
        f"  bf16 products {report['matmul'] / 1e12:.3g} TFLOPS, memory {show_bandwidth(report['memory_bandwidth'])} a device"
    )
    for links in report["links"]:
        rows = []
        for name, (first, second) in links["seconds"].items():
            rounds, share = form(name, links["ranks"])
            line = rounds * links["latency"] + share * links["sizes"][0] / links["bandwidth"][name]
            rows.append(
                [
                    name,
                    show_seconds(first),
                    show_seconds(second),
                    show_bandwidth(links["bandwidth"][name]),
                    f"{line / first - 1:+.0%}",
                ]
            )
        small, large = (f"{size:,} bytes" for size in links["sizes"])
        title = f"{links['name']}: {links['ranks']} ranks, latency {show_seconds(links['latency'])}"
        print_text()
        print_table(["collective", small, large, "bandwidth", f"fit at {small}"], rows, title=title)
    if len(report["links"]) == 2:
        print_text(f"\ncollectives over both levels: {report['collectives']}")
    first, machines = report["files"][0], report["machines"]
    print_text(f"\nwritten: {', '.join(report['files'])}")
    print_text(f"next: glm5-port plan --model M --hardware {first} --nodes {machines}")
