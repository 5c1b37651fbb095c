"""What emulates weak hardware: a constant speed of each rank, bursts of a link, and what a benchmark makes of its runs."""

from __future__ import annotations

import itertools
import types

import pytest

from benchmarks.parallel import processor, regret
from benchmarks.parallel.links import FRAME, PAUSE, Wires, burst
from benchmarks.parallel.processor import Pace
from glm5_port import collectives
from glm5_port.parallel.cost.terms import COMMUNICATION
from glm5_port.parallel.plan import Layout


class Clock:
    """A clock and a processor that move when they are told to."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        self.oversleeps = 0.0
        self.slept: list[float] = []

    def work(self, processor_seconds: float, seconds: float) -> None:
        self.worked += processor_seconds
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.oversleeps


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    fake = types.SimpleNamespace(perf_counter=lambda: found.now, thread_time=lambda: found.worked, sleep=found.sleep)
    monkeypatch.setattr(processor, "time", fake)
    return found


def test_what_is_computed_takes_its_processor_time_over_the_share(clock: Clock) -> None:
    with Pace(0.4) as pace:
        clock.work(0.010, 0.012)
        with collectives.answered("send", "pipeline"):
            assert clock.slept == [pytest.approx(0.013)]  # 25 ms in all
            clock.work(0.003, 0.5)  # an exchange is not slowed
        clock.work(0.002, 0.002)
        pace.rest()
    assert clock.slept == pytest.approx([0.013, 0.003])
    assert pace.computing == pytest.approx(0.030)
    assert pace.late == 0


def test_time_that_others_took_is_told_and_not_rested_again(clock: Clock) -> None:
    with Pace(0.5) as pace:
        clock.work(0.010, 0.050)
        pace.rest()
        clock.oversleeps = 0.001
        clock.work(0.010, 0.010)
        pace.rest()
        clock.work(0.010, 0.010)
        pace.rest()
        assert (pace.late, clock.slept) == (pytest.approx(0.030), pytest.approx([0.010, 0.009]))
        assert pace.computing == pytest.approx(0.050 + 0.021 + 0.020)
        pace.begin()
        assert (pace.computing, pace.late) == (0, 0)


def test_an_exchange_is_slowed_only_within_the_context(clock: Clock) -> None:
    before = collectives.answered
    with Pace(0.1):
        assert collectives.answered is not before
    assert collectives.answered is before


def test_without_a_share_nothing_rests(clock: Clock) -> None:
    with Pace(None) as pace:
        clock.work(0.010, 0.012)
        pace.rest()
    assert (clock.slept, pace.computing, pace.late) == ([], pytest.approx(0.012), 0)


def test_a_burst_is_half_a_millisecond_and_two_frames_at_the_least() -> None:
    assert burst("20 Mb/s") == 2 * FRAME
    assert burst("1 Gb/s") == int(125e6 * PAUSE)


WIRES = Wires(machines=2, ranks=2, between="40 Mb/s", inside="200 Mb/s")


def test_what_a_plan_computes_and_sends_is_the_whole_of_what_is_predicted() -> None:
    question = regret.ask(WIRES, regret.calibrated(WIRES, {"node": 1e-3, "cluster": 2e-3, "short": 0.02, "long": 0.1}))
    assert [level.latency for level in question.topology.levels] == [1e-3, 2e-3]
    found = regret.plans(question)
    prices = question.prices(question.topology)
    for layout, each in found.items():
        groups = regret.PROMPTS // layout.data
        steps = prices.prefill(layout, layout.data, groups), prices.decode(layout, groups, layout.data)
        assert each.computing + sum(step.of_kind(COMMUNICATION) for step in steps) == pytest.approx(each.seconds), layout
    assert found[Layout(pipeline=4)].computing == pytest.approx(0.1 + 0.02, rel=0.2)
    apart = list(regret.far_apart(found, 2.0).values())
    assert all(slower.seconds >= 2 * faster.seconds for faster, slower in itertools.pairwise(apart))


def test_regret_is_the_choice_over_the_fastest() -> None:
    def plan(seconds: float) -> dict[str, dict[str, float]]:
        return {"measured": {"seconds": seconds, "computing": 0.1, "late": 0.0}}

    report = {"wires": "w", "rounds": 3, "chosen": "A", "links": 0.5, "plans": {"A": plan(0.55), "B": plan(0.5), "C": plan(2.0)}}
    found = regret.summary(report)
    assert (found["fastest"], found["regret"], found["slowest_seconds"]) == ("B", pytest.approx(0.1), 2.0)
    assert regret.row(found) == "| w | 3 | 3 | 50% | A: 0.55 s | B: 0.50 s | 2.00 s | 10% |"
