"""Chips as data: one YAML file each under data/chips, every figure with its source and how sure it is.

    matmul:
      bf16: {value: 989 TFLOPS, source: aiconfigurator, confidence: datasheet}

A figure that nobody published is written down as `unknown` with the reason; whoever needs it is told so, instead of a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from glm5_port.errors import HardwareError, did_you_mean
from glm5_port.parallel.description import Description

DATA = Path(__file__).parent / "data"
DATASHEET, MEASURED, UNSURE, UNKNOWN = "datasheet", "measured", "unsure", "unknown"
CONFIDENCES = (DATASHEET, MEASURED, UNSURE, UNKNOWN)
"""datasheet: the vendor's own figure; measured: by somebody, in public; unsure: press, inference or general knowledge."""
BACKENDS = ("cuda", "npu", "musa", "mlu", "gcu", "hygon", "metax", "kunlunxin", "iluvatar", "cpu")
DTYPES = ("bf16", "fp8", "int8", "fp4")
EFFICIENCIES = ("dense", "grouped", "attention", "indexer", "memory")
"""Matrix products, grouped matrix products, sparse attention, indexer scores, memory: share of the peak that is reached."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from.

    Attributes:
        value: in bytes, bytes a second, operations a second or seconds; None where nobody published it.
        source: who says so; for an unknown figure, what was looked for.
        confidence: one of `CONFIDENCES`.
    """

    value: float | None
    source: str
    confidence: str


@dataclass(frozen=True, slots=True)
class Chip:
    """One device: what torch calls a device, so a die where a package has two.

    Attributes:
        name: its name here; `title` for people.
        backend: the backend of this library that runs it. Several backends answer to the torch device "cuda".
        generation: what engines' rules go by ("hopper", "a2", ...).
        memory: bytes, as the driver reports them.
        memory_bandwidth: bytes a second.
        matmul: operations a second by dtype, without sparsity; a dtype that is absent is not native.
        int4_matmul: whether the matrix unit multiplies INT4 weights without widening them.
        head_block: heads that the sparse attention kernel always computes together.
        layer_overhead: seconds of launches and small kernels that each layer adds.
        efficiency: shares of the peak where they differ from the defaults of the cost model.
    """

    name: str
    title: str
    backend: str
    generation: str
    memory: Figure
    memory_bandwidth: Figure
    matmul: Mapping[str, Figure]
    int4_matmul: bool
    head_block: Figure
    layer_overhead: Figure
    efficiency: Mapping[str, Figure] = field(default_factory=dict)

    def figures(self) -> dict[str, Figure]:
        """Every figure by name."""
        return {
            "memory": self.memory,
            "memory_bandwidth": self.memory_bandwidth,
            **{f"matmul {dtype}": figure for dtype, figure in self.matmul.items()},
            "head_block": self.head_block,
            "layer_overhead": self.layer_overhead,
            **{f"efficiency {name}": figure for name, figure in self.efficiency.items()},
        }

    def missing(self) -> list[str]:
        """What a plan needs and nobody published, one sentence each."""
        needed = {"memory": self.memory, "memory_bandwidth": self.memory_bandwidth}
        needed["matmul bf16"] = self.matmul.get("bf16", Figure(None, "not in the file", UNKNOWN))
        return [f"{name} of {self.name} is unknown: {figure.source}" for name, figure in needed.items() if figure.value is None]

    def peak(self, dtype: str) -> float:
        """Operations a second in a dtype; those of bf16 where the chip has no such unit or nobody published it."""
        figure = self.matmul.get(dtype)
        value = figure.value if figure is not None else None
        return value if value is not None else (self.matmul["bf16"].value or 0.0)

    def native(self, dtype: str) -> bool:
        """Whether the chip multiplies a dtype without widening it."""
        return dtype in self.matmul


def read_chip(path: str | PathLike[str]) -> Chip:
    """A chip from its file.

    Raises:
        HardwareError: an unknown key, a missing unit, source or confidence, or a contradiction; with file and line.
    """
    file = Description.read(path, "a chip")
    matmul_part = file.part("matmul")
    matmul = {dtype: _figure(matmul_part, dtype, "rate") for dtype in DTYPES if matmul_part.has(dtype)}
    if "bf16" not in matmul:
        file.refuse("matmul", "matmul lacks 'bf16': every plan needs it")
    matmul_part.finish()
    efficiency = {}
    if file.has("efficiency"):
        efficiency_part = file.part("efficiency")
        efficiency = {name: _figure(efficiency_part, name, None) for name in EFFICIENCIES if efficiency_part.has(name)}
        efficiency_part.finish()
    chip = Chip(
        name=file.text("name"),
        title=file.text("title"),
        backend=file.choice("backend", BACKENDS),
        generation=file.text("generation"),
        memory=_figure(file, "memory", "size"),
        memory_bandwidth=_figure(file, "memory_bandwidth", "bandwidth"),
        matmul=matmul,
        int4_matmul=file.choice("int4_matmul", ("yes", "no")) == "yes",
        head_block=_figure(file, "head_block", "count"),
        layer_overhead=_figure(file, "layer_overhead", "time"),
        efficiency=efficiency,
    )
    file.finish()
    if chip.name != Path(path).stem:
        file.refuse("name", f"the chip is called {chip.name!r}, its file {Path(path).name!r}: one name for both")
    return chip


def _figure(parent: Description, key: str, kind: str | None) -> Figure:
    """A figure; `kind` None is a share of 1, "count" an integer."""
    part = parent.part(key)
    confidence = part.choice("confidence", CONFIDENCES)
    if confidence == UNKNOWN:
        value = None
    elif kind is None:
        value = part.fraction("value")
    else:
        value = float(part.integer("value")) if kind == "count" else part.quantity("value", kind)
    figure = Figure(value, part.text("source"), confidence)
    part.finish()
    return figure


def chip_names() -> list[str]:
    """Chips that come with the package."""
    return sorted(path.stem for path in (DATA / "chips").glob("*.yaml"))


def find_chip(name: str, beside: Path | None = None) -> Chip:
    """A chip by name, or from a file of that name beside the topology that asks for it.

    Args:
        name: "h200", or the name of a file "mychip.yaml" in `beside`.
        beside: the directory of the user's own topology file.

    Raises:
        HardwareError: no such chip.
    """
    own = None if beside is None else beside / f"{name}.yaml"
    if own is not None and own.is_file():
        return read_chip(own)
    path = DATA / "chips" / f"{name}.yaml"
    if not path.is_file():
        known = chip_names()
        raise HardwareError(f"{name!r} is no chip known here{did_you_mean(name, known)}\n  known: {', '.join(known)}")
    return read_chip(path)
