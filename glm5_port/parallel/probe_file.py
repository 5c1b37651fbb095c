"""Topology and chip files out of what a probe measured: the same YAML that users write, marked as measured.

Two files: my-servers.yaml, and my-servers-chip.yaml beside it. With a known chip its figures stay, and the shares of its peaks
become what was measured; the shares of kernels that a probe does not run are scaled by that of its matrix product. What nobody
measured (links to other machines when there was one) is written down as unsure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from glm5_port.errors import HardwareError
from glm5_port.parallel.cost.step import DEFAULT_EFFICIENCY
from glm5_port.parallel.hardware import MEASURED, UNSURE, Chip, Figure
from glm5_port.parallel.probe import Links, Measured

ASSUMED_NETWORK = {"latency": 50e-6, "bandwidth": 1.25e9}
"""Of links between machines that were not measured: 10 Gb/s Ethernet."""
ASSUMED = Figure(None, "assumed: a probe does not measure it", UNSURE)


def source_of(measured: Measured) -> str:
    """Who says so."""
    return f"measured by probe: {measured.library}, {measured.machines} x {measured.ranks} ranks, all devices at once"


def measured_chip(measured: Measured, base: Chip | None, name: str) -> Chip:
    """The chip as it was measured.

    Args:
        measured: by the probe.
        base: what the device is, if that is known; None for a chip that is not.
        name: of the new chip.

    Raises:
        HardwareError: faster than the chip that it is said to be.
    """
    source = source_of(measured)
    memory = Figure(float(measured.memory), source, MEASURED)
    if base is None:
        base = Chip(
            name=name,
            title=measured.device,
            backend=measured.backend,
            generation="unknown",
            memory=memory,
            memory_bandwidth=Figure(measured.memory_bandwidth, source, MEASURED),
            matmul={"bf16": Figure(measured.matmul, source, MEASURED)},
            int4_matmul=False,
            head_block=replace(ASSUMED, value=16.0),
            layer_overhead=replace(ASSUMED, value=60e-6),
        )
    if base.backend != measured.backend:
        raise HardwareError(f"--chip {base.name}: it runs on {base.backend}, and this is {measured.backend}")
    shares = {"memory": measured.memory_bandwidth / (base.memory_bandwidth.value or measured.memory_bandwidth)}
    shares["dense"] = measured.matmul / base.peak("bf16")
    for what, share in shares.items():
        if share > 1.05:
            raise HardwareError(f"--chip {base.name}: {what} was measured at {share:.2f} of its peak; which chip is this?")
    before = DEFAULT_EFFICIENCY | {key: figure.value for key, figure in base.efficiency.items() if figure.value is not None}
    efficiency = {key: Figure(min(share, 1.0), source, MEASURED) for key, share in shares.items()}
    for key in DEFAULT_EFFICIENCY:
        if key not in efficiency:
            share = min(before[key] * shares["dense"] / before["dense"], 1.0)
            efficiency[key] = Figure(share, "scaled by the measured matrix product", UNSURE)
    return replace(base, name=name, memory=memory, efficiency=efficiency)


# --- YAML --------------------------------------------------------------------------------------------------------------------


def write_files(measured: Measured, base: Chip | None, path: Path) -> tuple[Path, Path]:
    """Writes (topology, chip).

    Raises:
        HardwareError: a chip that this cannot be.
    """
    chip = measured_chip(measured, base, f"{path.stem}-chip")
    beside = path.with_name(f"{chip.name}.yaml")
    beside.write_text(chip_text(chip), encoding="utf-8")
    path.write_text(topology_text(measured, chip, path.stem), encoding="utf-8")
    return path, beside


def chip_text(chip: Chip) -> str:
    """A chip as its file."""
    lines = [f"name: {chip.name}", f"title: {_quoted(chip.title)}", f"backend: {chip.backend}", f"generation: {chip.generation}"]
    lines += [_figure("memory", chip.memory, "B"), _figure("memory_bandwidth", chip.memory_bandwidth, "B/s"), "matmul:"]
    lines += ["  " + _figure(dtype, figure, "OPS" if dtype == "int8" else "FLOPS") for dtype, figure in chip.matmul.items()]
    lines += [f"int4_matmul: {'yes' if chip.int4_matmul else 'no'}"]
    lines += [_figure("head_block", chip.head_block, "", "d"), _figure("layer_overhead", chip.layer_overhead, "s"), "efficiency:"]
    lines += ["  " + _figure(name, figure, "") for name, figure in chip.efficiency.items()]
    return "\n".join(lines) + "\n"


def topology_text(measured: Measured, chip: Chip, name: str) -> str:
    """A topology as its file."""
    title = f"{measured.machines} x {measured.ranks} x {chip.title}, measured by probe"
    lines = [f"name: {name}", f"title: {_quoted(title)}", f"chip: {chip.name}", "calibrated: yes"]
    lines += [f"collectives: {measured.collectives}", "levels:"]
    found = {links.name: links for links in measured.links}
    lines += _level("node", str(measured.ranks), found.get("node"), measured)
    lines += _level("cluster", "any", found.get("cluster"), measured)
    return "\n".join(lines) + "\n"


def _level(name: str, devices: str, links: Links | None, measured: Measured) -> list[str]:
    values: Mapping[str, float] = ASSUMED_NETWORK
    source, confidence = "not measured: there were no two ranks on such links; assumed 10 Gb/s Ethernet", UNSURE
    more: list[str] = []
    if links is not None:
        best = max(links.bandwidth.values())
        values = {"latency": links.latency, "bandwidth": best}
        sizes = " and ".join(f"{size:,} bytes" for size in links.sizes)
        source, confidence = f"{source_of(measured)}, messages of {sizes}", MEASURED
        if links.by_group:  # relative to the all-reduce of the whole machine
            whole = links.bandwidth["all_reduce"]
            best = max(best, whole)
            table = {**{size: rate * best / whole for size, rate in links.by_group.items()}, links.ranks: best}
            more.append(f"by_group: {{{', '.join(f'{size}: {rate:.4g} B/s' for size, rate in table.items())}}}")
        more.append(f"efficiency: {{{', '.join(f'{each}: {rate / best:.4g}' for each, rate in links.bandwidth.items())}}}")
    lines = [f"name: {name}", f"devices: {devices}", "shape: switch"]
    lines += [f"latency: {values['latency']:.4g} s", f"bandwidth: {values['bandwidth']:.4g} B/s", *more]
    lines += [f"source: {_quoted(source)}", f"confidence: {confidence}"]
    return [f"  {'-' if not place else ' '} {line}" for place, line in enumerate(lines)]


def _figure(name: str, figure: Figure, unit: str, digits: str = ".12g") -> str:
    if figure.value is None:
        return f"{name}: {{source: {_quoted(figure.source)}, confidence: unknown}}"
    value = int(figure.value) if digits == "d" else figure.value
    text = f"{value:{digits}} {unit}".strip()
    return f"{name}: {{value: {text}, source: {_quoted(figure.source)}, confidence: {figure.confidence}}}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
