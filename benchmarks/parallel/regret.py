"""Does the planner choose the plan that is fastest? Every plan of a small model is executed on emulated weak links, and timed.

    python -m benchmarks.parallel.regret [--setting N] [--rounds 7] [--json]

Four ranks run the plan of one replica; requests are prompts of equal length, prefilled and decoded for one step. Links are
described as they were set (`benchmarks.parallel.collectives`), with the latency of a small all-gather on each level. Every rank
computes at the same constant speed (`benchmarks.parallel.processor`), whether others compute or wait, and the compute term is
calibrated so: all four ranks run the whole model, at two sizes, which gives the time of a layer and of an operation. Then the
planner ranks, and every plan runs in turn. The first round counts only for plans that take more than `FAR` times the fastest,
which are left at that: memory, sockets and windows of plans that have not run yet make it slower. Round after round follows,
for half a minute, and medians count. Regret is the time of the planner's choice over that of the fastest plan,
less 1. Of every plan, what its stages computed is told apart from links and waiting, as predicted and as measured; and how long
the machine was too busy with other things to compute at that speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.parallel.collectives import topology_of
from benchmarks.parallel.links import Cluster, NotPermitted, Wires
from benchmarks.parallel.processor import Pace
from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.ranks import Ranks
from glm5_port.model.tensors import expected_tensors
from glm5_port.parallel.cost.service import Workload, serve_mixed
from glm5_port.parallel.cost.terms import COMMUNICATION
from glm5_port.parallel.engines import find_engine
from glm5_port.parallel.execute import PlanRanks
from glm5_port.parallel.hardware import MEASURED, Chip, Figure
from glm5_port.parallel.plan import MIXED, Layout
from glm5_port.parallel.planner import rank as rank_plans
from glm5_port.parallel.probe import Group, collective_call, neighbours
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
"""Speed of each of four ranks, of a core: what two cores can hold to, with room for the kernel's own work."""
FAR = 2.0
ENOUGH = 35.0
"""Seconds of timed runs after which no further round begins."""
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26)}
"""For the ranks: what was freed is not given back to the system. With every plan in one process the pages of one plan would be
taken from it while others run, and asked for again, a fault each."""
PROMPTS, LENGTH, SHORT = 4, 128, 8
"""Requests at the same time; tokens of each; of each in the smaller of the two calibrations."""
LATENCY_CALLS, LATENCY_BYTES = 20, 256
"""In a row, so that the time by which ranks leave a barrier apart does not count; few beside any rate here, and too many for the
way past the queue."""
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
        found: seconds of a small all-gather on each level, by its name; and of the whole model for few and for many tokens,
            "short" and "long".
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
    levels = tuple(replace(level, latency=found[level.name], quantised_exchange=False) for level in topology.levels)
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


class Predicted(NamedTuple):
    """Seconds of a plan: all of them, and of these those that are no communication."""

    seconds: float
    computing: float


def plans(question: Question) -> dict[Layout, Predicted]:
    """Every plan that this library can run, as predicted; the planner's choice first."""
    ranking = rank_plans(question, question.topology, Dropped())
    mixed = next(candidate for candidate in ranking if len(candidate.roles) == 1)
    found = [mixed.roles[0].layout]
    for mesh in meshes(question, question.devices, MIXED, Dropped()):
        found += [form for form in forms(question, mesh.layout, MIXED, Dropped()) if not form.prefill_exchange]
    prices = question.prices(question.topology)
    served = {layout: serve_mixed(prices, layout, 1, PROMPTS) for layout in dict.fromkeys(found)}
    return {
        layout: Predicted(
            PROMPTS / each.output_rate, sum(step.seconds - step.of_kind(COMMUNICATION) for step in (each.prefill, each.decode))
        )
        for layout, each in served.items()
    }


