"""Published measurements beside what the cost model says. `python -m tests.parallel.published` prints the table of
docs/parallel.md.

Fitted elsewhere, and so no evidence: NCCL's 64 MB rows of H200 and A100 (efficiencies of the node's links) and their 256 KB rows
(latency), the NIC's share of 85 % (DeepEP on H800), indexer scores and top-k at 128 K of context (their efficiencies), one
cell of the decode table (the fixed time of an attention layer).
"""

from __future__ import annotations

from typing import NamedTuple

from glm5_port.config import released
from glm5_port.parallel.cost.collectives import all_reduce, send
from glm5_port.parallel.cost.compute import imbalance
from glm5_port.parallel.cost.service import Prices, Workload
from glm5_port.parallel.cost.step import Step, model_size
from glm5_port.parallel.cost.terms import TERMS, sum_terms
from glm5_port.parallel.plan import Layout
from glm5_port.parallel.topology import Level, Topology, find_hardware

GLM_5, H200 = released("GLM-5"), find_hardware("hgx-h200")
ATTENTION = (
    "attention projections",
    "indexer projections",
    "indexer scores",
    "top-k selection",
    "sparse attention",
    "elementwise",
)
FIRST_CELL = 259.0
"""Microseconds of an attention layer with 64 heads, 16 sequences of 8 K: what the fixed time is taken from."""
KIB = 1024
PAYLOAD = 1448 / 1514
"""Share of an Ethernet frame that carries data."""


class Row(NamedTuple):
    """One measurement.

    Attributes:
        group: which table it is of, and who published it.
        name: what was measured.
        predicted, measured: in the same unit.
        within: largest error, as a share, that the docs state for the group.
        above: the same for predictions above the measurement, where they are held to less.
    """

    group: str
    name: str
    predicted: float
    measured: float
    within: float
    above: float | None = None

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def one_layer(phase: str, tokens: float, sequences: float, context: float, layout: Layout) -> Step:
    """A step of one layer with an indexer and experts on H200."""
    size = model_size(GLM_5)._replace(layers=1, indexed=1, moe=1)
    return Step(GLM_5, H200, layout, "fp8", "fp8", phase, tokens, sequences, context, layout.data, 1, size)


def attention(phase: str, tensor: int, tokens: float, sequences: float, context: float) -> float:
    """Microseconds of the attention half of a layer, without its fixed time."""
    return sum_terms(one_layer(phase, tokens, sequences, context, Layout(tensor=tensor, expert=tensor)), ATTENTION).seconds * 1e6


def prefill_rows() -> list[Row]:
    """8,192 tokens after a prefix, FP8."""
    group = "attention, prefill chunk of 8,192, ms (aiconfigurator, SGLang 0.5.14, H200)"
    measured = {1: (9.0, 9.9, 12.0, 15.2, 23.0, 29.6), 8: (7.4, 8.2, 10.2, 13.2, 21.3, 28.0)}
    rows = []
    for tensor, values in measured.items():
        for prefix, value in zip((0, 8, 32, 64, 128, 190), values, strict=True):
            predicted = attention("prefill", tensor, 8192, 1, prefix * KIB + 8192) / 1e3
            rows.append(
                Row(group, f"TP{tensor}, prefix {prefix} K", predicted, value, 0.07 if prefix >= 64 else 0.30, above=0.05)
            )
    return rows


def decode_rows() -> list[Row]:
    """Sequences x context, FP8; the first cell of TP1 is where the fixed time comes from."""
    group = "attention, decode, us (aiconfigurator, vLLM 0.24, H200)"
    measured = {1: (259, 328, 405, 334, 633, 970), 8: (225, 287, 351, 297, 593, 962)}
    fixed = FIRST_CELL - attention("decode", 1, 16, 16, 8 * KIB)
    rows = []
    for tensor, values in measured.items():
        for (batch, context), value in zip(((16, 8), (64, 8), (128, 8), (16, 128), (64, 128), (128, 128)), values, strict=True):
            if (tensor, batch, context) != (1, 16, 8):
                predicted = attention("decode", tensor, batch, batch, context * KIB) + fixed
                rows.append(Row(group, f"TP{tensor}, {batch} x {context} K", predicted, value, 0.12))
    return rows


