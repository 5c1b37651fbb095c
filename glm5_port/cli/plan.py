"""`glm5-port plan`: which parallel layout suits given chips and wires, why, what it costs, and the commands that start it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_port.cli.output import print_json, print_table, print_text

if TYPE_CHECKING:
    from glm5_port.parallel.planner import Answer, Flip
    from glm5_port.parallel.search import Candidate, Question

SHOWN = 5
"""Plans and differences that are listed."""


def plan(
    model: Annotated[str, typer.Option("--model", metavar="M", help="GLM-5, GLM-5.1, GLM-5.2, GLM-5.3, or a checkpoint's path.")],
    hardware: Annotated[str, typer.Option("--hardware", metavar="H", help="A topology, a chip, or your own YAML file.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of a prompt.")] = 4096,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Tokens of an answer.")] = 1024,
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests at the same time.")] = None,
    tpot_ms: Annotated[float | None, typer.Option("--tpot-ms", min=0.01, help="Target: milliseconds for each token.")] = None,
    ttft_ms: Annotated[float | None, typer.Option("--ttft-ms", min=0.01, help="Target: milliseconds to the first token.")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="w4a8, fp8, bf16 or int4. Default: what suits the chip.")
    ] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="Cache: plain, fp8 or int8. Default: fp8 where weights are.")] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens of a prompt that are computed at once.")] = 8192,
    engine: Annotated[
        str, typer.Option("--engine", help="Only what this one can run: vllm, sglang, vllm-ascend, torchrun; or any.")
    ] = "any",
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Fix the tensor group.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", min=1, help="Fix the number of attention groups.")] = None,
    ep: Annotated[int | None, typer.Option("--ep", min=1, help="Fix the number of expert groups.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Fix the number of stages.")] = None,
    drafts: Annotated[int | None, typer.Option("--mtp", min=0, help="Fix the drafts of the MTP layer; 0 for none.")] = None,
    emit: Annotated[str | None, typer.Option("--emit", metavar="ENGINE", help="Also the commands for this engine.")] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the plan as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw costs and flips: .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Find the parallel layout for given chips, wires and requests; say why, what it costs, and what would change it."""
    from glm5_port.parallel.planner import ask
    from glm5_port.parallel.search import Pins

    pins = Pins(tensor=tp, data=dp, expert=ep, pipeline=pp, drafts=drafts)
    work = (input_tokens, output_tokens, chunk)
    targets = (None if tpot_ms is None else tpot_ms / 1e3, None if ttft_ms is None else ttft_ms / 1e3)
    asked = question(model, hardware, nodes, work, concurrency, targets, (weights, kv), emit if emit else engine, pins)
    answer = ask(asked, model=model)
    commands = _commands(answer, emit)
    if save is not None:
        answer.plan.save(save)
    if plot is not None:
        from glm5_port.parallel.plots import draw

        draw(answer, plot)
    if as_json:
        print_json(describe(answer) | ({"commands": commands} if emit else {}))
    else:
        _print(answer)
        _print_commands(commands, emit)


def question(
    model: str,
    hardware: str,
    nodes: int,
    work: tuple[int, int, int],
    concurrency: int | None,
    targets: tuple[float | None, float | None],
    kinds: tuple[str | None, str | None],
    engine: str,
    pins: Any,
) -> Question:
    """What the command line asks, with defaults that suit the chip.

    Args:
        model: a release, or the path of a checkpoint or config.json.
        hardware: a topology, a chip or a file.
        nodes: machines.
        work: tokens of a prompt, of an answer, and computed at once.
        concurrency: requests at the same time, or None.
        targets: (TPOT, TTFT) in seconds, or None.
        kinds: (weights, format of the cache), or None.
        engine: "any" or one engine.
        pins: fixed sizes.
    """
    from glm5_port.config import Glm5Config, released
    from glm5_port.parallel.cost.service import Workload
    from glm5_port.parallel.engines import ANY_ENGINE, find_engine, serving_engines
    from glm5_port.parallel.search import Question
    from glm5_port.parallel.topology import find_hardware

    config = Glm5Config.from_json(model) if Path(model).exists() else released(model)
    topology = find_hardware(hardware)
    native = topology.chip.native("fp8")
    weights = kinds[0] or ("w4a8" if topology.chip.backend == "npu" else "fp8" if native else "int4")
    kv_format = kinds[1] or ("fp8" if native and topology.chip.backend != "npu" else "plain")
    return Question(
        config=config,
        topology=topology,
        devices=nodes * topology.node_devices,
        weights=weights,
        kv_format=kv_format,
        work=Workload(*work),
        concurrency=concurrency,
        tpot=targets[0],
        ttft=targets[1],
        engines=tuple(serving_engines(topology)) if engine == ANY_ENGINE else (find_engine(engine),),
        pins=pins,
    )


