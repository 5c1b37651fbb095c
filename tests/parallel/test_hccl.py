"""The buffer that Ascend's fused exchange needs, told by the commands of a plan."""

from __future__ import annotations

import pytest

from glm5_port.config import released
from glm5_port.parallel.plan import Layout, ParallelPlan, Role, even
from glm5_port.parallel.recipes import emit, hccl_buffer
from tests.parallel.test_recipes import question

GLM5 = released("GLM-5")


@pytest.mark.parametrize(
    ("expert", "rows", "megabytes"),
    [(16, 64, 196 + 4), (32, 64, 388), (16, 256, 772), (256, 64, 388), (8, 1, 200)],
    ids=["default is enough", "32 ranks", "256 rows", "one expert a rank", "small"],
)
def test_hccl_buffer(expert: int, rows: int, megabytes: int) -> None:
    """By hand: 64 rows * 32 ranks * 8 choices * 6144 * 2 bytes are 192 MiB; twice that and twice 2 MiB are 388."""
    assert hccl_buffer(Layout(data=expert, expert=expert), rows, GLM5) == megabytes


def test_commands_tell_it() -> None:
    asked = question("atlas-800-a2", 2)
    layout = Layout(data=16, expert=16, exchange="hierarchical", prefill_exchange="all_gather", exchange_bits=8)
    plan = ParallelPlan(
        model="GLM-5",
        hardware="atlas-800-a2",
        node_devices=8,
        weights="w4a8",
        kv_format="plain",
        roles=(Role(name="mixed", layout=even(layout, 78)),),
        max_context=5120,
        max_sequences=512,
        chunk=8192,
    )
    for command in emit(plan, asked.topology, asked.config, "vllm-ascend"):
        assert command.environment["HCCL_BUFFSIZE"] == "1540"
