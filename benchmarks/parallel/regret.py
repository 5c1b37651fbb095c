"""Does the planner choose the plan that is fastest? Every plan of a small model is executed on emulated weak links, and timed.

    python -m benchmarks.parallel.regret [--setting N] [--rounds 7] [--json]

Four ranks run the plan of one replica; requests are prompts of equal length, prefilled and decoded for one step. Links are
described as they were set (`benchmarks.parallel.collectives`), with the latency of a small all-reduce. Every rank has the same
share of a core the whole time (`benchmarks.parallel.processor`), whether others compute or wait, and the compute term is
calibrated so: all four ranks run the whole model, at two sizes, which gives the time of a layer and of an operation. Then the
planner ranks, every plan runs in turn, round after round for a minute or so, and medians count; a plan that takes more than
`FAR` times the fastest in the first round is left at that. Regret is the time of the planner's choice over that of the fastest
plan, less 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.parallel.collectives import topology_of
from benchmarks.parallel.links import Cluster, NotPermitted, Wires
from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.ranks import Ranks
from glm5_port.model.tensors import expected_tensors
from glm5_port.parallel.cost.service import Workload, serve_mixed
from glm5_port.parallel.engines import find_engine
from glm5_port.parallel.execute import PlanRanks
from glm5_port.parallel.hardware import MEASURED, Chip, Figure
from glm5_port.parallel.plan import MIXED, Layout
from glm5_port.parallel.planner import rank as rank_plans
from glm5_port.parallel.probe import Group, collective_call
from glm5_port.parallel.search import Dropped, Pins, Question, forms, meshes
from glm5_port.parallel.topology import Topology
from glm5_port.registry import BACKENDS
from glm5_port.testing.tiny import tiny_config

SETTINGS = (
    Wires(machines=2, ranks=2, between="20 Mb/s", inside="20 Mb/s"),
    Wires(machines=1, ranks=4, between="1 Gb/s", inside="20 Mb/s"),
    Wires(machines=2, ranks=2, between="20 Mb/s", inside="100 Mb/s"),
    Wires(machines=2, ranks=2, between="10 Mb/s", inside="200 Mb/s"),
    Wires(machines=2, ranks=2, between="20 Mb/s", inside="1 Gb/s"),
    Wires(machines=2, ranks=2, between="40 Mb/s", inside="200 Mb/s"),
)
SHARE = 0.4
"""Of a core for each of four ranks: what two cores can hold to, with room for the kernel's own work."""
FAR = 2.0
ENOUGH = 60.0
"""Seconds of timed runs after which no further round begins."""
PROMPTS, LENGTH, SHORT = 4, 128, 8
"""Requests at the same time; tokens of each; of each in the smaller of the two calibrations."""
LATENCY_CALLS = 20
"""In a row, so that the time by which ranks leave a barrier apart does not count."""
DTYPE = torch.bfloat16


def small_config() -> Glm5Config:
    """Wide for its depth, so that hidden states are most of what is sent; four ranks can divide everything."""
    return tiny_config(
        hidden_size=512, intermediate_size=256, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, index_n_heads=4, index_head_dim=32, index_topk=256, first_k_dense_replace=1,
        indexer_types=["full"] * 4, index_topk_freq=None, index_skip_topk_offset=None, num_nextn_predict_layers=0,
        max_position_embeddings=512,
    )  # fmt: skip


# --- predicting --------------------------------------------------------------------------------------------------------------


def calibrated(wires: Wires, found: dict[str, float]) -> Topology:
    """The links as they were set, with the latency and the compute that the ranks measured.

    Args:
        wires: the links.
        found: "latency", and seconds of the whole model for few and for many tokens: "short" and "long".
    """
    topology, config = topology_of(wires), small_config()
    tokens = {"short": PROMPTS * SHORT, "long": PROMPTS * LENGTH}
    slope = max(found["long"] - found["short"], 1e-9) / (tokens["long"] - tokens["short"])
    fixed = max(found["short"] - slope * tokens["short"], 0.0)
    free = {name: Figure(1.0, "calibrated", MEASURED) for name in ("dense", "grouped", "attention", "indexer", "memory")}
    chip = Chip(
        name="calibrated",
        title="this processor, shared by all ranks",
        backend="cpu",
        generation="calibrated",
        memory=Figure(2.0**40, "enough", MEASURED),
        memory_bandwidth=Figure(1e18, "part of the rate of operations", MEASURED),
        matmul={"bf16": Figure(1.0, "calibrated", MEASURED)},
        int4_matmul=False,
        head_block=Figure(1.0, "calibrated", MEASURED),
        layer_overhead=Figure(fixed / config.num_hidden_layers, "calibrated", MEASURED),
        efficiency=free,
    )
    levels = tuple(replace(level, latency=found["latency"], quantised_exchange=False) for level in topology.levels)
    topology = replace(topology, chip=chip, levels=levels)
    # Operations of a token in the cost model's own count, at one a second: what the slope has to cover.
    alone = ask(wires, topology).prices(topology).prefill(Layout(), 1)
    operations = (alone.seconds - alone.of_kind("fixed")) / LENGTH
    return replace(topology, chip=replace(chip, matmul={"bf16": Figure(operations / slope, "calibrated", MEASURED)}))