def _commands(answer: Answer, engine: str | None) -> list[dict[str, Any]]:
    if engine is None:
        return []
    from glm5_port.parallel.recipes import emit

    found = emit(answer.plan, answer.question.topology, answer.question.config, engine)
    return [{"node": each.node, "role": each.role, "replica": each.replica, "command": each.text()} for each in found]


# --- JSON --------------------------------------------------------------------------------------------------------------------


def describe(answer: Answer) -> dict[str, Any]:
    """What `plan --json` prints, as plain data."""
    from glm5_port.parallel.engines import TORCHRUN
    from glm5_port.parallel.planner import BAND

    asked = answer.question
    return {
        "plan": answer.plan.as_dict(),
        "runs_on": {name: {"can": not reasons, "reasons": reasons} for name, reasons in answer.engines.items()},
        "this_project": {"can": not answer.engines[TORCHRUN], "reasons": answer.engines[TORCHRUN]},
        "calibrated": answer.calibrated,
        "band": None if answer.calibrated else {"measured_over_estimated": list(BAND)},
        "ranking": [_candidate(answer, candidate) for candidate in answer.ranking[:SHOWN]],
        "prefill": answer.best.served.prefill.as_dict(),
        "decode": answer.best.served.decode.as_dict(),
        "memory": [
            {
                "role": role.name,
                "stage": memory.stage,
                "capacity": memory.capacity,
                "weights": memory.weights,
                "buffers": memory.buffers,
                "runtime": memory.runtime,
                "cache": memory.pool,
                "cache_bytes_per_token": memory.cache_per_token,
                "cache_tokens": memory.tokens(),
            }
            for role, memory in zip(answer.best.roles, answer.best.memory, strict=True)
        ],
        "runner_up_takes_longer_by": [{"part": name, "seconds": seconds} for name, seconds in answer.why],
        "flips": [
            {
                "level": flip.level,
                "bandwidth": flip.bandwidth,
                "towards": "faster" if flip.faster else "slower",
                "at": flip.at,
                "winner": None if flip.winner is None else _roles(flip.winner),
            }
            for flip in answer.flips
        ],
        "left_out": {
            "short_of_memory": answer.dropped.short,
            "refused_by_engines": answer.dropped.refused,
            "impossible": answer.dropped.impossible,
        },
        "figures": {
            name: {"value": figure.value, "source": figure.source, "confidence": figure.confidence}
            for name, figure in asked.topology.chip.figures().items()
        },
    }


def _candidate(answer: Answer, candidate: Candidate) -> dict[str, Any]:
    served = candidate.served
    return {
        "layout": _roles(candidate),
        "relative_rate": served.output_rate / answer.best.served.output_rate,
        "output_tokens_per_second": served.output_rate,
        "tpot": served.tpot,
        "ttft": served.ttft,
        "concurrency": served.concurrency,
    }


def _roles(candidate: Candidate) -> str:
    """A deployment in one line: "2 x TP8" or "prefill 1 x CP8; decode 1 x DP8, EP8"."""
    return "; ".join(
        f"{role.name + ' ' if len(candidate.roles) > 1 else ''}{role.replicas} x ({role.layout})" for role in candidate.roles
    )


# --- text --------------------------------------------------------------------------------------------------------------------