def far_apart(predicted: dict[Layout, Predicted], factor: float) -> dict[Layout, Predicted]:
    """The fastest, and then each time the next that takes `factor` times as long as the one before."""
    found: dict[Layout, Predicted] = {}
    for layout, each in sorted(predicted.items(), key=lambda item: item[1].seconds):
        if not found or each.seconds >= factor * max(other.seconds for other in found.values()):
            found[layout] = each
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


def seconds_of(model: Glm5Model, length: int, pace: Pace, new_tokens: int = 2) -> float:
    """A prefill of all prompts, and decode steps for further tokens."""
    asked = prompts(length)
    dist.barrier()
    pace.begin()
    started = time.perf_counter()
    model.generate(asked, max_new_tokens=new_tokens)
    pace.rest()
    return time.perf_counter() - started


def calibrate(group: Group, wires: Wires, pace: Pace, rounds: int) -> dict[str, float]:
    """What `calibrated` takes, on every rank alike; each rank runs the whole model, all at the same time."""
    model = make(Ranks())
    model.generate(prompts(SHORT), max_new_tokens=1)
    found = {
        name: statistics.median(group.slowest([seconds_of(model, length, pace, 1) for _ in range(rounds)]))
        for name, length in (("short", SHORT), ("long", LENGTH))
    }
    members = {"node": partial(neighbours, wires.ranks), "cluster": lambda rank: across(wires, rank)}
    for name, each in members.items():
        if len(each(group.rank)) > 1:
            call = collective_call("all_gather", group.subgroup(each), LATENCY_BYTES, group.device)
            found[name] = group.time(lambda call=call: [call() for _ in range(LATENCY_CALLS)], 0.5) / LATENCY_CALLS
    return {"cluster": found["node"]} | found


def across(wires: Wires, rank: int) -> tuple[int, ...]:
    """One rank of each machine."""
    return tuple(range(rank % wires.ranks, wires.world, wires.ranks))


class Run(NamedTuple):
    """Of a plan, on the slowest ranks: seconds, those in which its stages computed, one after the other, and by which the machine
    was too busy to do so at its speed."""

    seconds: float
    computing: float
    late: float


def run(group: Group, layout: Layout, model: Glm5Model, pace: Pace) -> Run:
    """One run, the same on every rank."""
    seconds = seconds_of(model, LENGTH, pace)
    stage = layout.coordinates(group.rank)["pipeline"]
    computing, late = (
        [spent if other == stage else 0.0 for other in range(layout.pipeline)] for spent in (pace.computing, pace.late)
    )
    longest = group.slowest([seconds, *computing, *late])
    return Run(longest[0], sum(longest[1 : 1 + layout.pipeline]), sum(longest[1 + layout.pipeline :]))


def work(wires: Wires, rounds: int, share: float | None, far: float | None = None) -> dict[str, Any]:
    """Calibrates, plans, runs every plan, or those that are `far` apart; the same result on every rank."""
    group = Group(BACKENDS["cpu"], {"wires": str(wires), "rounds": rounds, "share": share})
    gc.disable()  # it would look at the objects of all plans in the time of one
    with torch.inference_mode(), Pace(share) as pace:
        found = calibrate(group, wires, pace, rounds)
        question = ask(wires, calibrated(wires, found))
        predicted = plans(question) if far is None else far_apart(plans(question), far)
        models = {
            layout: make(PlanRanks(layout, small_config(), node_devices=wires.ranks, device=group.device)) for layout in predicted
        }
        runs = {layout: [run(group, layout, model, pace)] for layout, model in models.items()}
        fastest = min(first.seconds for (first,) in runs.values())
        near = [layout for layout in models if far is not None or runs[layout][0].seconds <= FAR * fastest]
        runs |= {layout: [] for layout in near}
        started, counted = time.perf_counter(), 0
        while counted < rounds and (not counted or group.slowest([time.perf_counter() - started])[0] < ENOUGH):
            for layout in near:
                runs[layout].append(run(group, layout, models[layout], pace))
            counted += 1
    chosen = next(iter(predicted))
    return {
        "wires": str(wires),
        "rounds": counted,
        "calibration": found,
        "chosen": str(chosen),
        "links": share_of_links(question, chosen),
        "plans": {
            str(layout): {
                "predicted": predicted[layout]._asdict(),
                "measured": Run(*map(statistics.median, zip(*runs[layout], strict=True)))._asdict(),
                "all": [each.seconds for each in runs[layout]],
            }
            for layout in predicted
        },
    }


