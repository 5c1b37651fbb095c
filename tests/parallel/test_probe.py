"""The probe's arithmetic and files: lines through two sizes, what is refused, and that the planner reads what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glm5_port.errors import HardwareError
from glm5_port.parallel.cost.collectives import all_gather, all_reduce, send
from glm5_port.parallel.hardware import MEASURED, UNSURE, find_chip, read_chip
from glm5_port.parallel.probe import (
    Links,
    Measured,
    check_agreement,
    check_environment,
    composition,
    fit,
    fit_level,
    form,
    smaller_groups,
    steps,
)
from glm5_port.parallel.probe_file import write_files
from glm5_port.parallel.topology import BY_LEVEL, COLLECTIVES, ONE_RING, find_hardware
from tests.parallel.questions import best, question

SIZES = (65_536, 4_194_304)
RATES = {"all_reduce": 4e8, "all_gather": 5e8, "reduce_scatter": 3e8, "all_to_all": 2.5e8, "send": 5e8}


def line(collective: str, ranks: int, size: int, latency: float, rate: float) -> float:
    rounds, share = form(collective, ranks)
    return rounds * latency + share * size / rate


def links(name: str, ranks: int, latency: float, scale: float = 1.0) -> Links:
    """Measurements that lie exactly on lines."""
    seconds = {
        each: (line(each, ranks, SIZES[0], latency, rate * scale), line(each, ranks, SIZES[1], latency, rate * scale))
        for each, rate in RATES.items()
    }
    return Links(name, ranks, SIZES, seconds, *fit_level(ranks, SIZES, seconds))


def measured(**changes) -> Measured:
    found = Measured(
        backend="cpu",
        library="gloo",
        device='A "fast" CPU',
        machines=2,
        ranks=4,
        memory=64 * 2**30,
        matmul=3e12,
        memory_bandwidth=4e10,
        links=(replace(links("node", 4, 20e-6), by_group={2: 6e8}), links("cluster", 2, 80e-6, 0.05)),
        collectives=ONE_RING,
    )
    return replace(found, **changes)


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_fit_finds_the_line(collective: str) -> None:
    seconds = (line(collective, 4, SIZES[0], 3e-4, 2e8), line(collective, 4, SIZES[1], 3e-4, 2e8))
    assert fit(collective, 4, SIZES, seconds) == pytest.approx((3e-4, 2e8))


def test_a_small_message_that_is_no_slower_a_byte_has_no_latency() -> None:
    latency, bandwidth = fit("send", 2, (1000, 4000), (1e-3, 8e-3))
    assert (latency, bandwidth) == (0, 4000 / 8e-3)


def test_a_large_message_that_was_faster_than_the_small_one_leaves_a_bandwidth() -> None:
    latency, bandwidth = fit("all_reduce", 2, (1000, 4000), (8e-3, 2e-3))
    assert latency > 0
    assert bandwidth == pytest.approx(4000 / (0.1 * 2e-3))
    _, bandwidths = fit_level(2, (1000, 4000), {"all_reduce": (8e-3, 2e-3), "send": (1e-3, 2e-3)})
    assert min(bandwidths.values()) > 0


def test_a_level_has_one_latency_and_large_messages_stay_exact() -> None:
    seconds = {"all_gather": (2e-3, 20e-3), "all_to_all": (4e-3, 40e-3), "send": (1e-3, 30e-3)}
    latency, bandwidth = fit_level(4, SIZES, seconds)
    for name, (_, large) in seconds.items():
        assert line(name, 4, SIZES[1], latency, bandwidth[name]) == pytest.approx(large)


def test_collectives_over_both_levels_are_told_apart() -> None:
    inside, between = links("node", 4, 0.0), links("cluster", 2, 0.0, 0.05)
    by_level = 2 * (3 / 4 * SIZES[1] / 4e8 + 1 / 2 * SIZES[1] / 4 / (4e8 * 0.05))
    ring = 2 * 7 / 8 * SIZES[1] / (4e8 * 0.05 * 4)
    assert composition(inside, between, SIZES[1], by_level) == BY_LEVEL
    assert composition(inside, between, SIZES[1], ring) == ONE_RING


def test_the_number_of_steps() -> None:
    assert smaller_groups(8) == [2, 4]
    assert smaller_groups(2) == []
    assert steps(ranks=8, machines=2) == 2 + 20 + 2 + 1
    assert steps(ranks=1, machines=2) == 2 + 10


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_planner_reads_the_files_and_prices_what_was_measured(tmp_path: Path) -> None:
    topology_file, chip_file = write_files(measured(), None, tmp_path / "mine.yaml")
    topology = find_hardware(str(topology_file))
    assert (topology.calibrated, topology.node_devices, topology.collectives) == (True, 4, ONE_RING)
    for level, found in zip(topology.levels, measured().links, strict=True):
        assert level.confidence == MEASURED
        assert "measured by probe: gloo, 2 x 4 ranks" in level.source
        for name in COLLECTIVES:
            assert level.rate(found.ranks, name) == pytest.approx(RATES[name] * (1 if found.ranks == 4 else 0.05), rel=1e-3)
    node = topology.levels[0]
    assert node.rate(2, "all_reduce") == pytest.approx(6e8, rel=1e-3)  # a smaller group was measured by its all-reduce
    size = SIZES[1]
    assert all_reduce(topology, (4, 1), size).seconds == pytest.approx(measured().links[0].seconds["all_reduce"][1], rel=1e-3)
    assert all_gather(topology, (1, 2), size).seconds == pytest.approx(measured().links[1].seconds["all_gather"][1], rel=1e-3)
    assert send(topology, 4, size).seconds == pytest.approx(measured().links[1].seconds["send"][1], rel=1e-3)
    chip = read_chip(chip_file)
    assert (chip.title, chip.memory.value, chip.peak("bf16")) == ('A "fast" CPU', 64 * 2**30, 3e12)
    assert chip.efficiency["dense"].value == 1
    assert chip.layer_overhead.confidence == UNSURE


def test_a_plan_over_a_probed_topology(tmp_path: Path) -> None:
    """With room for GLM-5, the file of a probe gives a plan like any other."""
    topology_file, _ = write_files(measured(memory=2**40), None, tmp_path / "mine.yaml")
    asked = question(
        "hgx-h200", topology=find_hardware(str(topology_file)), devices=8, weights="int4", kv_format="plain", engine="torchrun"
    )
    assert best(asked).served.output_rate > 0


def test_a_known_chip_keeps_its_figures_and_gets_measured_shares(tmp_path: Path) -> None:
    known = find_chip("xeon-4")
    _, chip_file = write_files(measured(matmul=7e12, memory_bandwidth=2e11), known, tmp_path / "mine.yaml")
    chip = read_chip(chip_file)
    assert (chip.peak("bf16"), chip.peak("int8"), chip.title) == (known.peak("bf16"), known.peak("int8"), known.title)
    assert chip.efficiency["dense"].value == pytest.approx(7 / 21, rel=1e-3)
    assert chip.efficiency["memory"].value == pytest.approx(200 / 307, rel=1e-3)
    assert chip.efficiency["grouped"].value == pytest.approx(0.8 / 0.9 * 7 / 21, rel=1e-3)  # scaled with the product
    assert chip.efficiency["grouped"].confidence == UNSURE


def test_what_was_not_measured_is_unsure(tmp_path: Path) -> None:
    found = measured(machines=1, links=(links("node", 4, 20e-6),), collectives=BY_LEVEL)
    topology = find_hardware(str(write_files(found, None, tmp_path / "mine.yaml")[0]))
    assert [level.confidence for level in topology.levels] == [MEASURED, UNSURE]
    assert "not measured" in topology.levels[1].source


def test_a_chip_that_this_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"dense was measured at 1\.\d+ of its peak; which chip is this"):
        write_files(measured(matmul=30e12), find_chip("xeon-4"), tmp_path / "mine.yaml")
    with pytest.raises(HardwareError, match="it runs on cuda, and this is cpu"):
        write_files(measured(), find_chip("h200"), tmp_path / "mine.yaml")
    assert not list(tmp_path.iterdir())


# -- what is refused ---------------------------------------------------------------------------------------------------

RANK = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_outside_torchrun_and_with_one_rank() -> None:
    with pytest.raises(HardwareError, match=r"RANK, .*MASTER_PORT not set\n  Start it on every machine: torchrun "):
        check_environment({})
    with pytest.raises(HardwareError, match="WORLD_SIZE = 1"):
        check_environment(RANK | {"WORLD_SIZE": "1"})
    check_environment(RANK | {"WORLD_SIZE": "2"})


def facts(world: int, ranks: int, **changes) -> list[dict]:
    return [
        {"place": [rank // ranks, rank % ranks], "ranks of a machine": ranks, "device": "chip", **changes}
        for rank in range(world)
    ]


def test_ranks_that_disagree_are_named() -> None:
    check_agreement(facts(8, 4))
    mixed = facts(8, 4)
    mixed[5]["device"] = "another"
    with pytest.raises(HardwareError, match="ranks disagree: device is chip on rank 0 and another on rank 5"):
        check_agreement(mixed)
    with pytest.raises(HardwareError, match="do not count machine by machine, 4 each: rank 5"):
        check_agreement(facts(6, 4))
    shuffled = facts(4, 2)
    shuffled[1]["place"], shuffled[2]["place"] = shuffled[2]["place"], shuffled[1]["place"]
    with pytest.raises(HardwareError, match="rank 1 is elsewhere"):
        check_agreement(shuffled)