def _print(answer: Answer) -> None:
    from glm5_port.parallel.quantities import show_seconds
    from glm5_port.quant.sizes import show_bytes

    asked, best = answer.question, answer.best
    chip = asked.topology.chip
    print_text(f"{answer.plan.model}, weights {asked.weights}, cache {asked.kv_format}, on {asked.devices} x {chip.title}")
    print_text(f"  {asked.topology.title}")
    print_text(f"\nplan: {_roles(best)}")
    for role, memory in zip(best.roles, best.memory, strict=True):
        free = (
            f"{show_bytes(memory.weights)} of weights a device, room for {memory.tokens():,} cached tokens of an attention group"
        )
        print_text(f"  {role.name}: {free}")
    for name, reasons in answer.engines.items():
        print_text(f"  {name}: {'can run it' if not reasons else 'cannot: ' + reasons[0]}")
    _print_band(answer)
    print_text()
    rows = [
        [
            _roles(each),
            f"{each.served.output_rate / best.served.output_rate:.2f}",
            show_seconds(each.served.tpot),
            show_seconds(each.served.ttft),
            str(each.served.concurrency),
        ]
        for each in answer.ranking[:SHOWN]
    ]
    print_table(["layout", "relative rate", "TPOT", "TTFT", "at once"], rows, title="ranking")
    for phase, breakdown in (("prefill of a prompt", best.served.prefill), ("decode step", best.served.decode)):
        terms = [
            [
                name,
                kind,
                show_seconds(cost.seconds) if cost.seconds > 0 else f"-{show_seconds(-cost.seconds)}",
                f"{cost.seconds / breakdown.seconds:.0%}",
                show_bytes(int(cost.link_bytes)) if cost.link_bytes else "",
            ]
            for name, kind, cost in breakdown
        ]
        print_text()
        print_table(
            ["term", "kind", "time", "share", "sent by a device"], terms, title=f"{phase}: {show_seconds(breakdown.seconds)}"
        )
    if answer.why:
        print_text(f"\nwhy not {_roles(answer.ranking[1])}: for a request it takes")
        for name, seconds in answer.why[:SHOWN]:
            print_text(f"  {show_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} in {name}")
    _print_left_out(answer)
    if answer.flips:
        print_text("\nwhat would change the choice")
        for flip in answer.flips:
            print_text(f"  {_flip(flip)}")


def _print_band(answer: Answer) -> None:
    from glm5_port.parallel.planner import BAND

    served = answer.best.served
    estimate = f"about {served.output_rate:,.0f} tokens/s for the deployment"
    if answer.calibrated:
        print_text(f"  {estimate}, on links that were measured here")
        return
    low, high = (served.output_rate * factor for factor in (1 / BAND[1], 1 / BAND[0]))
    print_text("  Nothing here is calibrated: trust the ranking and the ratios. Absolute figures are estimates:")
    print_text(f"  {estimate}, between {low:,.0f} and {high:,.0f} by what published measurements were off")
    unsure = [name for name, figure in answer.question.topology.chip.figures().items() if figure.confidence == "unsure"]
    if unsure:
        print_text(f"  figures of the chip without a primary source: {', '.join(unsure)}")


def _print_left_out(answer: Answer) -> None:
    from glm5_port.quant.sizes import show_bytes

    dropped = answer.dropped
    print_text("\nleft out")
    for layout, missing in sorted(dropped.short.items(), key=lambda each: each[1])[:SHOWN]:
        print_text(f"  {layout}: lacks {show_bytes(missing)} a device")
    if len(dropped.short) > SHOWN:
        print_text(f"  and {len(dropped.short) - SHOWN} more that lack more memory")
    for reason, times in sorted(dropped.refused.items(), key=lambda each: -each[1])[:SHOWN]:
        print_text(f"  {reason} ({times} forms)")


def _flip(flip: Flip) -> str:
    from glm5_port.parallel.quantities import show_bandwidth

    here = f"{flip.level} links ({show_bandwidth(flip.bandwidth)} a device)"
    way = "faster" if flip.faster else "slower"
    if flip.at is None or flip.winner is None:
        return f"{here}: nothing, up to 64 times {way}"
    return f"{here}: at {show_bandwidth(flip.at)}, {way}, {_roles(flip.winner)} wins"


def _print_commands(commands: list[dict[str, Any]], engine: str | None) -> None:
    if engine is None:
        return
    own = ", and $PLAN (what --save wrote), $CHECKPOINT and $PROMPT" if engine == "torchrun" else ""
    print_text(f"\n{engine}: set $NODE0, $NODE1, ... and $NIC{own}, then on each machine")
    for each in commands:
        print_text(f"# machine {each['node']}, {each['role']}, replica {each['replica']}\n{each['command']}")