# --- the table ---------------------------------------------------------------------------------------------------------------


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The planner's choice against the fastest plan."""
    measured = {name: each["measured"]["seconds"] for name, each in report["plans"].items()}
    fastest = min(measured, key=lambda name: measured[name])
    order = sorted(measured, key=lambda name: measured[name])
    return {
        "wires": report["wires"],
        "rounds": report["rounds"],
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
    latency = ", ".join(f"{found[name] * 1e3:.2f} ms {name}" for name in ("node", "cluster"))
    lines = [f"{report['wires']}; latency {latency}; whole model {found['long'] * 1e3:.0f} ms on each rank"]
    lines.append(f"  {'':<40} {'predicted':>9}, computing   {'measured':>9}, computing,   late")
    for name, each in sorted(report["plans"].items(), key=lambda item: float(item[1]["measured"]["seconds"])):
        mark = "  <- chosen" if name == report["chosen"] else ""
        first, then = each["predicted"], each["measured"]
        times = f"{first['seconds']:7.3f} s, {first['computing']:7.3f} s   {then['seconds']:7.3f} s, {then['computing']:7.3f} s"
        lines.append(f"  {name:<40} {times}, {then['late']:.3f} s{mark}")
    return "\n".join(lines)


def row(found: dict[str, Any]) -> str:
    """A line of the table of docs/performance.md."""
    chosen, fastest = (f"{found[name]}: {found[name + '_seconds']:.2f} s" for name in ("chosen", "fastest"))
    cells = (
        found["wires"],
        str(found["rounds"]),
        str(found["plans"]),
        f"{found['links']:.0%}",
        chosen,
        fastest,
        f"{found['slowest_seconds']:.2f} s",
    )
    return f"| {' | '.join(cells)} | {found['regret']:.0%} |"


def measure(number: int, rounds: int, *, share: float | None = SHARE, far: float | None = None) -> dict[str, Any]:
    """One setting, on emulated links.

    Args:
        number: of `SETTINGS`.
        rounds: in which every plan runs and counts.
        share: speed of each rank, of a core; None: what the others leave.
        far: only plans that are so many times apart, as predicted; None: all.

    Raises:
        NotPermitted: no links can be emulated here.
    """
    command = [sys.executable, "-m", "benchmarks.parallel.regret", "--worker", "--setting", str(number), "--rounds", str(rounds)]
    command += [] if far is None else ["--far", str(far)]
    command += [] if share is None else ["--share", str(share)]
    with Cluster(SETTINGS[number]) as cluster:
        return dict(json.loads(cluster.run(command, environment=KEEP, timeout=290)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--setting", type=int, action="append", choices=range(len(SETTINGS)), help="only this one; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--far", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers = range(len(SETTINGS)) if arguments.setting is None else arguments.setting
    if arguments.worker:
        report = work(SETTINGS[numbers[0]], arguments.rounds, arguments.share, arguments.far)
        if os.environ["RANK"] == "0":
            print(json.dumps(report))
        return
    try:
        reports = [measure(number, arguments.rounds) for number in numbers]
    except NotPermitted as error:
        print(f"regret needs namespaces with limited links: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps([report | {"summary": summary(report)} for report in reports], indent=2))
        return
    print("\n".join(show(report) for report in reports))
    print("\n| links | rounds | plans | links' share | chosen | fastest | slowest | regret |")
    print("|---|---:|---:|---:|---|---|---:|---:|")
    print("\n".join(row(summary(report)) for report in reports))


if __name__ == "__main__":
    main()