def exchange_rows() -> list[Row]:
    """DeepEP's low-latency kernels with uniform routing, so without the model's imbalance."""
    inside = "expert exchange in a node, us (aiconfigurator, DeepEP low latency, H200, H = 6144)"
    between = "expert exchange between nodes, us (aiconfigurator, DeepEP low latency, 128 tokens, H = 7168)"
    cases = [(inside, 1, tokens, *us) for tokens, us in ((32, (16, 23)), (128, (31, 57)), (512, (95, 203)))]
    cases += [(between, nodes, 128 * 7168 / 6144, *us) for nodes, us in ((2, (102, 186)), (4, (143, 263)), (8, (167, 305)))]
    rows = []
    for group, nodes, tokens, dispatch, combine in cases:
        layout = Layout(data=8 * nodes, expert=8 * nodes, exchange="all_to_all", exchange_bits=8)
        step = one_layer("decode", tokens, tokens, 8192, layout)
        for name, measured in (("dispatch", dispatch), ("combine", combine)):
            predicted = TERMS[f"expert {name}"].of(step).seconds / imbalance(step) * 1e6
            at = f"{nodes} nodes" if nodes > 1 else f"{tokens} tokens"
            rows.append(Row(group, f"{name}, {at}", predicted, measured, 0.15))
    return rows


def all_reduce_rows() -> list[Row]:
    """8 MB over eight devices: a size that nothing was fitted to."""
    group = "all-reduce of 8 MB over 8, us (aiconfigurator)"
    measured = {"hgx-h200": (78, 0.25), "hgx-a100": (128, 0.25), "pcie-rtx-pro-6000": (661, 0.05), "pcie-l40s": (9988, 0.27)}
    return [
        Row(group, name, all_reduce(find_hardware(name), (8, 1), 8 * KIB * KIB).seconds * 1e6, value, within)
        for name, (value, within) in measured.items()
    ]


def recipe_rows() -> list[Row]:
    """A whole deployment: FP8, TP8, 8K in, 1K out, 32 prompts sent at once."""
    group = "GLM-5 FP8 on 8 x H200, vLLM (vllm-project/recipes)"
    prices = Prices(GLM_5, H200, ("fp8", "fp8"), Workload(8192, 1024, 8192))
    layout = Layout(tensor=8, expert_tensor=8)
    return [
        Row(group, "decode step, ms", prices.decode(layout, 32, 1).seconds * 1e3, 35.4, 0.25),
        Row(group, "mean time to first token, s", prices.prefill(layout, 1).seconds * (32 + 1) / 2, 13.4, 0.35),
    ]


def gloo_rows() -> list[Row]:
    """Two machines of two ranks, 4 MB a rank, 50 Mbit/s between and 1 Gbit/s inside, by traffic control.

    gloo's own all-gather goes round one ring; the level-by-level form here is another algorithm, so it has no row.
    """
    group = "gloo on emulated links, s"
    exact = {"all_reduce": 1.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.7, "send": 1.0}

    def level(name: str, devices: int, megabits: float) -> Level:
        return Level(name, devices, "switch", 50e-6, megabits * 1e6 / 8 * PAYLOAD, "emulated", "measured", efficiency=exact)

    levels = (level("node", 2, 1000), level("cluster", 0, 50 / 2))
    topology, size = Topology("emulated", "", find_hardware("xeon-4-2s").chip, levels), 4e6
    cases = [
        ("send, both ranks across", send(topology, 2, size), 1.336),
        ("all-reduce, pairs across", all_reduce(topology, (1, 2), size), 1.341),
        ("all-reduce, level by level", all_reduce(topology, (2, 2), size), 0.726),
        ("all-reduce, inside", all_reduce(topology, (2, 1), size), 0.038),
    ]
    return [Row(group, name, cost.seconds, measured, 0.12) for name, cost, measured in cases]


def rows() -> list[Row]:
    """All of them."""
    return [*prefill_rows(), *decode_rows(), *exchange_rows(), *all_reduce_rows(), *recipe_rows(), *gloo_rows()]


def table() -> str:
    """All rows as text, and the span of measured over predicted."""
    found, lines, group = rows(), [], ""
    for row in found:
        lines += [row.group] if row.group != group else []
        group = row.group
        lines.append(f"  {row.name:<30} predicted {row.predicted:>8.4g}   measured {row.measured:>8.4g}   {row.error:+.0%}")
    ratios = [row.measured / row.predicted for row in found]
    return "\n".join([*lines, f"measured over predicted: {min(ratios):.2f} to {max(ratios):.2f}"])


if __name__ == "__main__":
    print(table())