def ask(wires: Wires, topology: Topology) -> Question:
    """What the planner is asked."""
    return Question(
        config=small_config(),
        topology=topology,
        devices=wires.world,
        weights="bf16",
        kv_format="plain",
        work=Workload(LENGTH, 1, PROMPTS * LENGTH),
        concurrency=PROMPTS,
        tpot=None,
        ttft=None,
        engines=(find_engine("torchrun"),),
        pins=Pins(replicas=1, drafts=0),
    )


def plans(question: Question) -> dict[Layout, float]:
    """Every plan that this library can run, with its predicted seconds; the planner's choice first."""
    ranking = rank_plans(question, question.topology, Dropped())
    mixed = next(candidate for candidate in ranking if len(candidate.roles) == 1)
    found = [mixed.roles[0].layout]
    for mesh in meshes(question, question.devices, MIXED, Dropped()):
        found += [form for form in forms(question, mesh.layout, MIXED, Dropped()) if not form.prefill_exchange]
    prices = question.prices(question.topology)
    return {layout: PROMPTS / serve_mixed(prices, layout, 1, PROMPTS).output_rate for layout in dict.fromkeys(found)}


def far_apart(predicted: dict[Layout, float], factor: float) -> dict[Layout, float]:
    """The fastest, and then each time the next that takes `factor` times as long as the one before."""
    found: dict[Layout, float] = {}
    for layout, seconds in sorted(predicted.items(), key=lambda item: item[1]):
        if not found or seconds >= factor * max(found.values()):
            found[layout] = seconds
    return found


