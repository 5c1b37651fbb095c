"""Runs the contests and writes what docs/performance.md shows.

    python -m benchmarks.cpu                         all contests, a table
    python -m benchmarks.cpu --only matmul sparse    some of them
    python -m benchmarks.cpu --out benchmarks/results --plot   also JSON and a plot, beside what earlier runs left there
    python -m benchmarks.cpu --show benchmarks/results         runs nothing: the table of docs/performance.md from that JSON

The machine should be otherwise idle; shares and ratios are of one run, and the two limits are measured between the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cpu import attention, dense, layer, matmul, quantize, small
from benchmarks.cpu.contest import Contest, Limits, Result, run, summary, table
from glm5_port.backends.cpu.extension import widest_isa


@dataclass(frozen=True, slots=True)
class Suite:
    """Contests that are made together.

    Attributes:
        contests: makes them, one after the other.
        operators: that they measure, or the name of what is larger than one.
    """

    contests: Callable[[], Iterator[Contest]]
    operators: tuple[str, ...]


INT4_EXPERTS = ("expert_mlp_int4", "expert_mlp_int4_w4a8")
SUITES = {
    "matmul": Suite(matmul.products, ("int4_matmul",)),
    "experts": Suite(lambda: matmul.experts(256, peers=False), INT4_EXPERTS),
    "experts_peers": Suite(lambda: matmul.experts(64, peers=True), INT4_EXPERTS),
    "sparse": Suite(attention.sparse_decode, ("sparse_mla_attention",)),
    "sparse_prefill": Suite(attention.sparse_prefill, ("sparse_mla_attention",)),
    "dense": Suite(attention.dense_decode, ("mla_attention_absorbed",)),
    "dense_prefill": Suite(attention.dense_prefill, ("mla_attention_expanded",)),
    "indexer": Suite(attention.indexer, ("lightning_indexer", "indexer_scores")),
    "selection": Suite(small.selection, ("select_top_k",)),
    "prologues": Suite(small.prologues, ("mla_prologue", "mla_prologue_into_cache", "mla_project", "indexer_prologue")),
    "routing": Suite(small.routing, ("route_experts",)),
    "between": Suite(small.between, ("rms_norm", "add_rms_norm", "rotate")),
    "writes": Suite(small.writes, ("write_cache",)),
    "linear": Suite(dense.linears, ("linear",)),
    "mlp": Suite(dense.mlps, ("gated_mlp", "expert_mlp")),
    "heads": Suite(dense.heads, ("linear_per_head", "attention_output")),
    "int8": Suite(dense.int8, ("int8_matmul",)),
    "quantize": Suite(quantize.quantisers, ("int4_quantize", "int4_quantize_measured")),
    "dequantize": Suite(dense.dequantisers, ("int4_dequantize",)),
    "layer": Suite(layer.layers, ("decoder layer",)),
}


def machine() -> dict[str, object]:
    """What ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": model,
        "isa": widest_isa(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": commit,
    }


def read(path: Path) -> list[Result]:
    """The results that cpu.json holds; none where there is no such file."""
    held = json.loads(path.read_text())["results"] if path.exists() else []
    return [Result(**{key: value for key, value in r.items() if key != "share"}) for r in held]


def record(directory: Path, results: list[Result]) -> list[Result]:
    """Writes cpu.json; contests that it holds and that did not run now stay. Returns all of them."""
    path = directory / "cpu.json"
    ran = {(result.operator, result.work) for result in results}
    kept = [result for result in read(path) if (result.operator, result.work) not in ran] + results
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": [result.as_dict() for result in kept]}, indent=1) + "\n")
    return kept


def declared(suite: Suite) -> Iterator[Contest]:
    """The contests of a suite, which must be of the operators that it names: a test counts those names."""
    seen = set()
    for contest in suite.contests():
        seen.add(contest.operator)
        yield contest
    if seen != set(suite.operators):
        raise SystemExit(f"a suite of {', '.join(suite.operators)} measured {', '.join(sorted(seen))}")


def plot(results: list[Result], path: Path) -> None:
    """Shares of the limit, this project's kernels and the best of the others, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys((r.operator, r.work) for r in results))
    ours, peers = [], []
    for work in works:
        shares = [(r.contender.startswith("cpu/"), r.share) for r in results if (r.operator, r.work) == work]
        ours.append(100 * max(share for mine, share in shares if mine))
        peers.append(100 * max((share for mine, share in shares if not mine), default=0.0))
    places = range(len(works))
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(works) + 1))
    axes.barh([place - 0.2 for place in places], ours, 0.38, label="glm5_port native", color="#1f77b4")
    axes.barh([place + 0.2 for place in places], peers, 0.38, label="best other contender", color="#bbbbbb")
    axes.set_yticks(list(places), [f"{operator}: {work}" for operator, work in works], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the limit measured in the same run, %")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="SUITE")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for a contest (three rounds at least)")
    parser.add_argument("--out", type=Path, help="directory for cpu.json (and cpu.svg)")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--show", type=Path, metavar="DIRECTORY", help="run nothing, and show what cpu.json there holds")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout instead of a table")
    options = parser.parse_args()
    if options.show is not None:
        held = read(options.show / "cpu.json")
        print(summary(held))
        if options.plot:
            plot(held, options.show / "cpu.svg")
        return
    limits, results = Limits(), list[Result]()
    for name in options.only:
        for contest in declared(SUITES[name]):
            results += run(contest, limits, rounds=options.rounds, budget=options.budget)
            if not options.json:
                print(table(results[-len(contest.contenders) :]).split("\n", 2)[2], flush=True)
            if options.out is not None:
                kept = record(options.out, results)
    if options.json:
        print(json.dumps({"machine": machine(), "results": [result.as_dict() for result in results]}, indent=1))
    if options.out is not None and options.plot:
        plot(kept, options.out / "cpu.svg")


if __name__ == "__main__":
    main()
