"""Every kind of layout gives the logits and the tokens of one process, on every rank, and each rank holds its part only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glm5_port.parallel.sharding import rank_weights
from tests.distributed.launching import on_ranks
from tests.distributed.scenes import FOUR, TWO, config

FOUND = dict[str, tuple[float, bool, int]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[FOUND]]:
    """Results of all layouts of so many ranks, from one launch."""
    known: dict[int, list[FOUND]] = {}

    def launch(world: int) -> list[FOUND]:
        if world not in known:
            folder: Path = tmp_path_factory.mktemp(f"ranks{world}")
            known[world] = on_ranks(world, "tests.distributed.scenes:layouts", folder)
        return known[world]

    return launch


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_logits_and_tokens_are_those_of_one_process(found: Callable[[int], list[FOUND]], name: str) -> None:
    world = 2 if name in TWO else 4
    for rank, each in enumerate(found(world)):
        error, same, _ = each[name]
        assert error < 1e-5, f"rank {rank}"
        assert same, f"rank {rank} generated other tokens"


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_a_rank_holds_what_the_planner_counts(found: Callable[[int], list[FOUND]], name: str) -> None:
    world, layout = (2, TWO[name]) if name in TWO else (4, FOUR[name])
    for rank, each in enumerate(found(world)):
        stage = layout.coordinates(rank)["pipeline"]
        biases = sum(config().is_moe(layer) for layer in layout.stage_layers(config().num_hidden_layers)[stage])
        biases += layout.drafts > 0 and stage == layout.pipeline - 1
        counted = rank_weights(config(), "bf16", layout, stage).total - biases * config().n_routed_experts * 2  # float32
        assert each[name][2] * 2 == counted, f"rank {rank}"


def test_only_the_rows_that_are_asked_for_travel(tmp_path: Path) -> None:
    """After the last layer: as many rows of a rank as could be asked of it, not all that it carries."""
    asked, width = 5, config().hidden_size * 4
    for each in on_ranks(4, "tests.distributed.scenes:asked_rows", tmp_path):
        for name, (error, some, every) in each.items():
            layout = FOUR[name]
            assert error == 0, name
            if layout.exchange != "all_reduce" and layout.pipeline == 1:
                assert some <= asked * width * (layout.ranks - 1) < every, name
