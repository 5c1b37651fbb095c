"""Chips and topologies: every packaged file reads, units and keys are strict, and groups get what their shape gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm5_port.backends import BUILT_IN
from glm5_port.errors import HardwareError
from glm5_port.parallel.hardware import DATA, UNKNOWN, chip_names, find_chip, read_chip
from glm5_port.parallel.quantities import parse_quantity
from glm5_port.parallel.topology import find_hardware, read_topology, topology_names
from glm5_port.registry import BACKENDS

PROMISED_CHIPS = [
    "h100",
    "h800",
    "h200",
    "h20-96",
    "h20-141",
    "b200",
    "a100-80",
    "l40s",
    "rtx4090",
    "rtx5090",
    "mi300x",
    "ascend-910b1",
    "ascend-910b3",
    "ascend-910c",
    "ascend-950pr",
    "mtt-s4000",
    "mtt-s5000",
    "hygon-k100-ai",
    "hygon-bw1000",
    "cambricon-mlu370-x8",
    "cambricon-mlu590",
    "kunlunxin-p800",
    "metax-c500",
    "metax-c550",
    "iluvatar-bi-v150",
    "enflame-s60",
    "xeon-4",
    "xeon-6",
    "epyc-genoa",
    "epyc-turin",
]
CHIP = (DATA / "chips" / "h200.yaml").read_text()
TOPOLOGY = (DATA / "topologies" / "hgx-h200.yaml").read_text()


@pytest.mark.parametrize("name", chip_names())
def test_every_figure_of_a_chip_has_a_source(name: str) -> None:
    chip = find_chip(name)
    assert chip.backend in BUILT_IN and chip.backend in BACKENDS
    for figure in chip.figures().values():
        assert figure.source
        assert (figure.value is None) == (figure.confidence == UNKNOWN)


@pytest.mark.parametrize("name", topology_names())
def test_every_topology_reads_and_ends_open(name: str) -> None:
    topology = find_hardware(name)
    assert topology.levels[-1].devices == 0
    assert all(level.source and level.bandwidth > 0 and level.latency > 0 for level in topology.levels)


def test_every_promised_chip_is_there_and_in_a_topology() -> None:
    assert set(PROMISED_CHIPS) <= set(chip_names())
    used = {find_hardware(name).chip.name for name in topology_names()}
    assert set(PROMISED_CHIPS) - used <= {"ascend-910b1"}  # wired as the 910B3


def test_an_unpublished_figure_is_named_not_guessed() -> None:
    assert find_chip("h200").missing() == []
    (bandwidth, matmul) = find_chip("hygon-bw1000").missing()
    assert "memory_bandwidth of hygon-bw1000 is unknown: no vendor figure" in bandwidth
    assert "matmul bf16" in matmul


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("200 GB/s", "bandwidth", 200e9),
        ("200 Gb/s", "bandwidth", 25e9),
        ("1 GiB/s", "bandwidth", 2**30),
        ("64 GB", "size", 64e9),
        ("139.8 GiB", "size", 139.8 * 2**30),
        ("25 us", "time", 25e-6),
        ("989 TFLOPS", "rate", 989e12),
        ("35 TOPS", "rate", 35e12),
    ],
)
def test_quantities(text: str, kind: str, value: float) -> None:
    assert parse_quantity(text, kind) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("200", "bandwidth", "has no unit"),
        ("200 GB", "bandwidth", "'GB' is no unit of a bandwidth"),
        ("fast", "bandwidth", "is no bandwidth"),
        ("-1 GB", "size", "is no size"),
        ("0 us", "time", "not above zero"),
        ("1 gb/s", "bandwidth", "no unit of a bandwidth"),
    ],
)
def test_quantities_that_are_refused(text: str, kind: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        parse_quantity(text, kind)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 4800 GB/s", "value: 4800", "memory_bandwidth|value: '4800' has no unit"),
        ("backend: cuda", "backend: cudda", "did you mean cuda"),
        ("confidence: datasheet", "confidence: sure", "confidence = 'sure'"),
        ("generation: hopper", "generations: hopper", "lacks 'generation'"),
        ("  bf16:", "  bf61:", "lacks 'bf16'"),
        ("  fp8:", "  fp9:", "has no key 'fp9'; did you mean fp8"),
        ("name: h200", "name: h201", "one name for both"),
        ("int4_matmul: no", "int4_matmul: maybe", "int4_matmul = 'maybe'"),
        ("title: ", "vendors: x\ntitle: ", "has no key 'vendors'"),
        ("title: ", "title: twice\ntitle: ", "'title' twice"),
    ],
)
def test_a_chip_file_is_read_strictly_and_names_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CHIP
    (tmp_path / "h200.yaml").write_text(CHIP.replace(old, new, 1))
    with pytest.raises(HardwareError, match=message) as caught:
        read_chip(tmp_path / "h200.yaml")
    assert re.search(r"h200\.yaml, line \d+: ", str(caught.value))


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ("bandwidth: 450 GB/s", "bandwidth: 450", "bandwidth: 450", "has no unit"),
        ("latency: 10 us", "latency: 10", "latency: 10", "has no unit"),
        ("devices: any", "devices: 64", "devices: 64", "the last level, and only it"),
        ("devices: 8", "devices: any", "devices: any", "the last level, and only it"),
        ("devices: 8", "devices: 0", "devices: 0", "is no positive integer"),
        ("shape: switch", "shape: torus", "shape: torus", "shape = 'torus'"),
        ("  - name: cluster", "  - name: node", "name: node", "two levels are called 'node'"),
        ("latency: 20 us", "latency: 20 us\n    lanes: 4", "lanes", "has no key 'lanes'"),
        ("all_reduce: 0.82", "all_reduce: 1.82", "all_reduce: 1.82", "no share above 0 and at most 1"),
        ("chip: h200", "chip: h2000", "", "is no chip known here; did you mean h200"),
        ("    source: ", "    by_group: {16: 5 GB/s}\n    source: ", "by_group", "by_group has a group of 16"),
        (
            "bandwidth: 50 GB/s",
            "bandwidth: 50 GB/s\n    nic_shared_by: 3",
            "nic_shared_by",
            "3 devices share a NIC, but units of .* 8",
        ),
        (
            "chip: h200",
            "chip: h200\ncollectives: tree",
            "collectives: tree",
            "collectives = 'tree'; known are by_level, one_ring",
        ),
    ],
)
def test_a_topology_is_read_strictly_and_names_the_line(tmp_path: Path, old: str, new: str, at: str, message: str) -> None:
    assert old in TOPOLOGY
    text = TOPOLOGY.replace(old, new, 1)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(HardwareError, match=message) as caught:
        read_topology(tmp_path / "own.yaml")
    if at and "two levels" not in message:
        assert f"own.yaml, line {line_of(text, at)}: " in str(caught.value)


def test_levels_that_do_not_nest_are_refused(tmp_path: Path) -> None:
    inner, outer = TOPOLOGY.split("  - name: cluster")
    middle = inner[inner.index("  - name: node") :].replace("name: node", "name: rack").replace("devices: 8", "devices: 12")
    (tmp_path / "own.yaml").write_text(f"{inner}{middle}  - name: cluster{outer}")
    with pytest.raises(HardwareError, match="has 12 devices, which units of 8 do not fill"):
        read_topology(tmp_path / "own.yaml")


def test_a_users_topology_and_chip_lie_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "mychip.yaml").write_text(CHIP.replace("name: h200", "name: mychip"))
    (tmp_path / "own.yaml").write_text(TOPOLOGY.replace("chip: h200", "chip: mychip"))
    assert find_hardware(str(tmp_path / "own.yaml")).chip.name == "mychip"


def test_finding_hardware() -> None:
    assert find_hardware("h200").name == "hgx-h200"  # the only topology of the chip
    with pytest.raises(HardwareError, match="topologies with it: atlas-800-a3, cloudmatrix384"):
        find_hardware("ascend-910c")
    with pytest.raises(HardwareError, match="did you mean hgx-h200"):
        find_hardware("hgx-h20")


def test_a_mesh_gives_small_groups_one_link() -> None:
    """On an A2 node a pair has one of seven links: the trap of TP2 and TP4 there."""
    node = find_hardware("atlas-800-a2").levels[0]
    full = node.rate(8, "all_gather")
    assert node.rate(2, "all_gather") == pytest.approx(full / 7)
    assert node.rate(4, "all_gather") == pytest.approx(full * 3 / 7)
    switch = find_hardware("hgx-h200").levels[0]
    assert switch.rate(2, "all_gather") == switch.rate(8, "all_gather")


def test_measured_rates_by_group_count_instead_of_the_shape() -> None:
    node = find_hardware("pcie-l40s").levels[0]
    assert [node.rate(size, "all_reduce") / 1e9 for size in (2, 4, 8)] == [20, 5, 2]
    assert node.rate(6, "all_reduce") == node.rate(4, "all_reduce")


def test_nics_are_shared() -> None:
    assert find_hardware("hygon-bw1000-8").levels[-1].bandwidth == 25e9  # 50 GB/s for two devices


def test_groups_on_levels() -> None:
    cloud = find_hardware("cloudmatrix384")
    assert cloud.factors(1, 64) == (16, 4, 1)
    assert cloud.factors(16, 4) == (1, 4, 1)
    assert cloud.factors(1, 1536) == (16, 48, 2)
    with pytest.raises(HardwareError, match="do not fill units of 8"):
        find_hardware("hgx-h200").factors(3, 4)


def test_scaling_a_link_changes_that_link_only() -> None:
    topology = find_hardware("pcie-l40s")
    half = topology.scaled(0, 0.5)
    assert half.levels[0].rate(8, "all_reduce") == topology.levels[0].rate(8, "all_reduce") / 2
    assert half.levels[1] == topology.levels[1]