def share_of_links(question: Question, layout: Layout) -> float:
    """Share of a prompt that is communication, as predicted."""
    prefill = question.prices(question.topology).prefill(layout, layout.data, PROMPTS // layout.data)
    return prefill.of_kind("communication") / prefill.seconds


# --- what a rank does --------------------------------------------------------------------------------------------------------


def prompts(length: int) -> list[list[int]]:
    """Random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (PROMPTS, length), generator=generator).tolist()


def make(ranks: Ranks) -> Glm5Model:
    """The part of a rank, from random weights."""
    config = small_config()
    whole, expected = random_weights(config, dtype=DTYPE), expected_tensors(config, mtp=False)

    def read(name: str) -> torch.Tensor:
        cut = ranks.cut(name, expected[name].component, expected[name].shape)
        return whole(name) if cut is None else whole(name).narrow(*cut).clone()

    return build(config, read, backend="cpu", dtype=DTYPE, ranks=ranks)


def seconds_of(model: Glm5Model, length: int, new_tokens: int = 2) -> float:
    """A prefill of all prompts, and decode steps for further tokens."""
    asked = prompts(length)
    dist.barrier()
    started = time.perf_counter()
    model.generate(asked, max_new_tokens=new_tokens)
    return time.perf_counter() - started


def calibrate(group: Group, rounds: int) -> dict[str, float]:
    """What `calibrated` takes, on every rank alike; each rank runs the whole model, all at the same time."""
    model = make(Ranks())
    model.generate(prompts(SHORT), max_new_tokens=1)
    found = {
        name: statistics.median(group.slowest([seconds_of(model, length, 1) for _ in range(rounds)]))
        for name, length in (("short", SHORT), ("long", LENGTH))
    }
    call = collective_call("all_reduce", dist.group.WORLD, 4096, group.device)
    found["latency"] = group.time(lambda: [call() for _ in range(LATENCY_CALLS)], 0.5) / LATENCY_CALLS / 2
    return found


def work(wires: Wires, rounds: int, far: float | None = None) -> dict[str, Any]:
    """Calibrates, plans, runs every plan, or those that are `far` apart; the same result on every rank."""
    group = Group(BACKENDS["cpu"], {"wires": str(wires), "rounds": rounds})
    with torch.inference_mode():
        found = calibrate(group, rounds)
        question = ask(wires, calibrated(wires, found))
        predicted = plans(question) if far is None else far_apart(plans(question), far)
        models = {
            layout: make(PlanRanks(layout, small_config(), node_devices=wires.ranks, device=group.device)) for layout in predicted
        }
        for model in models.values():
            seconds_of(model, SHORT)
        times: dict[Layout, list[float]] = {layout: [] for layout in models}
        started = time.perf_counter()
        for round_number in range(rounds):
            if round_number and group.slowest([time.perf_counter() - started])[0] > ENOUGH:
                break
            fastest = min((found[0] for found in times.values() if found), default=0.0)
            for layout, model in models.items():
                if far is not None or round_number == 0 or times[layout][0] <= FAR * fastest:
                    times[layout] += group.slowest([seconds_of(model, LENGTH)])
    chosen = next(iter(predicted))
    return {
        "wires": str(wires),
        "calibration": found,
        "chosen": str(chosen),
        "links": share_of_links(question, chosen),
        "plans": {
            str(layout): {"predicted": predicted[layout], "measured": statistics.median(times[layout]), "all": times[layout]}
            for layout in predicted
        },
    }


# --- the table ---------------------------------------------------------------------------------------------------------------


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The planner's choice against the fastest plan."""
    measured = {name: each["measured"] for name, each in report["plans"].items()}
    fastest = min(measured, key=lambda name: measured[name])
    order = sorted(measured, key=lambda name: measured[name])
    return {
        "wires": report["wires"],
        "plans": len(measured),
        "chosen": report["chosen"],
        "chosen_seconds": measured[report["chosen"]],
        "fastest": fastest,
        "fastest_seconds": measured[fastest],
        "slowest_seconds": measured[order[-1]],
        "regret": measured[report["chosen"]] / measured[fastest] - 1,
        "links": report["links"],
    }


def show(report: dict[str, Any]) -> str:
    """Every plan, fastest first, as text."""
    found = report["calibration"]
    lines = [f"{report['wires']}; latency {found['latency'] * 1e3:.2f} ms, whole model {found['long'] * 1e3:.0f} ms on each rank"]
    for name, each in sorted(report["plans"].items(), key=lambda item: item[1]["measured"]):
        mark = "  <- chosen" if name == report["chosen"] else ""
        lines.append(f"  {name:<44} predicted {each['predicted']:.3f} s   measured {each['measured']:.3f} s{mark}")
    return "\n".join(lines)


def row(found: dict[str, Any]) -> str:
    """A line of the table of docs/performance.md."""
    chosen, fastest = (f"{found[name]}: {found[name + '_seconds']:.2f} s" for name in ("chosen", "fastest"))
    cells = (found["wires"], str(found["plans"]), f"{found['links']:.0%}", chosen, fastest, f"{found['slowest_seconds']:.2f} s")
    return f"| {' | '.join(cells)} | {found['regret']:.0%} |"


def measure(number: int, rounds: int, *, share: float | None = SHARE, far: float | None = None) -> dict[str, Any]:
    """One setting, on emulated links.

    Args:
        number: of `SETTINGS`.
        rounds: in which every plan runs.
        share: of a core for each rank; None: what the others leave.
        far: only plans that are so many times apart, as predicted; None: all.

    Raises:
        NotPermitted: no links can be emulated here.
        OSError: a rank cannot be held to a share here.
    """
    command = [sys.executable, "-m", "benchmarks.parallel.regret", "--worker", "--setting", str(number), "--rounds", str(rounds)]
    command += [] if far is None else ["--far", str(far)]
    with Cluster(SETTINGS[number], share) as cluster:
        return dict(json.loads(cluster.run(command, timeout=290)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setting", type=int, action="append", choices=range(len(SETTINGS)), help="only this one; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--far", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers = range(len(SETTINGS)) if arguments.setting is None else arguments.setting
    if arguments.worker:
        report = work(SETTINGS[numbers[0]], arguments.rounds, arguments.far)
        if os.environ["RANK"] == "0":
            print(json.dumps(report))
        return
    try:
        reports = [measure(number, arguments.rounds) for number in numbers]
    except (NotPermitted, OSError) as error:
        print(f"regret needs namespaces with limited links, and control groups of the processor: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps([report | {"summary": summary(report)} for report in reports], indent=2))
        return
    print("\n".join(show(report) for report in reports))
    print("\n| links | plans | links' share | chosen | fastest | slowest | regret |\n|---|---:|---:|---|---|---:|---:|")
    print("\n".join(row(summary(report)) for report in reports))


if __name__ == "__main__":
    main()
